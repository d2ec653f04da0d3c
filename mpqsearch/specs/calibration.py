"""What a profile is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from mpqsearch.core.formats import GROUPS, SCHEMES, WIDTHS
from mpqsearch.errors import ConfigError, UnknownNameError

GRANULARITIES = ("channel", "layer")


def grouped(schemes: Sequence[str]) -> tuple[str, ...]:
    """Of the schemes that are measured those that are measured with groups of inputs too: ``ternary``, and the last
    other one."""
    others = [s for s in schemes if s != "ternary"]
    return tuple(s for s in schemes if s in ("ternary", *others[-1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """What a profile is measured on.

    granularity
        ``channel``: everything of every output channel. ``layer``: first-order totals of whole layers alone, from one
        forward and one backward pass a calibration batch: for programs over layers (``ilp-layer``), at a fraction of
        the time.
    samples [samples]
        Runs that give input statistics, with seeds from ``first_seed`` on.
    first_seed
        Seed of the first of them.
    probe_inputs [steps]
        So many of their steps, spread evenly over samples, give sensitivities of one prediction, weighted by what it
        does to the final sample.
    probes [projections]
        Random projections of each of these predictions.
    sampler_seeds [samples]
        Runs that give sensitivities of the final sample; 0: none.
    sampler_probes [projections]
        Random projections of each of these final samples.
    context_seeds [samples]
        Runs that give slopes at maps that mix widths; 0: none.
    context_widths [bits]
        Those maps mix those of these widths that are searched.
    schemes
        The schemes to measure: ``asymmetric``, ``symmetric``, ``auto``, ``ternary``.
    groups [inputs]
        Measure ``ternary`` and the last other scheme also with a scale for so many inputs: 16, 32, 64 or 128. Example:
        ``[64, 128]``.
    smooth
        Measure each with smoothing too, and the asymmetric one with smoothing and min-max ranges (the search of
        MPQ-DM's code).
    activation_bits [bits]
        Static widths of quantized inputs, whose errors are measured with those of smoothed weights: two more runs of
        the sampler, and one for each width. Example: ``[8]``.
    final_widths [bits]
        Widths at which every layer is quantized alone and final samples are compared: slow, and the reference for the
        rest. Example: ``[3]``.
    final_seeds [samples]
        Samples that are compared at each of ``final_widths``.
    checkpoint
        Recompute activations in the backward passes: slower, in less memory.
    seed
        Of random projections, and of the maps that mix widths.
    """

    granularity: str = "channel"
    samples: int = 8
    first_seed: int = 1_000_000
    probe_inputs: int = 40
    probes: int = 2
    sampler_seeds: int = 8
    sampler_probes: int = 4
    context_seeds: int = 12
    context_widths: tuple[int, ...] = (2, 3, 4)
    schemes: tuple[str, ...] = ("asymmetric", "auto")
    groups: tuple[int, ...] = ()
    smooth: bool = False
    activation_bits: tuple[int, ...] = ()
    final_widths: tuple[int, ...] = ()
    final_seeds: int = 8
    checkpoint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise UnknownNameError("granularity", self.granularity, GRANULARITIES, "(calibration.granularity)")
        if min(self.samples, self.probe_inputs, self.probes, self.final_seeds, self.sampler_probes) < 1:
            raise ConfigError(
                "calibration: samples, probe_inputs, probes, sampler_probes and final_seeds must be at least 1"
            )
        if min(self.sampler_seeds, self.context_seeds) < 0:
            raise ConfigError(
                "calibration: sampler_seeds and context_seeds must not be negative, got "
                f"{self.sampler_seeds}, {self.context_seeds}"
            )
        unknown = next((s for s in self.schemes if s not in SCHEMES), None)
        if unknown is not None:
            raise UnknownNameError("scheme", unknown, SCHEMES, "(calibration.schemes)")
        if not self.schemes:
            raise ConfigError("calibration.schemes must name at least one scheme")
        if set(self.groups) - set(GROUPS[1:]):
            raise ConfigError(f"calibration.groups must be among {GROUPS[1:]} inputs, got {self.groups}")
        if any(b not in WIDTHS for b in self.activation_bits):
            raise ConfigError(
                f"calibration.activation_bits must lie in {WIDTHS[0]}..{WIDTHS[-1]}, got {self.activation_bits}"
            )
        self._check_together()

    def _check_together(self) -> None:
        """Raise `ConfigError` for settings of which one leaves out what the other asks for."""
        asked = [k for k in ("final_widths", "activation_bits") if getattr(self, k)]
        if self.granularity == "layer" and (asked or self.smooth):
            raise ConfigError(
                'calibration.granularity = "layer" measures first-order totals of layers alone: leave out '
                f"{', '.join(asked or ['smooth'])}, or measure channels"
            )

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data, without what a subclass adds."""
        values = {f.name: getattr(self, f.name) for f in fields(CalibrationSpec)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
