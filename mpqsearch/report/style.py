"""How every figure looks: two themes, and one colour and marker per method that survive grey print and colour
blindness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette without the yellow, which vanishes on white, and the black, which vanishes at night."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
_GREY = "#8A8A8A"


@dataclass(frozen=True, slots=True)
class SeriesStyle:
    """Colour, marker and line of one method; two methods never share both colour and marker."""

    colour: str
    marker: str
    line: str = "-"
    size: float = 6.0


_KNOWN = {"uniform": SeriesStyle(_GREY, "*", "-", 10.0), "random": SeriesStyle(_GREY, "x", ":", 6.0)}

_BASE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.hashsalt": "mpqsearch",  # equal figures are equal files
    "svg.fonttype": "path",  # a reader without our font sees the same figure
}

_THEME_COLOURS = {
    "light": {"page": "#FEFEFE", "ink": "#1B1F24", "edge": "#57606A", "tick": "#3B434B", "grid": "#E3E6E9"},
    "dark": {"page": "#15181C", "ink": "#E6E9ED", "edge": "#8B949E", "tick": "#C3C9D0", "grid": "#2C3238"},
}
"""No two are equal, nor equal to a colour of the palette, so that `darkened` can tell them apart."""


def _theme(name: str) -> dict[str, Any]:
    colours = _THEME_COLOURS[name]
    pages = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), colours["page"])
    texts = dict.fromkeys(("text.color", "axes.labelcolor"), colours["ink"])
    ticks = dict.fromkeys(("xtick.color", "ytick.color"), colours["tick"])
    return {**_BASE, **pages, **texts, **ticks, "axes.edgecolor": colours["edge"], "grid.color": colours["grid"]}


THEMES: dict[str, dict[str, Any]] = {name: _theme(name) for name in _THEME_COLOURS}
"""Settings for ``matplotlib.rc_context``."""


def series_styles(names: Sequence[str]) -> dict[str, SeriesStyle]:
    """A style for each of ``names``; the baselines are grey, the others take colours in the order given."""
    others = [n for n in names if _base_name(n) not in _KNOWN]
    styles = {n: SeriesStyle(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(others)}
    return {n: styles.get(n) or _KNOWN[_base_name(n)] for n in names}


def darkened(svg: bytes) -> bytes:
    """A figure drawn in the light theme, in the colours of the dark one; drawing it again would take a hundred times
    longer."""
    for light, dark in zip(_THEME_COLOURS["light"].values(), _THEME_COLOURS["dark"].values(), strict=True):
        svg = svg.replace(light.lower().encode(), dark.lower().encode())
    return svg


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """``ax``, or the axes of a new figure of ``size`` inches that pyplot does not know, so nothing has to be closed."""
    return Figure(figsize=size, layout="constrained").subplots() if ax is None else ax


def widen_x(ax: Axes, share: float = 0.05) -> None:
    """Let the x axis span at least ``share`` of the value at its middle, so that sizes equal but for a few bytes look
    equal."""
    low, high = ax.get_xlim()
    middle, half = (low + high) / 2, share * abs(low + high) / 4
    if high - low < 2 * half:
        ax.set_xlim(middle - half, middle + half)


def ink() -> str:
    """The colour of text in the present theme."""
    return str(rcParams["text.color"])


def muted() -> str:
    """A colour between text and background in the present theme."""
    return str(rcParams["axes.edgecolor"])


def _base_name(name: str) -> str:
    return name.split(" (", maxsplit=1)[0]
