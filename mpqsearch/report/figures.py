"""Figures as files and as data: PNG and SVG from the same drawing, byte for byte the same when drawn again."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpqsearch.artifacts import atomic_write
from mpqsearch.report.style import STYLE

DPI = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One figure of a report with the words that go with it.

    ``key`` is its file name and anchor, ``section`` the part of the page, ``alt`` what it shows in words, ``draw`` what
    draws it on a new figure. Those not ``in_page`` are files only.
    """

    key: str
    section: str
    title: str
    caption: str
    alt: str
    draw: Callable[[], Axes]
    in_page: bool = True


def render(draw: Callable[[], Axes]) -> Figure:
    """The figure that ``draw`` makes in the style of the report. Nothing global stays changed."""
    with rc_context(STYLE):
        figure = draw().figure
    assert isinstance(figure, Figure), "a new figure, not a part of one"
    return figure


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write ``<stem>.png`` and ``<stem>.svg`` atomically; returns both paths."""
    png, svg = (stem.parent / f"{stem.name}.{kind}" for kind in ("png", "svg"))
    figure.dpi = DPI
    # Not by savefig, which draws twice a file: once for nothing but the layout.
    with rc_context(STYLE), atomic_write(png) as handle:
        FigureCanvasAgg(figure).print_png(handle, metadata={"Software": None})
    figure.set_layout_engine("none")  # all is in its place; finding the places again takes as long as drawing
    with rc_context(STYLE), atomic_write(svg) as handle:
        FigureCanvasSVG(figure).print_svg(handle, metadata={"Date": None})
    return png, svg


def places(axes: Axes, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where data points ``[N, 2]`` lie in the figure: ``[N, 2]`` shares of its width and height, from the top left."""
    box = axes.figure.bbox
    share: NDArray[np.float64] = axes.transData.transform(points) / [box.width, box.height]
    share[:, 1] = 1 - share[:, 1]
    return share


def data_uri(content: bytes, kind: str) -> str:
    """``data:`` address of an image, ``kind`` being ``png``, ``jpeg`` or ``svg+xml``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
