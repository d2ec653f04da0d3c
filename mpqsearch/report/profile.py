"""A profile by itself, for the terminal: what is sensitive, which channels have heavy tails, what measuring cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpqsearch.core import LayerTable, SensitivityProfile
from mpqsearch.report.sensitivity import Floats, LayerLosses, layer_losses

_SPREADS = {
    "probe": ("layer_probe_error_corrected", "layer_probe_std_error_corrected"),
    "sampler": ("layer_sampler_error_corrected", "layer_sampler_std_error_corrected"),
    "final": ("layer_final_error_corrected", "layer_final_std_error_corrected"),
    "slope": ("layer_context_slope", "layer_context_std_error"),
}
"""Arrays of a loss of whole layers and of its standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer: largest kurtosis of its channels (NaN where no channel was looked at), largest share of its output
    error over the widths that is a shift of the mean, relative standard error of the loss at the narrowest width (both
    None: unknown), loss at every width.
    """

    name: str
    role: str
    kurtosis: float
    mean_shift: float | None
    relative_error: float | None
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSummary:
    """The most sensitive layers, largest loss first, and the heaviest channels as (layer, channel, kurtosis, times the
    layer's median).

    ``outlier_limit``: third quartile plus three interquartile ranges of all channels (Tukey's far outliers). ``spent``:
    time and memory of the measurement.
    """

    label: str
    layers: tuple[LayerRow, ...]
    outliers: tuple[tuple[str, int, float, float], ...]
    n_outliers: int
    outlier_limit: float
    spent: Mapping[str, str]


def profile_summary(
    profile: SensitivityProfile, table: LayerTable, *, layers: int = 15, channels: int = 5
) -> ProfileSummary:
    """What to read first; the loss is that of `layer_losses`."""
    losses = layer_losses(profile, table)
    kurtosis = profile.arrays.get("kurtosis", np.zeros(0)).astype(np.float64)
    low, high = np.quantile(kurtosis, [0.25, 0.75]) if kurtosis.size else (np.nan, np.nan)
    limit = float(high + 3 * (high - low))
    heaviest = [int(c) for c in np.argsort(-kurtosis, kind="stable")[:channels] if kurtosis[c] > limit]
    return ProfileSummary(
        label=losses.label,
        layers=tuple(_layer_row(profile, table, losses, kurtosis, i) for i in losses.worst(layers)),
        outliers=tuple(_outlier(profile, kurtosis, c) for c in heaviest),
        n_outliers=int((kurtosis > limit).sum()),
        outlier_limit=limit,
        spent=_spent(profile),
    )


def _layer_row(
    profile: SensitivityProfile, table: LayerTable, losses: LayerLosses, kurtosis: Floats, i: int
) -> LayerRow:
    name, fmt = profile.names[i], losses.format_name
    shifts = f"output_error/{fmt}" in profile.arrays
    return LayerRow(
        name=name,
        role=table[name].role,
        kurtosis=float(kurtosis[profile.rows(name)].max()) if kurtosis.size else float("nan"),
        mean_shift=float(profile.shift_share(fmt)[i].max()) if shifts else None,
        relative_error=_relative_error(profile, losses, i),
        losses=tuple(float(v) for v in losses.loss[i]),
    )


def _relative_error(profile: SensitivityProfile, losses: LayerLosses, i: int) -> float | None:
    """Standard error of a layer's loss as a share of it, at the narrowest width where both are known."""
    keys = [f"{family}/{losses.format_name}" for family in _SPREADS.get(losses.name, ())]
    if not keys or not all(k in profile.arrays for k in keys):
        return None
    loss, error = (profile.arrays[k][i] for k in keys)
    measured = np.flatnonzero(np.isfinite(error) & (np.nan_to_num(loss) > 0))
    return float(error[measured[0]] / loss[measured[0]]) if len(measured) else None


def _outlier(profile: SensitivityProfile, kurtosis: Floats, channel: int) -> tuple[str, int, float, float]:
    layer = profile.layer_of(channel)
    rows, value = profile.rows(layer), float(kurtosis[channel])
    return layer, channel - rows.start, value, value / max(float(np.median(kurtosis[rows])), 1e-12)


def _spent(profile: SensitivityProfile) -> dict[str, str]:
    spent: Mapping[str, Any] = profile.calibration.get("spent", {})
    seconds: Mapping[str, float] = spent.get("seconds", {})
    out = {f"time, {label}": f"{value:.1f} s" for label, value in seconds.items()}
    if "memory_bytes" in spent:
        out["memory, peak of the process"] = f"{spent['memory_bytes'] / 1e9:.2f} GB"
    return out
