"""Tables, figures and the report. Computing and drawing are two functions: ``*_info(...)`` and ``plot_*(info, ax=None)
-> Axes``.

    info = front_info(records, metric="fd_fp", cost="average_bits")   -> FrontInfo ax = plot_front(info, ax=None)
    -> Axes plot_bits_heatmap(bits_heatmap_info(table, bit_map, policy=None, quantiles=64))
    plot_bits_by_depth(bits_by_depth_info(table, bit_map, policy=None)) plot_sensitivity(sensitivity_info(profile,
    variant="", worst=8))   # variant "measured": one layer at a time plot_kurtosis(kurtosis_info(profile, bits=4));
    plot_gain(gain_info(profile)); profile_summary(profile, table) plot_predicted_vs_measured(prediction_info(records,
    metric="paired_mse")) plot_path(path_info([PathSeries(...)]))                            # least predicted loss at
    every budget plot_samples(grid); plot_sample_difference(grid) size_breakdown(table, bit_map, policy, storage)
    -> SizeBreakdown, in bits save_figure(ax, folder / "name")                                   -> name.png, name.svg
    write_pareto_csv(path, records); write_pareto_json(path, records, inputs); read_pareto_json(path) ->
    list[StudyRecord] grid = sample_grid("3 bits", {"full precision": uint8, "ilp": uint8}, columns=8)  ->
    SampleGrid build_report(folder, ReportContent(title=..., records=..., table=..., ...), inputs) -> list[Path]

Needs no torch. Figures are plain ``matplotlib.figure.Figure`` objects that pyplot does not know; nothing has to be
closed.
"""

from mpqsearch.report.bits import (
    DepthInfo,
    HeatmapInfo,
    bits_by_depth_info,
    bits_heatmap_info,
    plot_bits_by_depth,
    plot_bits_heatmap,
)
from mpqsearch.report.breakdown import SizeBreakdown, size_breakdown
from mpqsearch.report.content import ReportContent
from mpqsearch.report.figures import render, save_figure
from mpqsearch.report.front import FrontInfo, front_info, plot_front
from mpqsearch.report.grids import SampleGrid, plot_sample_difference, plot_samples, sample_grid
from mpqsearch.report.html import build_report
from mpqsearch.report.paths import PathInfo, PathSeries, path_info, plot_path
from mpqsearch.report.profile import (
    GainInfo,
    KurtosisInfo,
    ProfileSummary,
    gain_info,
    kurtosis_info,
    plot_gain,
    plot_kurtosis,
    profile_summary,
    write_profile_figures,
)
from mpqsearch.report.sensitivity import (
    PredictionInfo,
    SensitivityInfo,
    plot_predicted_vs_measured,
    plot_sensitivity,
    prediction_info,
    sensitivity_info,
    spearman,
    spearman_interval,
)
from mpqsearch.report.tables import pareto_frame, read_pareto_json, standings, tied, write_pareto_csv, write_pareto_json

__all__ = [
    "DepthInfo",
    "FrontInfo",
    "GainInfo",
    "HeatmapInfo",
    "KurtosisInfo",
    "PathInfo",
    "PathSeries",
    "PredictionInfo",
    "ProfileSummary",
    "ReportContent",
    "SampleGrid",
    "SensitivityInfo",
    "SizeBreakdown",
    "bits_by_depth_info",
    "bits_heatmap_info",
    "build_report",
    "front_info",
    "gain_info",
    "kurtosis_info",
    "pareto_frame",
    "path_info",
    "plot_bits_by_depth",
    "plot_bits_heatmap",
    "plot_front",
    "plot_gain",
    "plot_kurtosis",
    "plot_path",
    "plot_predicted_vs_measured",
    "plot_sample_difference",
    "plot_samples",
    "plot_sensitivity",
    "prediction_info",
    "profile_summary",
    "read_pareto_json",
    "render",
    "sample_grid",
    "save_figure",
    "sensitivity_info",
    "size_breakdown",
    "spearman",
    "spearman_interval",
    "standings",
    "tied",
    "write_pareto_csv",
    "write_pareto_json",
    "write_profile_figures",
]
