"""The whole trade-off of a program: least predicted loss against cost, every budget at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mpqsearch.errors import ConfigError
from mpqsearch.report.labels import BITS_TITLE
from mpqsearch.report.style import axes_or_new, series_styles

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
        cost: ``[N]`` cost of the vertices, increasing.
        loss: ``[N]`` loss of the vertices.
        asked_cost: ``[M]`` costs of the maps at the budgets that were asked for.
        asked_loss: ``[M]`` their losses.
    """

    name: str
    cost: Floats
    loss: Floats
    asked_cost: Floats
    asked_loss: Floats


def plot_path(series: Sequence[PathSeries], cost_title: str = BITS_TITLE, ax: Axes | None = None) -> Axes:
    """Draw loss against cost on ``ax`` (default: a new figure) and return the axes: a line a method, a marker a budget
    asked for. Raises `ConfigError` without any series."""
    if not series:
        raise ConfigError("there is no path to draw: no method of the study solves an integer program.")
    ax = axes_or_new(ax, (5.4, 3.7))
    losses = np.concatenate([s.loss[s.loss > 0] for s in series])
    if losses.size:
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(max(losses.min() * 0.7, losses.max() * 10.0**-DRAWN_DECADES), losses.max() * 1.5)
    styles = series_styles([s.name for s in series])
    for s in series:
        style, drawn = styles[s.name], _drawn_vertices(s.cost)
        ax.plot(s.cost[drawn], s.loss[drawn], color=style.colour, linewidth=1.6, label=s.name, zorder=2)
        ax.plot(s.asked_cost, s.asked_loss, linestyle="", zorder=3, **style.points)
    ax.set_xlabel(cost_title)
    ax.set_ylabel("predicted loss")
    ax.set_title("Least predicted loss at every budget; markers: budgets asked for", loc="left", fontsize=8.5)
    ax.legend(title="method")
    return ax


def _drawn_vertices(cost: Floats) -> NDArray[np.int64]:
    """At most about `DRAWN_VERTICES`, evenly along the cost: most vertices crowd at one end."""
    count = len(cost)
    if count <= DRAWN_VERTICES:
        return np.arange(count)
    wanted = np.searchsorted(cost, np.linspace(cost[0], cost[-1], DRAWN_VERTICES)).clip(0, count - 1)
    return np.unique(np.concatenate([wanted, [0, count - 1]]))
