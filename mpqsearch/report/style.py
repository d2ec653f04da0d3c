"""How every figure looks: one colour and marker per method that survive grey print and colour blindness, and the dark
twin of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette without the yellow, which vanishes on white, and the black, which vanishes at night."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")

PAGE, INK, MUTED, TICK, GRID = "#FEFEFE", "#1B1F24", "#57606A", "#3B434B", "#E3E6E9"
"""Background, text, lesser lines, tick labels and grid lines. No two are equal, nor equal to a colour of the palette,
so that `darkened` can tell them apart."""

DARK = {PAGE: "#15181C", INK: "#E6E9ED", MUTED: "#8B949E", TICK: "#C3C9D0", GRID: "#2C3238"}
"""What these colours become in the dark."""

_GREY = "#8A8A8A"

STYLE: dict[str, Any] = {
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
    "legend.title_fontsize": 8.0,
    "svg.hashsalt": "mpqsearch",  # equal figures are equal files
    "svg.fonttype": "path",  # a reader without our font sees the same figure
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAGE),
    **dict.fromkeys(("text.color", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), TICK),
    "axes.edgecolor": MUTED,
    "grid.color": GRID,
}
"""Settings for ``matplotlib.rc_context``."""


@dataclass(frozen=True, slots=True)
class SeriesStyle:
    """Colour, marker and line of one method; two methods never share both colour and marker."""

    colour: str
    marker: str
    line: str = "-"
    size: float = 6.0

    @property
    def points(self) -> dict[str, Any]:
        """Keywords of `matplotlib.axes.Axes.plot` for its markers: a thin edge, except for crosses, which are all
        edge."""
        cross = self.marker == "x"
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": self.size,
            "markeredgecolor": self.colour if cross else INK,
            "markeredgewidth": 1.6 if cross else 0.5,
        }


_BASELINES = {"uniform": SeriesStyle(_GREY, "*", "-", 10.0), "random": SeriesStyle(_GREY, "x", ":", 6.0)}


def series_styles(names: Sequence[str]) -> dict[str, SeriesStyle]:
    """A style for each of ``names``; the baselines are grey, the others take colours in the order given."""
    baselines = {n: _BASELINES.get(n.split(" (", maxsplit=1)[0]) for n in names}
    others = [n for n, style in baselines.items() if style is None]
    styles = {n: SeriesStyle(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(others)}
    return {n: baselines[n] or styles[n] for n in names}


def darkened(svg: bytes) -> bytes:
    """A figure in the colours of the dark page; drawing it again would take a hundred times longer."""
    for light, dark in DARK.items():
        svg = svg.replace(light.lower().encode(), dark.lower().encode())
    return svg


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """``ax``, or the axes of a new figure of ``size`` inches that pyplot does not know, so nothing has to be closed.

    A compressed layout is a constrained one that keeps the labels of pictures, whose shape is fixed, in the figure.
    """
    return ShownFigure(figsize=size, layout="compressed").subplots() if ax is None else ax


class ShownFigure(Figure):
    """A figure that a notebook shows as a picture, whether pyplot was imported or not."""

    def _repr_png_(self) -> bytes:
        from io import BytesIO

        buffer = BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")  # in the fonts of the notebook, which may be larger
        return buffer.getvalue()


def legend_below(ax: Axes, columns: int = 3, **options: Any) -> None:
    """A legend under the axes, where it hides no point; in fewer columns where its texts are long."""
    longest = max((len(text) for text in ax.get_legend_handles_labels()[1]), default=0)
    fitting = int(17 * ax.figure.get_figwidth() / (longest + 6)) if isinstance(ax.figure, Figure) else columns
    anchor = (0.5, -0.16)
    ax.legend(loc="upper center", bbox_to_anchor=anchor, ncols=max(1, min(columns, fitting)), **options)


def plain_log_ticks(ax: Axes) -> None:
    """Numbers on a logarithmic y axis as people write them; between powers of ten where there are few of them."""
    ax.yaxis.set_minor_formatter(_Plain(minor_thresholds=(2, 0.5)))
    ax.yaxis.set_major_formatter("{x:g}")


class _Plain(LogFormatter):
    """Labels where `LogFormatter` has some, 0.02 in place of 2e-02."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def widen_x(ax: Axes, share: float = 0.05) -> None:
    """Let the x axis span at least ``share`` of the value at its middle, so that sizes equal but for a few bytes look
    equal."""
    low, high = ax.get_xlim()
    middle, half = (low + high) / 2, share * abs(low + high) / 4
    if high - low < 2 * half:
        ax.set_xlim(middle - half, middle + half)
