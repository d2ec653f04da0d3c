"""Which figures a report has, with the words that go with them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from mpqsearch.pareto import FULL_PRECISION_METHOD, main_metric, shown_metrics
from mpqsearch.report.content import ReportContent
from mpqsearch.report.figures import Drawing
from mpqsearch.report.front import FrontInfo, front_info, plot_front
from mpqsearch.report.grids import grid_drawing
from mpqsearch.report.labels import metric_text
from mpqsearch.report.search import search_drawings
from mpqsearch.report.sensitivity import profile_drawing


def all_drawings(content: ReportContent) -> list[Drawing]:
    """Every figure that the content allows; the first front is the one of the first screen."""
    table, profile = content.table, content.profile
    return [
        *_fronts(content),
        *([profile_drawing(profile, table, content.format_name)] if profile is not None and table is not None else ()),
        *(search_drawings(content.search) if content.search is not None else ()),
        *map(grid_drawing, content.grids),
    ]


def _fronts(content: ReportContent) -> Iterator[Drawing]:
    measured = shown_metrics(r for r in content.records if r.method != FULL_PRECISION_METHOD)
    order = sorted(measured, key=lambda m: m != main_metric(content.records))
    for metric in order:
        info = front_info(content.records, metric, chosen=content.chosen)
        yield Drawing(
            key=f"front_{metric}",
            section="front" if metric == order[0] else "metrics",
            title=f"{metric_text(metric).title} against stored bits",
            caption=_front_caption(info, first=metric == order[0]),
            alt=_front_words(info),
            draw=partial(plot_front, info),
        )


def _front_caption(info: FrontInfo, *, first: bool) -> str:
    scale = {"log": "Logarithmic axis. ", "symlog": "Logarithmic axis, linear around zero. ", "linear": ""}[info.scale]
    full = "" if info.full_precision is None else "Dashed: full precision. "
    if not first:
        return f"{scale}{full}".rstrip()
    ring = "" if info.chosen is None else "Ring: the chosen point. "
    return (
        f"{scale}{full}{ring}Grey band: the front over all methods. In brackets the hypervolume: the share of the area "
        "between the best values and the worst uniform map that a method covers, from 0 to 1; more is better."
    )


def _front_words(info: FrontInfo) -> str:
    """The figure in words: each method's range."""
    parts = [
        f"{s.name}: from {s.value[0]:.3g} at {s.bits[0]:.2f} bits to {s.value[-1]:.3g} at {s.bits[-1]:.2f} bits"
        for s in info.series
    ]
    return (
        f"Line chart of {info.label} against stored bits per parameter. {'; '.join(parts)}. "
        "The table below has every number."
    )
