"""Tables, figures and the report.

    build_report(folder, ReportContent(title=..., records=..., table=..., ...))      everything, with report.html
    save_figure(render(lambda: plot_front(front_info(records))), folder / "front")   one figure as PNG and SVG

Computing and drawing are two functions: ``*_info`` and ``plot_*(info, ax=None) -> Axes``. Needs no torch. Figures are
plain ``matplotlib.figure.Figure`` objects that pyplot does not know; nothing has to be closed.
"""

from mpqsearch.report.breakdown import size_breakdown
from mpqsearch.report.content import ReportContent
from mpqsearch.report.figures import render, save_figure
from mpqsearch.report.front import front_info, plot_front
from mpqsearch.report.grids import SampleGrid, plot_samples, sample_grid
from mpqsearch.report.html import build_report
from mpqsearch.report.paths import plot_path
from mpqsearch.report.prediction import plot_predicted_vs_measured, prediction_info
from mpqsearch.report.profile import profile_summary
from mpqsearch.report.sensitivity import (
    layer_losses,
    measured_losses,
    plot_sensitivity,
    profile_drawings,
)
from mpqsearch.report.tables import read_pareto_json, standings, tied, write_pareto_csv, write_pareto_json

__all__ = [
    "ReportContent",
    "SampleGrid",
    "build_report",
    "front_info",
    "layer_losses",
    "measured_losses",
    "plot_front",
    "plot_path",
    "plot_predicted_vs_measured",
    "plot_samples",
    "plot_sensitivity",
    "prediction_info",
    "profile_drawings",
    "profile_summary",
    "read_pareto_json",
    "render",
    "sample_grid",
    "save_figure",
    "size_breakdown",
    "standings",
    "tied",
    "write_pareto_csv",
    "write_pareto_json",
]
