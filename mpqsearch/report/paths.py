"""The whole trade-off of a program: least predicted loss against cost, every budget at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from mpqsearch.errors import ConfigError
from mpqsearch.report.labels import BITS_TITLE
from mpqsearch.report.style import axes_or_new, series_styles

DRAWN_DECADES = 6
"""Decades of the loss below its largest that are drawn: at the far end the last layers reach a loss of nothing."""


def plot_path(paths: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Draw what ``paths/<method>.json`` holds, loss against cost, on ``ax`` (default: a new figure) and return the
    axes: a line a method, a marker a budget asked for. Raises `ConfigError` without any path."""
    if not paths:
        raise ConfigError("there is no path to draw: no method of the study solves an integer program.")
    ax, unit = axes_or_new(ax, (5.4, 3.7)), paths[0]["unit"]
    size = unit == "bits stored"
    losses = [point["loss"] for path in paths for point in path["points"] if point["loss"] > 0]
    if losses:
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(max(min(losses) * 0.7, max(losses) * 10.0**-DRAWN_DECADES), max(losses) * 1.5)
    styles = series_styles([path["method"]["name"] for path in paths])
    for path, (name, style) in zip(paths, styles.items(), strict=True):
        scale = path["n_parameters"] if size else 1
        asked = [answer for answer in path["budgets"] if "loss" in answer]
        line, marks = (
            ([p["cost"] / scale for p in points], [p["loss"] for p in points]) for points in (path["points"], asked)
        )
        ax.plot(*line, color=style.colour, linewidth=1.6, label=name, zorder=2)
        ax.plot(*marks, linestyle="", zorder=3, **style.points)
    ax.set_xlabel(BITS_TITLE if size else f"{unit} of one forward pass")
    ax.set_ylabel("predicted loss")
    ax.set_title("Least predicted loss at every budget; markers: budgets asked for", loc="left", fontsize=8.5)
    ax.legend(title="method")
    return ax
