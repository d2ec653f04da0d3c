"""What was measured of a model: raw numbers only. Transforms happen later, in the allocation, and are named there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core.shown import Shown
from mpqsearch.errors import ArtifactError, ConfigError, NumericsError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]

CHANNEL_ARRAYS = ("kurtosis", "kurtosis_smoothed", "weight_rms", "sensitivity", "context_sensitivity", "output_power")
STEP_ARRAYS = ("step_sensitivity",)
WIDTH_ARRAYS = ("weight_error", "output_error", "output_error_corrected", "quantized_input_error")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SensitivityProfile(Shown):
    """Measurements of every output channel at every width, concatenated over layers in the order of ``names``.

    With C channels in all, W widths and L layers, ``arrays`` holds (float32 unless said):

    ``kurtosis``, ``kurtosis_smoothed`` ``[C]``
        Fourth standardised moment of each channel's weights, not excess (Gaussian: 3), before and after MPQ-DM's
        smoothing.
    ``weight_rms`` ``[C]``
        Root mean square of each channel's weights.
    ``weight_error/<format>`` ``[C, W]``
        ``sum (w - w_q)**2`` of each channel.
    ``output_error/<format>`` ``[C, W]``
        Mean over calibration inputs and positions of the squared error of that output channel: ``e' H e``, exact.
    ``output_error_corrected/<format>`` ``[C, W]``
        The same after the mean shift has been folded into the bias: ``e' (H - m m') e``.
    ``quantized_input_error/<format>@a<bits>`` ``[C, W]``
        Mean squared error of that output channel with its input quantized too, at a static width: ``E[(w_q' q(x) - w'
        x)**2]``, exact.
    ``sensitivity`` ``[C]``
        Mean square of the gradient of a random projection of one prediction with respect to that channel (summed over
        positions), in the weights that the rows of predictions have in the final sample: what a unit of output error
        costs at the end, if errors of different calls are independent. On recorded calls: in the prediction itself.
    ``context_sensitivity`` ``[C]``
        The sensitivity in models of which all layers are quantized, at widths that differ from layer to layer: a
        channel that is dead at full precision need not be dead there.
    ``step_sensitivity`` ``[C, B]``
        The sensitivity inside each of B equal parts of a run, noise first; 0 where none was probed.
    ``output_power`` ``[C]``
        Mean square of the channel's output at full precision.
    ``layer_probe_error/<format>`` ``[L, W]``, ``layer_probe_std_error/<format>``
        First-order effect of quantizing one layer, in the unit of ``sensitivity``: mean of ``<d(v.f)/dW, W_q - W>**2``
        over calls and random projections ``v``; cross terms between channels and positions included.
    ``layer_sampler_error/<format>`` ``[L, W]``, ``layer_sampler_std_error/<format>``
        The same for the *final sample*, through all calls of a run and their correlations, as a mean square over its
        values (of latents, where a model makes those).
    ``layer_final_error/<format>`` ``[L, W]``, NaN where not measured
        Mean squared error of final samples with only that layer quantized: the slow reference. Standard errors over
        samples in ``layer_final_std_error/<format>``.
    ``layer_probe_error_corrected``, ``layer_sampler_error_corrected``, ``layer_final_error_corrected``
        These three with bias correction: the mean shift is taken out of every layer that has a bias.
    ``layer_context_slope/<format>``, ``layer_context_std_error/<format>`` ``[L, W]``
        Change of the mean squared error of the final sample, to first order and of any sign, that the error of one
        layer makes among the errors of all others: a mean over quantized models that mix ``context_widths``.
    ``layer_activation_error`` ``[L, W]``
        Effect on the model's output of quantizing one layer's input at a static width, if its errors were independent:
        ``mean (x_q - x)**2 * sum_c sensitivity_c |w_c|**2``.

    What was not measured is absent: a profile of the weights alone has ``kurtosis``, ``weight_rms`` and
    ``weight_error`` only, and `need` says so.

    A format is ``<scheme>`` or ``<scheme>+smooth``, as in ``asymmetric``, ``auto``, ``asymmetric+smooth``. ``means``
    and ``input_max`` map a layer to its mean input vector ``[fan_in]`` and the largest magnitude of each input channel
    ``[inputs]``. ``calibration`` says what the numbers were measured on; ``calibration["constant_inputs"]`` names the
    layers whose input never changed meanwhile.
    """

    model_digest: str
    names: tuple[str, ...]
    channels: tuple[int, ...]
    widths: tuple[int, ...]
    arrays: Mapping[str, Array]
    means: Mapping[str, Array] = field(default_factory=dict)
    input_max: Mapping[str, Array] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, int] = field(init=False, compare=False)
    """Layer name to position."""
    offsets: NDArray[np.int64] = field(init=False, compare=False)
    """``[L + 1]``: channels of layer ``l`` are rows ``offsets[l]:offsets[l + 1]``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {name: i for i, name in enumerate(self.names)})
        object.__setattr__(self, "offsets", np.cumsum([0, *self.channels], dtype=np.int64))
        for key, array in self.arrays.items():
            self._check_array(key, array)
            array.setflags(write=False)

    def _check_array(self, key: str, array: Array) -> None:
        n, w, family = sum(self.channels), len(self.widths), key.split("/", maxsplit=1)[0]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(CHANNEL_ARRAYS, (n,)) | dict.fromkeys(WIDTH_ARRAYS, (n, w))
        shapes |= dict.fromkeys(STEP_ARRAYS, (n, *array.shape[1:2]))
        shape = (len(self.names), w) if family.startswith("layer_") else shapes.get(family)
        if shape is None:
            raise ArtifactError(f"profile: unknown array {key!r}")
        if array.shape != shape:
            raise ArtifactError(f"profile: {key!r} has the shape {array.shape}, expected {shape}")
        if not family.startswith("layer_") and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array.reshape(n, -1)).all(1))[0])
            raise NumericsError(
                f"profile: {key!r} is not finite in layer {self.layer_of(row)!r}. Look for NaN in its weights or "
                "inputs."
            )

    def rows(self, name: str) -> slice:
        """The channel rows of one layer."""
        i = self.index[name]
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def layer_of(self, row: int) -> str:
        """The layer to which a channel row belongs."""
        return self.names[int(np.searchsorted(self.offsets, row, side="right")) - 1]

    def layer_sum(self, per_channel: Array) -> Array:
        """Sum ``[C, ...]`` over the channels of each layer: ``[L, ...]``."""
        return np.add.reduceat(per_channel, self.offsets[:-1], axis=0)

    def only(self, names: Collection[str]) -> SensitivityProfile:
        """What was measured of some layers."""
        kept = np.array([name in names for name in self.names], dtype=bool)
        rows = np.repeat(kept, self.channels)
        return replace(
            self,
            names=tuple(n for n in self.names if n in names),
            channels=tuple(c for n, c in zip(self.names, self.channels, strict=True) if n in names),
            arrays={key: a[kept if key.startswith("layer_") else rows] for key, a in self.arrays.items()},
            means={n: mean for n, mean in self.means.items() if n in names},
            input_max={n: largest for n, largest in self.input_max.items() if n in names},
        )

    def shift_share(self, fmt: str) -> Array:
        """Share ``[L, W]`` of each layer's output error that is a shift of its mean, which a bias can take off without
        storage; 0..1."""
        full, corrected = (
            self.layer_sum(self.need(f"{family}/{fmt}", "the share of the mean shift").astype(np.float64))
            for family in ("output_error", "output_error_corrected")
        )
        share: Array = np.clip(1 - np.divide(corrected, full, out=np.ones_like(full), where=full > 0), 0.0, 1.0)
        return share

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats whose errors were measured, be it on the weights or of whole layers alone."""
        families = ("output_error/", "weight_error/", "layer_probe_error/")
        return tuple(sorted({k.split("/")[1] for k in self.arrays if k.startswith(families)}))

    @property
    def families(self) -> frozenset[str]:
        """What was measured in any format: the names of the arrays without their formats."""
        return frozenset(k.split("/")[0] for k in self.arrays)

    @property
    def constant_inputs(self) -> tuple[str, ...]:
        """Layers whose input never changed during calibration: their errors are known for that one input only."""
        return tuple(n for n in self.calibration.get("constant_inputs", ()) if n in self.index)

    @property
    def weights_only(self) -> bool:
        """Whether nothing but the weights was looked at: no input, no output error, no sensitivity."""
        return not self.layers_only and "output_error" not in self.families

    @property
    def layers_only(self) -> bool:
        """Whether only totals of whole layers were measured: nothing is known of single output channels."""
        return "layer_probe_error" in self.families and self.families.isdisjoint(("output_error", "weight_error"))

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays in memory."""
        every = (*self.arrays.values(), *self.means.values(), *self.input_max.values())
        return sum(int(array.nbytes) for array in every)

    def facts(self) -> dict[str, Any]:
        """Layers, widths, formats, and what was measured."""
        return {
            "layers": f"{len(self.names)} with {sum(self.channels):,} output channels",
            "widths": ", ".join(map(str, self.widths)),
            "formats": ", ".join(self.formats),
            "measured": ", ".join(sorted(self.families)),
            "model": f"{self.model_digest[:12]}; {self.size_bytes / 1e6:.1f} MB",
        }

    def to_frame(self) -> pd.DataFrame:
        """One row a layer and format: ``layer``, ``format``, ``channels``, ``max_kurtosis``, and the error of its
        outputs (of its weights, or its total, where nothing else was measured) at each width, ``error_<bits>``."""
        import pandas as pd

        rows = []
        kurtosis = (
            np.maximum.reduceat(self.arrays["kurtosis"], self.offsets[:-1]) if "kurtosis" in self.arrays else None
        )
        for fmt in self.formats:
            if self.layers_only:
                totals = self.arrays[f"layer_probe_error/{fmt}"]
            else:
                error = self.arrays.get(f"output_error/{fmt}", self.arrays.get(f"weight_error/{fmt}"))
                totals = self.layer_sum(np.asarray(error, dtype=np.float64))
            for i, name in enumerate(self.names):
                row = {"layer": name, "format": fmt, "channels": self.channels[i]}
                row |= {} if kurtosis is None else {"max_kurtosis": float(kurtosis[i])}
                rows.append(row | {f"error_{b}": float(totals[i, j]) for j, b in enumerate(self.widths)})
        return pd.DataFrame(rows)

    def need(self, key: str, what: str) -> Array:
        """One array; `ConfigError` that names it and what needs it when it was not measured."""
        if key not in self.arrays:
            there = ", ".join(sorted(self.arrays))
            why = f"this profile holds {there}. Add what is missing to [calibration] and profile again"
            if self.weights_only:
                why = (
                    "this profile was made from the weights alone; there the loss 'weight' works. Profile with "
                    "calibration for more"
                )
            elif self.layers_only:
                why = (
                    "this profile was made for layers alone; there the loss 'probe' works. Profile with "
                    'calibration.granularity = "channel" for more'
                )
            raise ConfigError(f"{what} needs {key!r}: {why}.")
        return self.arrays[key]

    def header(self) -> dict[str, Any]:
        """Everything but the arrays, as plain JSON data."""
        return {
            "model_digest": self.model_digest,
            "names": list(self.names),
            "channels": list(self.channels),
            "widths": list(self.widths),
            "calibration": dict(self.calibration),
        }
