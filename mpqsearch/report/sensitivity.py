"""What the profile measured, and how well it predicts what the samples show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from mpqsearch.core import SensitivityProfile, StudyRecord
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.pareto import FULL_PRECISION_METHOD, LOG_METRICS
from mpqsearch.report.front import METRIC_TITLES
from mpqsearch.report.style import COLOURS, MARKERS, axes_or_new, ink, muted, series_styles

Floats = NDArray[np.float64]

MEASURED = "measured"
"""Name of the curves from one-layer-at-a-time quantization, where the profile has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityInfo:
    """``loss`` ``[L, W]`` of each layer at each width, ``label`` what it is, ``worst`` the layers to name, largest loss
    first."""

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    loss: Floats
    label: str
    worst: tuple[int, ...]


def sensitivity_info(profile: SensitivityProfile, variant: str = "", worst: int = 8) -> SensitivityInfo:
    """Loss of every layer if it alone is quantized: sensitivity × output error, summed over its channels (the error alone
    without sensitivities, and that of the weights in a profile of nothing else).

    ``variant`` is one of ``profile.formats`` (default: ``asymmetric`` if it is there, else the first) or ``measured``,
    for the error of final samples with only that layer quantized. The worst are ranked at the narrowest width that was
    measured. Raises `UnknownNameError` for a variant that the profile does not have.
    """
    final = next((k for k in sorted(profile.arrays) if k.startswith("layer_final_error/")), "")
    known = (*(profile.formats or layer_formats(profile)), *((MEASURED,) if final else ()))
    chosen = variant or ("asymmetric" if "asymmetric" in known else next(iter(known), ""))
    if chosen not in known:
        raise UnknownNameError("profile variant", chosen, known)
    if chosen == MEASURED:
        loss, label = profile.arrays[final], f"squared error of final samples ({final.split('/')[1]})"
    elif profile.layers_only:
        loss, label = profile.arrays[f"layer_probe_error/{chosen}"], f"loss of layers as wholes ({chosen})"
    else:
        family = "output" if f"output_error/{chosen}" in profile.arrays else "weight"
        error = profile.arrays[f"{family}_error/{chosen}"].astype(np.float64)
        sensitivity = profile.arrays.get("sensitivity")
        loss = profile.layer_sum(error if sensitivity is None else sensitivity[:, None].astype(np.float64) * error)
        label = f"{f'{family} error' if sensitivity is None else 'sensitivity × output error'} ({chosen})"
    loss = np.asarray(loss, dtype=np.float64)
    known_widths = np.isfinite(loss).any(axis=0)
    narrowest = int(np.argmax(known_widths))
    ranked = np.argsort(-np.nan_to_num(loss[:, narrowest], nan=-np.inf), kind="stable")
    return SensitivityInfo(
        layers=profile.names, widths=profile.widths, loss=loss, label=label, worst=tuple(int(i) for i in ranked[:worst])
    )


def layer_formats(profile: SensitivityProfile) -> tuple[str, ...]:
    """Formats that a profile of layers as wholes has priced."""
    return tuple(sorted(k.split("/")[1] for k in profile.arrays if k.startswith("layer_probe_error/")))


def plot_sensitivity(info: SensitivityInfo, ax: Axes | None = None) -> Axes:
    """Loss against width, a line per layer, log y; the worst layers in colour and named, the rest grey.

    Draws on ``ax`` (default: a new figure) and returns it.
    """
    ax = axes_or_new(ax, (5.4, 4.6))
    ax.set_yscale("log", nonpositive="mask")
    widths = np.array(info.widths)
    few = int(np.isfinite(info.loss).any(axis=0).sum()) < 3  # too few widths to draw lines alone
    for i in range(len(info.layers)):
        if i not in info.worst:
            ax.plot(widths, info.loss[i], color=muted(), alpha=0.35, linewidth=0.8, marker="_" if few else "", zorder=1)
    for rank, i in enumerate(info.worst):
        ax.plot(
            widths,
            info.loss[i],
            color=COLOURS[rank % len(COLOURS)],
            marker=MARKERS[rank % len(MARKERS)],
            linestyle="-" if rank < len(COLOURS) else "--",
            markersize=4.5,
            linewidth=1.5,
            label=info.layers[i],
            zorder=2,
        )
    ax.set_xticks(widths)
    ax.set_xlabel("bits of the layer, all others at full precision")
    ax.set_ylabel(info.label)
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=2,
        title=f"largest of {len(info.layers)} layers",
        title_fontsize=8,
    )
    return ax


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionInfo:
    """Predicted loss and measured metric of each point, ``[N]``, with its method and budget.

    ``spearman`` is their rank correlation with a 95 % bootstrap interval; ``within`` the mean of the rank correlations
    inside the budgets that have three points or more, since bits alone order the points of different budgets (None: no
    such budget).
    """

    predicted: Floats
    measured: Floats
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    metric: str
    label: str
    spearman: float
    low: float
    high: float
    within: float | None


