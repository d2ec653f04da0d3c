"""The whole trade-off of a program: least predicted loss against stored bits, every budget at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mpqsearch.errors import ConfigError
from mpqsearch.report.style import axes_or_new, ink, series_styles

Floats = NDArray[np.float64]

DRAWN_VERTICES = 600
"""Vertices of a path that are drawn; more cannot be told apart, and would make the SVG heavy."""

DRAWN_DECADES = 6
"""Decades of the loss below its largest that are drawn: at the far end the last layers reach a loss of nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSeries:
    """The path of one method.

    Attributes:
        name: The method.
        cost: ``[N]`` cost of the vertices, increasing, in the unit of `PathInfo.cost`.
        loss: ``[N]`` loss of the vertices.
        asked_cost: ``[M]`` costs of the maps at the budgets that were asked for.
        asked_loss: ``[M]`` their losses.
        asked_bound: ``[M]`` certified lower bounds at these budgets.
    """

    name: str
    cost: Floats
    loss: Floats
    asked_cost: Floats
    asked_loss: Floats
    asked_bound: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class PathInfo:
    """What `plot_path` draws; ``cost`` is the label of the cost axis."""

    cost: str
    series: tuple[PathSeries, ...]


def path_info(series: Iterable[PathSeries], cost: str = "stored bits per parameter, everything counted") -> PathInfo:
    """Series thinned to what can be seen. Raises `ConfigError` without any series."""
    thinned = tuple(_thinned(one) for one in series)
    if not thinned:
        raise ConfigError("there is no path to draw: no method of the study solves an integer program.")
    return PathInfo(cost=cost, series=thinned)


def plot_path(info: PathInfo, ax: Axes | None = None) -> Axes:
    """Draw loss against cost on ``ax`` (default: a new figure) and return the axes: a line a method, a marker a budget
    asked for."""
    ax = axes_or_new(ax, (5.4, 3.7))
    positive = [one.loss[one.loss > 0] for one in info.series]
    if any(losses.size for losses in positive):
        ax.set_yscale("log", nonpositive="mask")
        top = max(float(losses.max()) for losses in positive if losses.size)
        bottom = min(float(losses.min()) for losses in positive if losses.size)
        ax.set_ylim(max(bottom * 0.7, top * 10.0**-DRAWN_DECADES), top * 1.5)
    styles = series_styles([one.name for one in info.series])
    for one in info.series:
        style = styles[one.name]
        ax.plot(one.cost, one.loss, color=style.colour, linewidth=1.6, label=one.name, zorder=2)
        ax.plot(
            one.asked_cost,
            one.asked_loss,
            linestyle="",
            marker=style.marker,
            markersize=style.size,
            color=style.colour,
            markeredgecolor=ink(),
            markeredgewidth=0.5,
            zorder=3,
        )
    ax.set_xlabel(info.cost)
    ax.set_ylabel("predicted loss")
    ax.set_title("Least predicted loss at every budget; markers: budgets asked for", loc="left", fontsize=8.5)
    ax.legend(title="method")
    return ax


def _thinned(series: PathSeries) -> PathSeries:
    count = len(series.cost)
    if count <= DRAWN_VERTICES:
        return series
    # Evenly along the cost, not along the vertices: most of these crowd at one end.
    wanted = np.linspace(series.cost[0], series.cost[-1], DRAWN_VERTICES)
    kept = np.unique(np.concatenate([np.searchsorted(series.cost, wanted).clip(0, count - 1), [0, count - 1]]))
    return PathSeries(
        name=series.name,
        cost=series.cost[kept],
        loss=series.loss[kept],
        asked_cost=series.asked_cost,
        asked_loss=series.asked_loss,
        asked_bound=series.asked_bound,
    )
