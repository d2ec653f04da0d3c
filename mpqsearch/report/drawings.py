"""Which figures a report has, with the words that go with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from mpqsearch.pareto import FULL_PRECISION_METHOD, METRICS
from mpqsearch.report.content import ReportContent
from mpqsearch.report.figures import Draw
from mpqsearch.report.front import METRIC_TITLES, FrontInfo, front_info, plot_front


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One figure: ``key`` is its file name and anchor, ``section`` the part of the page, ``alt`` what it shows in words."""

    key: str
    section: str
    title: str
    caption: str
    alt: str
    draw: Draw
    wide: bool = False
    in_page: bool = True


def all_drawings(content: ReportContent) -> list[Drawing]:
    """Every figure that the content allows; the first front is the one of the first screen."""
    return [*_fronts(content)]


def _fronts(content: ReportContent) -> Iterator[Drawing]:
    measured = {m for r in content.records if r.method != FULL_PRECISION_METHOD for m in r.metrics}
    order = ["fd_fp", *(m for m in METRICS if m != "fd_fp"), *sorted(measured - set(METRICS))]
    for i, metric in enumerate(m for m in order if m in measured):
        info = front_info(content.records, metric)
        yield Drawing(
            key=f"front_{metric}",
            section="metrics" if i else "front",
            title=f"{METRIC_TITLES.get(metric, metric)} against stored bits",
            caption=_front_caption(info),
            alt=_front_words(info),
            draw=partial(plot_front, info),
        )


def _front_caption(info: FrontInfo) -> str:
    scale = "Logarithmic axis. " if info.log else ""
    full = "" if info.full_precision is None else "Dashed: full precision. "
    return (
        f"{scale}{full}Grey band: the front over all methods. Hypervolume is the share of the box between the best values and the "
        "worst corner of the uniform maps."
    )


def _front_words(info: FrontInfo) -> str:
    """The figure in words: each method's range."""
    parts = [
        f"{s.name}: from {s.value[0]:.3g} at {s.cost[0]:.2f} bits to {s.value[-1]:.3g} at {s.cost[-1]:.2f} bits"
        for s in info.series
    ]
    return f"Line chart of {info.label} against stored bits per parameter. {'; '.join(parts)}. The table below has every number."
