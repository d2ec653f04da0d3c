"""Which figures a report has, with the words that go with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from mpqsearch.pareto import FULL_PRECISION_METHOD, METRICS
from mpqsearch.report.bits import (
    DepthInfo,
    HeatmapInfo,
    bits_by_depth_info,
    bits_heatmap_info,
    plot_bits_by_depth,
    plot_bits_heatmap,
)
from mpqsearch.report.content import ReportContent
from mpqsearch.report.figures import Draw
from mpqsearch.report.front import METRIC_TITLES, FrontInfo, front_info, plot_front
from mpqsearch.report.grids import plot_sample_difference, plot_samples
from mpqsearch.report.search import search_drawings
from mpqsearch.report.sensitivity import (
    MEASURED,
    plot_predicted_vs_measured,
    plot_sensitivity,
    prediction_info,
    sensitivity_info,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One figure: ``key`` is its file name and anchor, ``section`` the part of the page, ``alt`` what it shows in
    words.

    ``dense`` figures have small print and scroll on a phone instead of shrinking; those not ``in_page`` are files only.
    """

    key: str
    section: str
    title: str
    caption: str
    alt: str
    draw: Draw
    dense: bool = False
    in_page: bool = True


def all_drawings(content: ReportContent) -> list[Drawing]:
    """Every figure that the content allows; the first front is the one of the first screen."""
    return [
        *_fronts(content),
        *_maps(content),
        *_profile(content),
        *_prediction(content),
        *_search(content),
        *_grids(content),
    ]


def _search(content: ReportContent) -> Iterator[Drawing]:
    for key, title, caption, words, draw in search_drawings(content.search) if content.search is not None else ():
        yield Drawing(
            key=key,
            section="search",
            title=title,
            caption=caption,
            alt=words,
            draw=draw,
            dense=key == "search_parallel",
        )


def _fronts(content: ReportContent) -> Iterator[Drawing]:
    measured = {m for r in content.records if r.method != FULL_PRECISION_METHOD for m in r.metrics}
    order = ["fd_fp", *(m for m in METRICS if m != "fd_fp"), *sorted(measured - set(METRICS))]
    for i, metric in enumerate(m for m in order if m in measured):
        info = front_info(content.records, metric, chosen=content.chosen)
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
    ring = "" if info.chosen is None else "Ring: the chosen point. "
    return (
        f"{scale}{full}{ring}Grey band: the front over all methods. Hypervolume is the share of the box between the "
        "best values and the "
        "worst corner of the uniform maps."
    )


def _front_words(info: FrontInfo) -> str:
    """The figure in words: each method's range."""
    parts = [
        f"{s.name}: from {s.value[0]:.3g} at {s.cost[0]:.2f} bits to {s.value[-1]:.3g} at {s.cost[-1]:.2f} bits"
        for s in info.series
    ]
    return f"Line chart of {info.label} against stored bits per parameter. {'; '.join(parts)}. The table below has every number."


def _maps(content: ReportContent) -> Iterator[Drawing]:
    if content.table is None:
        return
    for label, bit_map in content.maps.items():
        depth = bits_by_depth_info(content.table, bit_map, content.policy)
        yield Drawing(
            key=f"depth_{slug(label)}",
            section="maps",
            title=f"Bits over depth: {label}",
            caption="Height is the mean width, breadth the share of the weights, colour and hatch the role of the layer.",
            alt=_depth_words(label, depth),
            draw=partial(plot_bits_by_depth, depth),
            dense=True,
        )
    for label, bit_map in content.maps.items():
        heat = bits_heatmap_info(content.table, bit_map, content.policy)
        yield Drawing(
            key=f"heatmap_{slug(label)}",
            section="maps",
            title=f"Bits over layers and channels: {label}",
            caption="The channels of a layer are sorted by width. Hatched: fixed by the policy.",
            alt=_heatmap_words(label, heat),
            draw=partial(plot_bits_heatmap, heat),
            dense=True,
        )


def _profile(content: ReportContent) -> Iterator[Drawing]:
    profile = content.profile
    if profile is None or not profile.formats:
        return
    variants = [
        content.variant,
        *((MEASURED,) if any(k.startswith("layer_final_error/") for k in profile.arrays) else ()),
    ]
    for i, variant in enumerate(variants):
        info = sensitivity_info(profile, variant)
        yield Drawing(
            key="sensitivity_measured" if i else "sensitivity",
            section="profile",
            title="Measured layer by layer" if i else "Sensitivity of the layers",
            caption=f"{info.label[0].upper()}{info.label[1:]} of one layer at a time, against its width.",
            alt=f"Line chart of {info.label} against bits for {len(info.layers)} layers. Most sensitive: "
            + ", ".join(info.layers[j] for j in info.worst[:5])
            + ".",
            draw=partial(plot_sensitivity, info),
        )


def _prediction(content: ReportContent) -> Iterator[Drawing]:
    metric = next((m for m in ("paired_mse", "fd_fp", "paired_psnr") if _predictable(content, m)), None)
    if metric is None:
        return
    info = prediction_info(content.records, metric)
    within = "" if info.within is None else f" Within one budget, on average: {info.within:.2f}."
    words = f"rank correlation {info.spearman:.2f}, 95 % bootstrap interval {info.low:.2f} to {info.high:.2f}, {len(info.methods)} points"
    yield Drawing(
        key="predicted_vs_measured",
        section="prediction",
        title="Predicted loss against measured",
        caption=f"Spearman {words}.{within} Points of different budgets are ordered by their bits alone, so the second is the harder test.",
        alt=f"Scatter plot of predicted loss against {info.label}: {words}.",
        draw=partial(plot_predicted_vs_measured, info),
    )


def _grids(content: ReportContent) -> Iterator[Drawing]:
    """As files only: the page lays its strips out itself, so that they fit a phone."""
    for grid in content.grids:
        for kind, plot in (("samples", plot_samples), ("difference", plot_sample_difference)):
            yield Drawing(
                key=f"{kind}_{slug(grid.title)}",
                section="samples",
                title=f"{grid.title}: {kind}",
                caption="",
                alt="",
                draw=partial(plot, grid),
                in_page=False,
            )


def _predictable(content: ReportContent, metric: str) -> bool:
    points = [r for r in content.records if r.method != FULL_PRECISION_METHOD and metric in r.metrics]
    return sum(math.isfinite(r.predicted_loss) for r in points) >= 3


def _depth_words(label: str, info: DepthInfo) -> str:
    mean: dict[str, float] = {}
    for role in dict.fromkeys(info.roles):
        mine = [i for i, r in enumerate(info.roles) if r == role]
        mean[role] = float((info.mean[mine] * info.weights[mine]).sum() / info.weights[mine].sum())
    return (
        f"Bar chart of bits over depth, {label}. Mean bits by role: "
        + ", ".join(f"{r} {b:.1f}" for r, b in mean.items())
        + "."
    )


def _heatmap_words(label: str, info: HeatmapInfo) -> str:
    widths = info.widths.mean(axis=1)
    low, high = int(widths.argmin()), int(widths.argmax())
    return (
        f"Heat map of bits over {len(info.layers)} layers and their channels, {label}. Fewest bits: {info.layers[low]} "
        f"({widths[low]:.1f} on average); most: {info.layers[high]} ({widths[high]:.1f})."
    )


def slug(text: str) -> str:
    """Letters, digits and dashes of a label, for file names and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"
