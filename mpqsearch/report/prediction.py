"""How well the predicted loss orders what the samples show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mpqsearch.core import StudyRecord
from mpqsearch.errors import ConfigError
from mpqsearch.pareto import FULL_PRECISION_METHOD, LOG_METRICS
from mpqsearch.ranks import spearman, spearman_interval
from mpqsearch.report.figures import Drawing
from mpqsearch.report.labels import metric_text
from mpqsearch.report.style import axes_or_new, legend_below, series_styles

Floats = NDArray[np.float64]


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
    metric: str
    label: str
    spearman: float
    low: float
    high: float
    within: float | None


def prediction_info(records: Iterable[StudyRecord], metric: str = "paired_mse") -> PredictionInfo:
    """Compare predictions with ``metric`` over the quantized records that have both.

    For a metric where higher is better the sign of the correlation is turned, so that 1 always means the right order.
    Raises `ConfigError` for fewer than three such records.
    """
    points = predicted_points(records, metric)
    if len(points) < 3:
        raise ConfigError(f"a rank correlation needs three records with a prediction and {metric!r}, got {len(points)}")
    predicted = np.array([r.predicted_loss for r in points])
    measured = np.array([r.metrics[metric].value for r in points])
    first = points[0].metrics[metric]
    worse = -measured if first.higher_is_better else measured
    low, high = spearman_interval(predicted, worse)
    return PredictionInfo(
        predicted=predicted,
        measured=measured,
        methods=tuple(r.method for r in points),
        metric=metric,
        label=first.name,
        spearman=spearman(predicted, worse),
        low=low,
        high=high,
        within=_within(predicted, worse, [r.budget for r in points]),
    )


def predicted_points(records: Iterable[StudyRecord], metric: str) -> list[StudyRecord]:
    """The quantized records that have the metric and a finite prediction."""
    quantized = (r for r in records if r.method != FULL_PRECISION_METHOD)
    return [r for r in quantized if metric in r.metrics and np.isfinite(r.predicted_loss)]


def _within(predicted: Floats, measured: Floats, budgets: Sequence[str]) -> float | None:
    groups = [np.flatnonzero(np.array(budgets) == b) for b in sorted(set(budgets))]
    values = [spearman(predicted[g], measured[g]) for g in groups]
    defined = [v for v in values if np.isfinite(v)]
    return float(np.mean(defined)) if defined else None


def plot_predicted_vs_measured(info: PredictionInfo, ax: Axes | None = None) -> Axes:
    """A mark per point, coloured by method, lines joining the points of a method; both axes log where the values allow
    it.

    Draws on ``ax`` (default: a new figure) and returns it.
    """
    ax = axes_or_new(ax, (5.4, 4.2))
    names = tuple(dict.fromkeys(info.methods))
    styles = series_styles(names)
    for name in names:
        points = np.flatnonzero(np.array(info.methods) == name)
        points = points[np.argsort(info.predicted[points])]
        style = styles[name].points
        ax.plot(info.predicted[points], info.measured[points], linewidth=0.7, alpha=0.9, label=name, **style)
    if (info.predicted > 0).all():
        ax.set_xscale("log")
    if info.metric in LOG_METRICS and (info.measured > 0).all():
        ax.set_yscale("log")
    ax.set_xlabel("predicted loss")
    ax.set_ylabel(metric_text(info.metric).title)
    within = "" if info.within is None else f"; within one budget {info.within:.2f}"
    ax.set_title(f"Spearman {info.spearman:.2f} [{info.low:.2f}, {info.high:.2f}]{within}", loc="left", fontsize=9)
    legend_below(ax)
    return ax


def prediction_drawings(records: Sequence[StudyRecord]) -> list[Drawing]:
    """Predictions against the first metric that three points or more have: squared error, Fréchet distance or PSNR."""
    metrics = [m for m in ("paired_mse", "fd_fp", "paired_psnr") if len(predicted_points(records, m)) >= 3]
    if not metrics:
        return []
    info = prediction_info(records, metrics[0])
    within = "" if info.within is None else f" Within one budget, on average: {info.within:.2f}."
    words = (
        f"rank correlation {info.spearman:.2f}, 95 % bootstrap interval {info.low:.2f} to {info.high:.2f}, "
        f"{len(info.methods)} points"
    )
    return [
        Drawing(
            key="predicted_vs_measured",
            section="prediction",
            title="Predicted loss against measured",
            caption=f"Spearman {words}.{within} Points of different budgets are ordered by their bits alone, so the "
            "second is the harder test.",
            alt=f"Scatter plot of predicted loss against {info.label}: {words}.",
            draw=lambda: plot_predicted_vs_measured(info),
        )
    ]
