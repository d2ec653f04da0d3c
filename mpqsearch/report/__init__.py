"""Tables, figures and the report. Computing and drawing are two functions: ``*_info(...)`` and ``plot_*(info, ax=None) -> Axes``.

    info = front_info(records, metric="fd_fp", cost="average_bits")   -> FrontInfo
    ax = plot_front(info, ax=None)                                     -> Axes
    write_pareto_csv(path, records); write_pareto_json(path, records, inputs); read_pareto_json(path) -> list[StudyRecord]
    grid = sample_grid("3 bits", 3.0, {"full precision": uint8, "ilp": uint8}, columns=8)  -> SampleGrid
    build_report(folder, ReportContent(title=..., records=..., table=..., ...), inputs) -> list[Path]

Needs no torch. Figures are plain ``matplotlib.figure.Figure`` objects that pyplot does not know; nothing has to be closed.
"""

from mpqsearch.report.breakdown import SizeBreakdown, size_breakdown
from mpqsearch.report.content import ReportContent
from mpqsearch.report.figures import render, save_figure
from mpqsearch.report.front import FrontInfo, front_info, plot_front
from mpqsearch.report.grids import SampleGrid, plot_sample_difference, plot_samples, sample_grid
from mpqsearch.report.html import build_report
from mpqsearch.report.tables import pareto_frame, read_pareto_json, standings, tied, write_pareto_csv, write_pareto_json

__all__ = [
    "FrontInfo",
    "ReportContent",
    "SampleGrid",
    "SizeBreakdown",
    "build_report",
    "front_info",
    "pareto_frame",
    "plot_front",
    "plot_sample_difference",
    "plot_samples",
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
