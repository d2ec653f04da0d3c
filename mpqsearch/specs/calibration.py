"""What a profile is measured on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from mpqsearch.core.formats import WIDTHS
from mpqsearch.errors import ConfigError

MOST = 32
"""How many times the configured numbers of inputs and seeds `CalibrationSpec.target_error` may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """What a profile is measured on.

    ``samples`` trajectories of the sampler (seeds from ``first_seed``) give the input statistics; of their inputs,
    ``probe_inputs`` spread evenly over samples and steps are probed ``probes`` times each, with gains kept in
    ``buckets`` buckets of timesteps. ``sampler_seeds`` trajectories (0: none) are probed ``sampler_probes`` times each
    through the whole sampler. ``context_seeds`` trajectories (0: none) give slopes at maps that mix ``context_widths``
    (those of them that are searched). ``schemes`` are the quantizer variants to price; ``smooth`` prices the asymmetric
    one with smoothing too, and with smoothing and min-max ranges (the search of MPQ-DM's code). ``final_widths`` lists
    widths at which every layer is quantized alone and the final samples of ``final_seeds`` seeds are compared: slow,
    and the reference for the rest.

    ``activation_bits`` are static input widths: where there are any, quantized inputs are priced, and smoothed weights
    with inputs of each of these widths (two more runs of the sampler, and one for each width).

    ``prediction_only`` measures nothing but those slopes, the means of inputs and the errors of the weights: what
    predicting the loss of given maps needs, at a fraction of the cost, and not enough to choose widths by.

    ``target_error`` (0: off) goes on probing until the relative standard error of the layer totals is reached, up to
    ``MOST`` times the numbers above. ``race`` (0: off) gives more seeds of one layer at a time only to layers whose
    widths are still undecided, until the noise costs less than this share of the predicted loss. ``checkpoint``
    recomputes activations in the backward passes.
    """

    samples: int = 8
    first_seed: int = 1_000_000
    probe_inputs: int = 40
    probes: int = 2
    buckets: int = 5
    sampler_seeds: int = 8
    sampler_probes: int = 4
    context_seeds: int = 12
    context_widths: tuple[int, ...] = (2, 3, 4)
    schemes: tuple[str, ...] = ("asymmetric", "auto")
    smooth: bool = False
    activation_bits: tuple[int, ...] = ()
    final_widths: tuple[int, ...] = ()
    final_seeds: int = 8
    target_error: float = 0.0
    race: float = 0.0
    checkpoint: bool = False
    seed: int = 0
    prediction_only: bool = False

    def __post_init__(self) -> None:
        if min(self.samples, self.probe_inputs, self.probes, self.final_seeds, self.buckets, self.sampler_probes) < 1:
            raise ConfigError(
                "calibration: samples, probe_inputs, probes, buckets, sampler_probes and final_seeds must be at least 1"
            )
        if min(self.sampler_seeds, self.context_seeds) < 0 or self.race < 0 or not 0 <= self.target_error < 1:
            raise ConfigError(
                "calibration: sampler_seeds, context_seeds and race must not be negative and target_error lies in "
                "[0, 1), got "
                f"{self.sampler_seeds}, {self.context_seeds}, {self.race:g}, {self.target_error:g}"
            )
        if self.prediction_only and (self.final_widths or self.activation_bits):
            raise ConfigError(
                "calibration.prediction_only measures slopes alone, but final_widths or activation_bits are set too; "
                "leave them empty, or "
                "prediction_only out"
            )
        if not self.schemes:
            raise ConfigError("calibration.schemes must name at least one scheme")
        if any(b not in WIDTHS for b in self.activation_bits):
            raise ConfigError(
                f"calibration.activation_bits must lie in {WIDTHS[0]}..{WIDTHS[-1]}, got {self.activation_bits}"
            )

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data, without what a subclass adds."""
        values = {f.name: getattr(self, f.name) for f in fields(CalibrationSpec)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
