"""The figure that a study is run for: a metric against stored bits, one line per method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from mpqsearch.core import MetricValue, StudyRecord
from mpqsearch.errors import UnknownNameError
from mpqsearch.pareto import FULL_PRECISION_METHOD, ParetoFront
from mpqsearch.report.style import SeriesStyle, axes_or_new, ink, muted, series_styles, widen_x

METRIC_TITLES = {
    "fd_data": "Fréchet distance to data",
    "fd_fp": "Fréchet distance to full precision",
    "kid_data": "Kernel distance to data",
    "kid_fp": "Kernel distance to full precision",
    "paired_psnr": "PSNR to full precision, same noise (dB)",
    "paired_mse": "Squared error to full precision, same noise",
    "class_accuracy": "Share of samples in the class that was asked for",
}
"""What a metric is called on an axis."""

COST_TITLES = {
    "average_bits": "stored bits per parameter, everything counted",
    "size_bytes": "stored size in kB, everything counted",
}

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSeries:
    """One method: ``cost``, ``value``, ``low`` and ``high`` are ``[N]`` in order of cost; ``hypervolume`` is a share,
    0..1."""

    name: str
    cost: Floats
    value: Floats
    low: Floats
    high: Floats
    hypervolume: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontInfo:
    """What `plot_front` draws.

    ``label`` is the label that the values carry, ``front`` is ``[K, 2]`` of cost and value, ``chosen`` the cost and
    value of the point that gets a ring.
    """

    metric: str
    label: str
    cost: str
    log: bool
    higher_is_better: bool
    series: tuple[FrontSeries, ...]
    front: Floats
    full_precision: MetricValue | None
    spread: str
    chosen: tuple[float, float] | None = None


def front_info(
    records: Iterable[StudyRecord], metric: str = "fd_fp", cost: str = "average_bits", chosen: StudyRecord | None = None
) -> FrontInfo:
    """The series of one metric. Sizes are in kB. Raises `UnknownNameError` when no quantized record has the metric."""
    every = list(records)
    pareto = ParetoFront.from_records(every, metric, cost)
    if not pareto.records:
        known = {m for r in every if r.method != FULL_PRECISION_METHOD for m in r.metrics}
        raise UnknownNameError("metric", metric, known, "No quantized record has it.")
    order = list(dict.fromkeys(pareto.method_name(r) for r in every if r in pareto.records))
    first = pareto.records[0].metrics[metric]
    best = pareto.front
    return FrontInfo(
        metric=metric,
        label=first.name,
        cost=cost,
        log=pareto.log,
        higher_is_better=pareto.higher_is_better,
        series=tuple(_series(pareto, name) for name in order),
        front=np.array([[_cost(r, cost), r.metrics[metric].value] for r in best], dtype=np.float64).reshape(-1, 2),
        full_precision=None if pareto.full_precision is None else pareto.full_precision.metrics.get(metric),
        spread=first.spread,
        chosen=(_cost(chosen, cost), chosen.metrics[metric].value)
        if chosen is not None and metric in chosen.metrics
        else None,
    )


def plot_front(info: FrontInfo, ax: Axes | None = None) -> Axes:
    """Draw the front on ``ax`` (default: a new figure) and return the axes.

    A log axis for distances and errors; a line and a marker per method; a bar from the low to the high end of the
    spread, drawn where it is, which for a bootstrap of a Fréchet distance may lie above the value; the share of
    hypervolume in the legend.
    """
    ax = axes_or_new(ax, (5.4, 4.3))
    if info.log:
        ax.set_yscale("log", nonpositive="clip")
        _plain_ticks(ax, info)
    if len(info.front):
        ax.step(*info.front.T, where="post", color=muted(), linewidth=5, alpha=0.22, zorder=1)
    styles = series_styles([s.name for s in info.series])
    for series in info.series:
        _draw_series(ax, series, styles[series.name])
    _draw_full_precision(ax, info)
    if info.chosen is not None:
        ax.plot(
            *info.chosen,
            "o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=ink(),
            markeredgewidth=1.2,
            label="chosen",
            zorder=4,
        )
    widen_x(ax)
    ax.set_xlabel(COST_TITLES[info.cost])
    ax.set_ylabel(METRIC_TITLES.get(info.metric, info.label))
    better = "higher" if info.higher_is_better else "lower"
    ax.set_title(f"{info.label}  ({better} is better; bars: 95 %, {info.spread})", loc="left", fontsize=8.5)
    ax.legend(title="method (hypervolume)", title_fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    return ax


def _series(pareto: ParetoFront, name: str) -> FrontSeries:
    records = pareto.of_method(name)
    values = [r.metrics[pareto.metric] for r in records]
    return FrontSeries(
        name=name,
        cost=np.array([_cost(r, pareto.cost) for r in records]),
        value=np.array([v.value for v in values]),
        low=np.array([v.low for v in values]),
        high=np.array([v.high for v in values]),
        hypervolume=pareto.hypervolume(name),
    )


def _cost(record: StudyRecord, cost: str) -> float:
    return record.average_bits if cost == "average_bits" else record.size_bytes / 1000


def _draw_series(ax: Axes, series: FrontSeries, style: SeriesStyle) -> None:
    ax.plot(
        series.cost,
        series.value,
        color=style.colour,
        linestyle=style.line,
        marker=style.marker,
        markersize=style.size,
        markeredgecolor=ink() if style.marker != "x" else style.colour,
        markeredgewidth=0.5 if style.marker != "x" else 1.6,
        linewidth=1.6,
        label=f"{series.name} ({series.hypervolume:.2f})",
        zorder=3,
    )
    shown = np.isfinite(series.low) & np.isfinite(series.high)
    ax.vlines(
        series.cost[shown],
        series.low[shown],
        series.high[shown],
        color=style.colour,
        linewidth=1.2,
        alpha=0.8,
        zorder=2,
    )
    for ends in (series.low, series.high):
        ax.plot(
            series.cost[shown],
            ends[shown],
            linestyle="",
            marker="_",
            markersize=5,
            color=style.colour,
            alpha=0.8,
            zorder=2,
        )


def _draw_full_precision(ax: Axes, info: FrontInfo) -> None:
    full = info.full_precision
    if full is None or (info.log and full.value <= 0):
        return
    ax.axhline(full.value, color=ink(), linewidth=1.1, linestyle="--", label="full precision", zorder=1)
    if np.isfinite(full.low) and np.isfinite(full.high) and (not info.log or full.low > 0):
        ax.axhspan(full.low, full.high, color=ink(), alpha=0.08, linewidth=0, zorder=0)


def _plain_ticks(ax: Axes, info: FrontInfo) -> None:
    """Numbers as people write them, on the minor ticks too when the axis spans less than two decades: else it would
    have one."""
    ax.yaxis.set_major_formatter(FuncFormatter(_plain_number))
    values = np.concatenate([s.value for s in info.series])
    narrow = len(values) > 0 and values.max() / values.min() < 100
    ax.yaxis.set_minor_formatter(FuncFormatter(_leading_two_or_five) if narrow else NullFormatter())


def _plain_number(value: float, _: object = None) -> str:
    return f"{value:g}" if 1e-4 <= value < 1e6 else f"{value:.0e}"


def _leading_two_or_five(value: float, _: object = None) -> str:
    return _plain_number(value) if f"{value:e}"[0] in "25" else ""
