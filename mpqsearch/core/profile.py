"""What was measured of a model: raw numbers only. Transforms happen later, in the allocation, and are named there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.errors import ArtifactError, ConfigError, NumericsError

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SensitivityProfile:
    """Measurements of every output channel at every width, concatenated over layers in the order of ``names``.

    With C channels in all, W widths and L layers, ``arrays`` holds (float32 unless said):

    ``kurtosis``, ``kurtosis_smoothed`` ``[C]``
        Fourth standardised moment of each row, not excess (Gaussian: 3), before and after MPQ-DM's smoothing.
    ``weight_error/<variant>`` ``[C, W]``
        ``sum (w - w_q)**2`` of each row.
    ``output_error/<variant>`` ``[C, W]``
        Mean over calibration inputs and positions of the squared error of that output channel: ``e' H e``, exact.
    ``output_error_corrected/<variant>`` ``[C, W]``
        The same after the mean shift has been folded into the bias: ``e' (H - m m') e``.
    ``quantized_input_error/<variant>@a<bits>`` ``[C, W]``
        Mean squared error of that output channel with its input quantized too, at a static width: ``E[(w_q' q(x) - w'
        x)**2]``, exact.
    ``sensitivity`` ``[C]``, ``sensitivity_std_error`` ``[C]``
        Mean square of the gradient of a random projection of the model's output with respect to that channel (summed
        over positions): what a unit of output error costs at the end.
    ``step_sensitivity``, ``step_sensitivity_std_error`` ``[C, B]``
        The gain inside each of B buckets of equal width of the schedule's timesteps, clean samples first; 0 where none
        was probed.
    ``output_power`` ``[C]``
        Mean square of the channel's output at full precision.
    ``layer_probe_error/<variant>`` ``[L, W]``, ``layer_probe_std_error/<variant>``
        First-order effect on the model's output of quantizing one layer: mean of ``<d(v.f)/dW, W_q - W>**2`` over
        calibration inputs and random projections ``v``; cross terms between channels and positions included, mean shift
        taken out where a bias exists.
    ``layer_sampler_error/<variant>`` ``[L, W]``, ``layer_sampler_std_error/<variant>``
        The same for the *final sample*, through all steps of the sampler, as a mean square over its pixels.
    ``layer_context_slope/<variant>``, ``layer_context_std_error/<variant>`` ``[L, W]``
        Change of the mean squared error of the final sample, to first order and of any sign, that the error of one
        layer makes among the errors of all others: a mean over quantized models that mix ``context_widths``.
    ``layer_activation_error`` ``[L, W]``
        Effect on the model's output of quantizing one layer's input at a static width, if its errors were independent:
        ``mean (x_q - x)**2 * sum_c sensitivity_c |w_c|**2``.
    ``layer_final_error/<variant>`` ``[L, W]``, NaN where not measured
        Mean squared error of final samples with only that layer quantized: the slow reference. Standard errors over
        samples in ``layer_final_std_error/<variant>``.
    ``layer_operating_error/<variant>``, ``layer_operating_std_error/<variant>`` ``[L, W]``
        Change of the mean squared error of final samples when one layer of a *given map* gets another width, any sign:
        slope along the residual plus Gauss-Newton curvature. ``calibration["operating_points"]`` names the maps.

    What was not measured is absent: a profile of the weights alone has ``kurtosis`` and ``weight_error`` only, and
    `need` says so.

    A variant is ``<scheme>`` or ``<scheme>+smooth``, as in ``asymmetric``, ``auto``, ``asymmetric+smooth``. ``means``
    and ``input_max`` map a layer to its mean input vector ``[fan_in]`` and the largest magnitude of each input channel
    ``[inputs]``.
    """

    model_digest: str
    names: tuple[str, ...]
    channels: tuple[int, ...]
    widths: tuple[int, ...]
    arrays: Mapping[str, Array]
    means: Mapping[str, Array] = field(default_factory=dict)
    input_max: Mapping[str, Array] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, w, n_layers = sum(self.channels), len(self.widths), len(self.names)
        for key, array in self.arrays.items():
            family = key.split("/")[0]
            shape: tuple[int, ...] | None = {
                "kurtosis": (n,),
                "kurtosis_smoothed": (n,),
                "sensitivity": (n,),
                "sensitivity_std_error": (n,),
                "output_power": (n,),
            }.get(family)
            if family in ("step_sensitivity", "step_sensitivity_std_error"):
                shape = (n, array.shape[-1])
            if family in ("weight_error", "output_error", "output_error_corrected", "quantized_input_error"):
                shape = (n, w)
            if family.startswith("layer_"):
                shape = (n_layers, w)
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
            array.setflags(write=False)

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was computed from these arrays before, by keys of those who computed it."""
        return {}

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """``[L + 1]``: channels of layer ``l`` are rows ``offsets[l]:offsets[l + 1]``."""
        return np.cumsum([0, *self.channels], dtype=np.int64)

    @cached_property
    def index(self) -> dict[str, int]:
        """Layer name to position."""
        return {name: i for i, name in enumerate(self.names)}

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

    def shift_share(self, variant: str) -> Array:
        """Share ``[L, W]`` of each layer's output error that is a shift of its mean, which a bias can take off without
        storage; 0..1."""
        full = self.layer_sum(self.need(f"output_error/{variant}", "the share of the mean shift").astype(np.float64))
        centred = self.layer_sum(
            self.need(f"output_error_corrected/{variant}", "the share of the mean shift").astype(np.float64)
        )
        share: Array = np.clip(1 - np.divide(centred, full, out=np.ones_like(full), where=full > 0), 0.0, 1.0)
        return share

    @property
    def variants(self) -> tuple[str, ...]:
        """Quantizer variants whose errors were measured, be it on the weights alone."""
        families = ("output_error/", "weight_error/")
        return tuple(sorted({k.split("/")[1] for k in self.arrays if k.startswith(families)}))

    @property
    def weights_only(self) -> bool:
        """Whether nothing but the weights was looked at: no input, no output error, no gain."""
        return not any(k.startswith(("output_error/", "layer_context_slope/")) for k in self.arrays)

    @property
    def prediction_only(self) -> bool:
        """Whether only what predicts the loss of given maps was measured: slopes, and the errors of the weights."""
        return not self.weights_only and not any(k.startswith("output_error/") for k in self.arrays)

    def need(self, key: str, what: str) -> Array:
        """One array; `ConfigError` that names it and what needs it when it was not measured."""
        if key not in self.arrays:
            why = (
                "this profile was made from the weights alone; there the loss 'weight' works. Profile with "
                "calibration for more"
                if self.weights_only
                else "this profile was made for predictions alone (calibration.prediction_only). Profile without it, in another run folder"
                if self.prediction_only
                else f"this profile holds {', '.join(sorted(self.arrays))}. Add what is missing to [calibration] and profile again"
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