def prediction_info(
    records: Iterable[StudyRecord], metric: str = "paired_mse", *, resamples: int = 2000, seed: int = 0
) -> PredictionInfo:
    """Compare predictions with ``metric`` over the quantized records that have both, the prediction being finite.

    For a metric where higher is better the sign of the correlation is turned, so that 1 always means the right order.
    Raises `ConfigError` for fewer than three such records.
    """
    chosen = [
        r
        for r in records
        if r.method != FULL_PRECISION_METHOD and metric in r.metrics and np.isfinite(r.predicted_loss)
    ]
    if len(chosen) < 3:
        raise ConfigError(f"a rank correlation needs three records with a prediction and {metric!r}, got {len(chosen)}")
    predicted = np.array([r.predicted_loss for r in chosen])
    measured = np.array([r.metrics[metric].value for r in chosen])
    sign = -1.0 if chosen[0].metrics[metric].higher_is_better else 1.0
    low, high = spearman_interval(predicted, sign * measured, resamples=resamples, seed=seed)
    budgets = tuple(r.budget for r in chosen)
    return PredictionInfo(
        predicted=predicted,
        measured=measured,
        methods=tuple(r.method for r in chosen),
        budgets=budgets,
        metric=metric,
        label=chosen[0].metrics[metric].name,
        spearman=spearman(predicted, sign * measured),
        low=low,
        high=high,
        within=_within(predicted, sign * measured, budgets),
    )


def plot_predicted_vs_measured(info: PredictionInfo, ax: Axes | None = None) -> Axes:
    """A mark per point, coloured by method, lines joining the points of a method; both axes log where the values allow
    it.

    Draws on ``ax`` (default: a new figure) and returns it.
    """
    ax = axes_or_new(ax, (5.4, 4.2))
    names = tuple(dict.fromkeys(info.methods))
    styles = series_styles(names)
    for name in names:
        mine = np.array([m == name for m in info.methods])
        order = np.argsort(info.predicted[mine])
        style = styles[name]
        ax.plot(
            info.predicted[mine][order],
            info.measured[mine][order],
            color=style.colour,
            marker=style.marker,
            markersize=style.size,
            markeredgecolor=ink() if style.marker != "x" else style.colour,
            markeredgewidth=0.5 if style.marker != "x" else 1.6,
            linewidth=0.7,
            alpha=0.9,
            label=name,
        )
    if (info.predicted > 0).all():
        ax.set_xscale("log")
    if info.metric in LOG_METRICS and (info.measured > 0).all():
        ax.set_yscale("log")
    ax.set_xlabel("predicted loss")
    ax.set_ylabel(METRIC_TITLES.get(info.metric, info.label))
    within = "" if info.within is None else f"; within one budget {info.within:.2f}"
    ax.set_title(f"Spearman {info.spearman:.2f} [{info.low:.2f}, {info.high:.2f}]{within}", loc="left", fontsize=9)
    ax.legend()
    return ax


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation of two vectors ``[N]``, equal values sharing their mean rank; 0 when one of them is constant."""
    a, b = _ranks(np.asarray(first, dtype=np.float64)), _ranks(np.asarray(second, dtype=np.float64))
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else 0.0


def spearman_interval(
    first: ArrayLike, second: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap, 95 %, of `spearman` over pairs drawn with replacement."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(a), size=(resamples, len(a)))
    values = [spearman(a[d], b[d]) for d in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _ranks(values: Floats) -> Floats:
    """Ranks from 0, ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = last - (counts + 1) / 2.0
    return mean[inverse]


def _within(predicted: Floats, measured: Floats, budgets: Sequence[str]) -> float | None:
    groups = [np.flatnonzero(np.array(budgets) == b) for b in sorted(set(budgets))]
    values = [spearman(predicted[g], measured[g]) for g in groups if len(g) >= 3]
    return float(np.mean(values)) if values else None
