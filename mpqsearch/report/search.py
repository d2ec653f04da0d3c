"""An outer search in figures, tables and sentences: control arms, importances, the winner's curse.

All from the plain data that ``search.json`` holds (`mpqsearch.search.results.summarize`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mpqsearch.report.figures import Drawing
from mpqsearch.report.labels import BITS_TITLE, number
from mpqsearch.report.style import COLOURS, MUTED, axes_or_new, legend_below, series_styles

Data = Mapping[str, Any]

ARM_ORDER = ("uniform", "plain", "search")


def plot_search_front(data: Data, ax: Axes | None = None) -> Axes:
    """Error of final samples on the search seeds against stored bits: every measured map, and the arms."""
    ax = axes_or_new(ax, (5.4, 4.0))
    ax.set_yscale("log")
    measured = [(p["average_bits"], p["error"]) for p in data["points"]]
    ax.plot(*np.array(measured).reshape(-1, 2).T, ".", color=MUTED, alpha=0.5, label="measured maps")
    for arm, style in series_styles(ARM_ORDER).items():
        rows = sorted((r["average_bits"], r["error"]) for b in data["budgets"] for r in b["rows"] if r["arm"] == arm)
        if rows:
            ax.plot(*zip(*rows, strict=True), label=arm, **style.points)
    ax.set_xlabel(BITS_TITLE)
    ax.set_ylabel(data["error"])
    legend_below(ax, columns=4)
    return ax


def plot_search_importances(data: Data, ax: Axes | None = None) -> Axes:
    """Share of each parameter in what separates the better trials (PED-ANOVA)."""
    shares = sorted(data["importances"].items(), key=lambda kv: kv[1])
    ax = axes_or_new(ax, (5.0, 0.8 + 0.28 * max(len(shares), 1)))
    ax.barh([k for k, _ in shares], [v for _, v in shares], color=COLOURS[0])
    ax.set_xlabel("importance")
    ax.grid(visible=False, axis="y")
    return ax


def fresh_entries(data: Data) -> list[Data]:
    """The budgets whose chosen map was measured on fresh seeds."""
    return [b for b in data["budgets"] if b.get("fresh_ratio_to_uniform") is not None]


def search_drawings(data: Data) -> list[Drawing]:
    """Every figure that the data allow."""
    drawings = [_front_drawing(data)] if len(data["budgets"]) > 1 else []  # at one all points stand in a column
    if data["importances"]:
        drawings.append(_importance_drawing(data))
    return drawings


def _front_drawing(data: Data) -> Drawing:
    return Drawing(
        key="search_front",
        section="search",
        title="Measured maps and control arms",
        caption="Error on the search seeds. A map below the "
        "line of the search was better on these seeds, and was not chosen on the final ones.",
        alt=f"Scatter plot of {data['error']} against stored bits for {len(data['points'])} maps and the control arms.",
        draw=partial(plot_search_front, data),
    )


def _importance_drawing(data: Data) -> Drawing:
    words = ", ".join(f"{k} {v:.2f}" for k, v in data["importances"].items())
    return Drawing(
        key="search_importances",
        section="search",
        title="Which parameters matter",
        caption="PED-ANOVA importances.",
        alt=f"Bar chart: {words}.",
        draw=partial(plot_search_importances, data),
    )


def search_notes(data: Data) -> list[str]:
    """What fresh seeds say of the chosen maps, and how well the prediction orders the maps of the search: a sentence a
    budget."""
    fresh = [
        f"At {b['budget']} the error of the chosen map is {b['ratio_to_uniform']:.3f} of uniform's on the seeds that "
        f"chose it, and {b['fresh_ratio_to_uniform']:.3f} on fresh ones."
        for b in fresh_entries(data)
    ]
    return fresh + [
        f"At {r['budget']} the predicted loss and the measured error of {r['maps']} maps have the Spearman correlation "
        f"{r['spearman']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
        + ("; below 0.7 the prediction alone should not be trusted." if r["weak"] else ".")
        for r in data["predicted_vs_measured"]
    ]


def arms_table(data: Data) -> list[dict[str, Any]]:
    """Rows for the report: each arm at each budget, errors as shares of uniform's."""
    return [row for entry in data["budgets"] for row in _arm_rows(entry)]


def _arm_rows(entry: Data) -> list[dict[str, Any]]:
    uniform = next(r["error"] for r in entry["rows"] if r["arm"] == "uniform")
    worse = entry["worse_than_uniform"]
    return [
        {
            "budget": entry["budget"],
            "arm": "search (worse than uniform)" if r["arm"] == "search" and worse else r["arm"],
            "bits": float(r["average_bits"]),
            "kB": f"{r['size_bytes'] / 1000:,.1f}",
            "error, share of uniform": float(r["error"] / uniform),
            "FD to FP, fresh": number(r.get("fd_fp", np.nan), 3),
            "FD to data, fresh": number(r.get("fd_data", np.nan), 3),
            "PSNR, fresh": number(r.get("paired_psnr", np.nan), 2),
        }
        for r in entry["rows"]
    ]
