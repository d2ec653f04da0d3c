"""The figure that a study is run for: a metric against stored bits, one line per method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mpqsearch.core import MetricValue, StudyRecord
from mpqsearch.errors import UnknownNameError
from mpqsearch.pareto import FULL_PRECISION_METHOD, ParetoFront
from mpqsearch.report.labels import BITS_TITLE, metric_text
from mpqsearch.report.style import (
    INK,
    MUTED,
    SeriesStyle,
    axes_or_new,
    legend_below,
    plain_log_ticks,
    series_styles,
    widen_x,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSeries:
    """One method: ``bits``, ``value``, ``low`` and ``high`` are ``[N]`` in order of bits; ``hypervolume`` is a share,
    0..1."""

    name: str
    bits: Floats
    value: Floats
    low: Floats
    high: Floats
    hypervolume: float

    @property
    def legend(self) -> str:
        """The name, with the hypervolume of a method that was measured at several sizes: of one it says nothing."""
        return self.name if len(self.bits) < 2 else f"{self.name} ({self.hypervolume:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontInfo:
    """What `plot_front` draws.

    ``label`` is the label that the values carry, ``front`` is ``[K, 2]`` of bits and value, ``chosen`` the bits and
    value of the point that gets a ring.
    """

    metric: str
    label: str
    scale: Literal["log", "symlog", "linear"]
    higher_is_better: bool
    series: tuple[FrontSeries, ...]
    front: Floats
    full_precision: MetricValue | None
    spread: str
    chosen: tuple[float, float] | None = None


def front_info(records: Iterable[StudyRecord], metric: str = "fd_fp", chosen: StudyRecord | None = None) -> FrontInfo:
    """The series of one metric. Raises `UnknownNameError` when no quantized record has the metric."""
    records = list(records)
    pareto = ParetoFront.from_records(records, metric)
    if not pareto.records:
        measured = {m for r in records if r.method != FULL_PRECISION_METHOD for m in r.metrics}
        raise UnknownNameError("metric", metric, measured, "No quantized record has it.")
    names = dict.fromkeys(pareto.method_name(r) for r in records if r in pareto.records)
    full, first = pareto.full_precision, pareto.records[0].metrics[metric]
    ring = chosen if chosen is not None and metric in chosen.metrics else None
    return FrontInfo(
        metric=metric,
        label=first.name,
        scale="log" if pareto.log else "symlog" if metric.startswith(("kid", "cmmd")) else "linear",
        higher_is_better=pareto.higher_is_better,
        series=tuple(_series(pareto, name) for name in names),
        front=np.array([_point(r, metric) for r in pareto.front], dtype=np.float64).reshape(-1, 2),
        full_precision=None if full is None else full.metrics.get(metric),
        spread=first.spread,
        chosen=None if ring is None else _point(ring, metric),
    )


def _point(record: StudyRecord, metric: str) -> tuple[float, float]:
    return record.average_bits, record.metrics[metric].value


def _series(pareto: ParetoFront, name: str) -> FrontSeries:
    records = pareto.of_method(name)
    values = [r.metrics[pareto.metric] for r in records]
    return FrontSeries(
        name=name,
        bits=np.array([r.average_bits for r in records]),
        value=np.array([v.value for v in values]),
        low=np.array([v.low for v in values]),
        high=np.array([v.high for v in values]),
        hypervolume=pareto.hypervolume(name),
    )


def plot_front(info: FrontInfo, ax: Axes | None = None) -> Axes:
    """Draw the front on ``ax`` (default: a new figure) and return the axes.

    A line and a marker per method, with its hypervolume in the legend; a bar from the low to the high end of each
    interval. The axis is logarithmic for distances and errors, and linear around zero for kernel distances, whose
    estimates may be negative.
    """
    ax = axes_or_new(ax, (5.4, 4.3))
    _scale(ax, info)
    if len(info.front):
        ax.step(*info.front.T, where="post", color=MUTED, linewidth=5, alpha=0.22, zorder=1)
    styles = series_styles([s.name for s in info.series])
    for series in info.series:
        _draw_series(ax, series, styles[series.name])
    _draw_full_precision(ax, info)
    if info.chosen is not None:
        ring: dict[str, Any] = {
            "markersize": 12,
            "markerfacecolor": "none",
            "markeredgecolor": INK,
            "markeredgewidth": 1.2,
        }
        ax.plot(*info.chosen, "o", label="chosen", zorder=4, **ring)
    widen_x(ax)
    ax.set_xlabel(BITS_TITLE)
    ax.set_ylabel(metric_text(info.metric).title)
    better = "higher" if info.higher_is_better else "lower"
    ax.set_title(f"{info.label}\n{better} is better; bars: 95 %, {info.spread}", loc="left", fontsize=8.5)
    legend_below(ax, title="method (hypervolume, 0 to 1: more is better)")
    return ax


def _scale(ax: Axes, info: FrontInfo) -> None:
    """The scale of the y axis."""
    if info.scale == "log":
        ax.set_yscale("log", nonpositive="clip")
        plain_log_ticks(ax)
    if info.scale == "symlog":
        largest = max(float(np.abs(s.value).max()) for s in info.series)
        # A power of ten, so that the ticks beside 0 are its ends.
        ax.set_yscale("symlog", linthresh=10.0 ** np.ceil(np.log10(max(largest * 1e-2, 1e-12))))


def _draw_series(ax: Axes, series: FrontSeries, style: SeriesStyle) -> None:
    ax.plot(
        series.bits, series.value, linestyle=style.line, linewidth=1.6, label=series.legend, zorder=3, **style.points
    )
    shown = np.isfinite(series.low) & np.isfinite(series.high)
    ax.errorbar(
        series.bits[shown],
        series.value[shown],
        np.abs(np.stack([series.low, series.high]) - series.value)[:, shown],
        fmt="none",
        ecolor=style.colour,
        elinewidth=1.2,
        capsize=2.5,
        alpha=0.8,
        zorder=2,
    )


def _draw_full_precision(ax: Axes, info: FrontInfo) -> None:
    full = info.full_precision
    if full is None or (info.scale == "log" and full.value <= 0):
        return
    ax.axhline(full.value, color=INK, linewidth=1.1, linestyle="--", label="full precision", zorder=1)
    if np.isfinite(full.low) and np.isfinite(full.high) and (info.scale != "log" or full.low > 0):
        ax.axhspan(full.low, full.high, color=INK, alpha=0.08, linewidth=0, zorder=0)
