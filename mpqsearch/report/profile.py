"""A profile by itself: what is sensitive, which channels have heavy tails, what a gain does over depth and time, what
measuring took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray

from mpqsearch.core import LayerTable, SensitivityProfile
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.methods import available_losses, best_loss, channel_losses
from mpqsearch.report.figures import render, save_figure
from mpqsearch.report.sensitivity import MEASURED, plot_sensitivity, sensitivity_info
from mpqsearch.report.style import COLOURS, axes_or_new, muted

Floats = NDArray[np.float64]

_SPREADS = {
    "probe": ("layer_probe_error_corrected", "layer_probe_std_error_corrected"),
    "sampler": ("layer_sampler_error_corrected", "layer_sampler_std_error_corrected"),
    "final": ("layer_final_error_corrected", "layer_final_std_error_corrected"),
    "slope": ("layer_context_slope", "layer_context_std_error"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer: largest kurtosis of its channels, largest share of its output error over the widths that is a shift of
    the mean, relative standard error of the loss at the narrowest width (both None: unknown), loss at every width.
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
    """What to read first. The loss is the best that the profile holds, with bias correction, of the scheme ``auto``
    where it was measured; the layers as wholes where no channel was looked at."""
    if "kurtosis" not in profile.arrays:
        return _layers_alone(profile, table, layers)
    variant = "auto" if "auto" in profile.formats else profile.formats[0]
    loss = available_losses(profile)[-1] if profile.prediction_only else best_loss(profile)
    totals = profile.layer_sum(channel_losses(profile, table, variant, loss, bias_correction=loss != "weight"))
    middle, spread = (profile.arrays.get(f"{family}/{variant}") for family in _SPREADS.get(loss, ("", "")))
    kurtosis = profile.arrays["kurtosis"].astype(np.float64)
    shift = profile.shift_share(variant) if f"output_error/{variant}" in profile.arrays else None
    rows = []
    for i in np.argsort(-totals.max(1), kind="stable")[:layers]:
        error = None
        if spread is not None and middle is not None:
            known = np.flatnonzero(np.isfinite(spread[i]) & (np.nan_to_num(middle[i]) > 0))
            error = float(spread[i, known[0]] / middle[i, known[0]]) if len(known) else None
        name = profile.names[i]
        rows.append(
            LayerRow(
                name=name,
                role=table[name].role,
                kurtosis=float(kurtosis[profile.rows(name)].max()),
                mean_shift=None if shift is None else float(shift[i].max()),
                relative_error=error,
                losses=tuple(float(v) for v in totals[i]),
            )
        )
    low, high = np.quantile(kurtosis, [0.25, 0.75])
    limit = float(high + 3 * (high - low))
    medians = np.repeat([np.median(kurtosis[profile.rows(n)]) for n in profile.names], profile.channels)
    heavy = [int(c) for c in np.argsort(-kurtosis, kind="stable")[:channels] if kurtosis[c] > limit]
    owners = [profile.layer_of(c) for c in heavy]
    return ProfileSummary(
        label=f"{'squared weight error' if loss == 'weight' else f'loss {loss}'}, scheme {variant}",
        layers=tuple(rows),
        outliers=tuple(
            (n, c - profile.rows(n).start, float(kurtosis[c]), float(kurtosis[c] / max(medians[c], 1e-12)))
            for n, c in zip(owners, heavy, strict=True)
        ),
        n_outliers=int((kurtosis > limit).sum()),
        outlier_limit=limit,
        spent=_spent(profile),
    )


def _layers_alone(profile: SensitivityProfile, table: LayerTable, layers: int) -> ProfileSummary:
    info = sensitivity_info(profile, worst=layers)
    rows = tuple(
        LayerRow(
            name=profile.names[i],
            role=table[profile.names[i]].role,
            kurtosis=float("nan"),
            mean_shift=None,
            relative_error=None,
            losses=tuple(float(v) for v in info.loss[i]),
        )
        for i in info.worst
    )
    return ProfileSummary(
        label=info.label, layers=rows, outliers=(), n_outliers=0, outlier_limit=float("nan"), spent=_spent(profile)
    )


def _spent(profile: SensitivityProfile) -> dict[str, str]:
    spent: Mapping[str, Any] = profile.calibration.get("spent", {})
    seconds: Mapping[str, float] = spent.get("seconds", {})
    out = {f"time, {label}": f"{value:.1f} s" for label, value in seconds.items()}
    if "memory_bytes" in spent:
        out["memory, peak of the process"] = f"{spent['memory_bytes'] / 1e9:.2f} GB"
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class KurtosisInfo:
    """``kurtosis`` ``[C]`` and ``error`` ``[C]`` of every channel at ``bits``, the error relative to the channel's
    power if known."""

    kurtosis: Floats
    error: Floats
    bits: int
    label: str
    spearman: float


def kurtosis_info(profile: SensitivityProfile, bits: int = 0, variant: str = "") -> KurtosisInfo:
    """Kurtosis of each row against what quantizing it costs at ``bits`` (default: 4, or the nearest width of the
    profile).

    Raises `ConfigError` for a width, `UnknownNameError` for a variant that the profile does not have.
    """
    from mpqsearch.report.sensitivity import spearman

    chosen = variant or ("asymmetric" if "asymmetric" in profile.formats else next(iter(profile.formats), ""))
    if chosen not in profile.formats:
        raise UnknownNameError("profile variant", chosen, profile.formats)
    width = bits or min(profile.widths, key=lambda b: abs(b - 4))
    if width not in profile.widths:
        raise ConfigError(f"the profile has the widths {profile.widths}, not {width}")
    family = "output" if f"output_error/{chosen}" in profile.arrays else "weight"
    error = profile.arrays[f"{family}_error/{chosen}"][:, profile.widths.index(width)].astype(np.float64)
    power = profile.arrays.get("output_power")
    label = f"{family} error at {width} bits ({chosen})"
    if power is not None and family == "output":
        error = np.divide(error, power, out=np.zeros_like(error), where=power > 0)
        label = f"{label}, relative to the channel's power"
    kurtosis = profile.arrays["kurtosis"].astype(np.float64)
    return KurtosisInfo(kurtosis=kurtosis, error=error, bits=width, label=label, spearman=spearman(kurtosis, error))


def plot_kurtosis(info: KurtosisInfo, ax: Axes | None = None) -> Axes:
    """A dot a channel, both axes log. Draws on ``ax`` (default: a new figure) and returns it."""
    ax = axes_or_new(ax, (5.4, 4.2))
    ax.plot(info.kurtosis, info.error, ".", color=COLOURS[0], markersize=3, alpha=0.4, rasterized=True)
    ax.axvline(3.0, color=muted(), linewidth=0.8, linestyle="--")
    ax.set_xscale("log", nonpositive="mask")
    ax.set_yscale("log", nonpositive="mask")
    ax.set_xlabel("kurtosis of the row (dashed: Gaussian)")
    ax.set_ylabel(info.label)
    ax.set_title(f"Spearman {info.spearman:.2f} over {len(info.error)} channels", loc="left", fontsize=9)
    return ax


@dataclass(frozen=True, slots=True, kw_only=True)
class GainInfo:
    """Mean gain ``[L, B]`` of the channels of each layer in each bucket of timesteps; NaN where nothing was probed."""

    layers: tuple[str, ...]
    gain: Floats
    edges: tuple[int, ...]


def gain_info(profile: SensitivityProfile, timesteps: int = 1000) -> GainInfo:
    """Gains over depth and time; ``timesteps`` is the length of the schedule. Raises `ConfigError` when the profile
    holds none."""
    steps = profile.need("step_sensitivity", "the picture of gains over time").astype(np.float64)
    mean = profile.layer_sum(steps) / np.array(profile.channels, dtype=np.float64)[:, None]
    buckets = steps.shape[1]
    return GainInfo(
        layers=profile.names,
        gain=np.where(mean > 0, mean, np.nan),
        edges=tuple(round(i * timesteps / buckets) for i in range(buckets + 1)),
    )


def plot_gain(info: GainInfo, ax: Axes | None = None) -> Axes:
    """Layers in the order of a forward pass from left to right, noise at the top; colour by log gain. Draws on ``ax``
    and returns it."""
    ax = axes_or_new(ax, (7.2, 3.6))
    finite = info.gain[np.isfinite(info.gain)]
    norm = (
        LogNorm(vmin=float(finite.min()), vmax=float(finite.max()))
        if len(finite) and finite.max() > finite.min()
        else None
    )
    image = ax.imshow(info.gain.T, aspect="auto", origin="lower", interpolation="nearest", cmap="viridis", norm=norm)
    ax.grid(visible=False)
    buckets = info.gain.shape[1]
    ax.set_yticks(range(buckets), [f"{a}..{b - 1}" for a, b in zip(info.edges[:-1], info.edges[1:], strict=True)])
    shown = list(range(0, len(info.layers), max(1, len(info.layers) // 16)))
    ax.set_xticks(shown, [info.layers[i] for i in shown], rotation=90, fontsize=6)
    ax.set_ylabel("timestep")
    ax.set_xlabel("layers, in the order of a forward pass")
    ax.figure.colorbar(image, ax=ax, label="mean gain of a channel")
    return ax


def write_profile_figures(folder: Path, profile: SensitivityProfile, timesteps: int = 1000) -> list[Path]:
    """``profile_sensitivity``, ``profile_measured`` (one layer at a time), ``profile_kurtosis`` and ``profile_gain``,
    as PNG and SVG.

    Those for which the profile holds nothing are left out. Returns the paths.
    """
    draws: dict[str, Any] = {
        "profile_sensitivity": lambda: plot_sensitivity(sensitivity_info(profile)),
    }
    if "kurtosis" in profile.arrays:
        draws["profile_kurtosis"] = lambda: plot_kurtosis(kurtosis_info(profile))
    if any(k.startswith("layer_final_error/") for k in profile.arrays):
        draws["profile_measured"] = lambda: plot_sensitivity(sensitivity_info(profile, MEASURED))
    if "step_sensitivity" in profile.arrays:
        draws["profile_gain"] = lambda: plot_gain(gain_info(profile, timesteps))
    return [path for stem, draw in draws.items() for path in save_figure(render(draw), folder / stem)]
