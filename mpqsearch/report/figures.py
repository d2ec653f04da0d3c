"""Figures as files and as data: PNG and SVG from the same drawing, byte for byte the same when drawn again."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpqsearch.artifacts import atomic_write
from mpqsearch.report.style import THEMES

DPI = 150

Draw = Callable[[], Axes | Figure]
"""Draws on a new figure and returns it or its axes."""


def render(draw: Draw, theme: str = "light") -> Figure:
    """Call ``draw`` under a theme. The theme is taken back at once; nothing global stays changed."""
    with rc_context(THEMES[theme]):
        drawn = draw()
    return root_figure(drawn)


def root_figure(drawn: Axes | Figure) -> Figure:
    """The figure that axes are on, also when they are on a part of it."""
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    while not isinstance(figure, Figure):
        figure = figure.figure
    return figure


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as ``png`` or ``svg``, without a date."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "mpqsearch", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def save_figure(figure: Axes | Figure, stem: Path) -> tuple[Path, Path]:
    """Write ``<stem>.png`` and ``<stem>.svg`` atomically; returns both paths."""
    whole = root_figure(figure)
    paths = (stem.parent / f"{stem.name}.png", stem.parent / f"{stem.name}.svg")
    engine = whole.get_layout_engine()
    for path, kind in zip(paths, ("png", "svg"), strict=True):
        write_bytes(path, figure_bytes(whole, kind))
        whole.set_layout_engine(
            "none"
        )  # the places were found for the first file; finding them again takes as long as drawing
    whole.set_layout_engine(engine)
    return paths


def places(axes: Axes, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where data points ``[N, 2]`` lie in the figure: ``[N, 2]`` shares of its width and height, from the top left."""
    figure = root_figure(axes)
    figure.draw_without_rendering()
    pixels = axes.transData.transform(points)
    share: NDArray[np.float64] = pixels / [figure.bbox.width, figure.bbox.height]
    share[:, 1] = 1 - share[:, 1]
    return share


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically."""
    with atomic_write(path) as handle:
        handle.write(content)


def data_uri(content: bytes, kind: str) -> str:
    """``data:`` address of an image, ``kind`` being ``png`` or ``svg``."""
    mime = "image/svg+xml" if kind == "svg" else f"image/{kind}"
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
