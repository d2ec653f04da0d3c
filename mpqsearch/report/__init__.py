"""Tables, figures and the report.

    build_report(folder, ReportContent(title=..., records=..., table=..., ...))      everything, with report.html
    save_figure(render(lambda: plot_front(front_info(records))), folder / "front")   one figure as PNG and SVG

Computing and drawing are two functions: ``*_info`` and ``plot_*(info, ax=None) -> Axes``. Needs no torch. Figures are
plain ``matplotlib.figure.Figure`` objects that pyplot does not know; nothing has to be closed.
"""

from mpqsearch.report.content import ReportContent
from mpqsearch.report.figures import render, save_figure
from mpqsearch.report.grids import SampleGrid, plot_samples, sample_grid
from mpqsearch.report.html import build_report
from mpqsearch.report.paths import plot_path
from mpqsearch.report.sensitivity import (
    layer_losses,
    plot_sensitivity,
)

__all__ = [
    "ReportContent",
    "SampleGrid",
    "build_report",
    "layer_losses",
    "plot_path",
    "plot_samples",
    "plot_sensitivity",
    "render",
    "sample_grid",
    "save_figure",
]
