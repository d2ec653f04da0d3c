"""What an outer search did, in figures and tables: progress against trials and cost, arms, importances, prediction, the
winner's curse.

All from the plain data that ``search.json`` holds (`mpqsearch.search.results.summarize`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mpqsearch.report.figures import Draw, render, save_figure
from mpqsearch.report.style import COLOURS, MARKERS, axes_or_new, ink, muted, series_styles, widen_x

Data = Mapping[str, Any]

ARM_ORDER = ("uniform", "random", "shuffled", "plain", "search")


def plot_search_history(data: Data, against: str = "forwards", ax: Axes | None = None) -> Axes:
    """Hypervolume of the measured front so far, against ``trial`` count or ``forwards`` (passes of the denoiser); arms
    as level lines."""
    ax = axes_or_new(ax, (5.4, 3.4))
    rows = data["history"]
    x = np.arange(1, len(rows) + 1) if against == "trial" else np.array([r["forwards"] for r in rows], dtype=float)
    styles = series_styles(ARM_ORDER)  # the colours of the front
    ax.step(
        x, [r["hypervolume"] for r in rows], where="post", color=styles["search"].colour, linewidth=1.8, label="search"
    )
    pruned = np.array([r["pruned"] for r in rows], dtype=bool)
    if pruned.any():
        ax.plot(x[pruned], np.array([r["hypervolume"] for r in rows])[pruned], "|", color=muted(), label="pruned trial")
    for arm, style in styles.items():
        if arm != "search" and arm in data["hypervolume"]:
            line = ":" if arm == "random" else "--"  # its colour is that of uniform, and here are no markers
            ax.axhline(data["hypervolume"][arm], color=style.colour, linestyle=line, linewidth=1.1, label=arm)
    if against == "trial":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("trials" if against == "trial" else "forward passes of the denoiser on one sample")
    ax.set_ylabel("hypervolume (share of the box)")
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4
    )  # below: level lines cross the whole of the picture
    return ax


def plot_search_front(data: Data, ax: Axes | None = None) -> Axes:
    """Error of final samples on the search seeds against stored bits: every measured map, and the arms."""
    ax = axes_or_new(ax, (5.4, 3.7))
    ax.set_yscale("log")
    points = data["points"]
    ax.plot(
        [p["average_bits"] for p in points],
        [p["error"] for p in points],
        ".",
        color=muted(),
        alpha=0.5,
        label="measured maps",
    )
    styles = series_styles(ARM_ORDER)
    for arm, style in styles.items():
        rows = sorted((r["average_bits"], r["error"]) for b in data["budgets"] for r in b["rows"] if r["arm"] == arm)
        if rows:
            ax.plot(*zip(*rows, strict=True), color=style.colour, marker=style.marker, markersize=style.size, label=arm)
    widen_x(ax)
    ax.set_xlabel("stored bits per parameter, everything counted")
    ax.set_ylabel(data["error"])
    # Below: at one budget all points stand in a column, and markers of a legend beside it would pass for more of them.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4)
    return ax


def plot_search_importances(data: Data, ax: Axes | None = None) -> Axes:
    """Share of each parameter in what separates the better trials (PED-ANOVA)."""
    shares = sorted(data["importances"].items(), key=lambda kv: kv[1])
    ax = axes_or_new(ax, (5.0, 0.8 + 0.28 * max(len(shares), 1)))
    ax.barh([k for k, _ in shares], [v for _, v in shares], color=COLOURS[0])
    ax.set_xlabel("importance")
    ax.grid(visible=False, axis="y")
    return ax


def plot_search_parallel(data: Data, ax: Axes | None = None) -> Axes:
    """Every trial as a line over its parameters, each scaled to its own range; the darker the better."""
    table = [t for t in data["trials_table"] if t["value"] is not None]
    names = list(dict.fromkeys(n for t in table for n in t["params"]))
    ax = axes_or_new(ax, (max(5.4, 0.75 * len(names) + 1.5), 3.6))
    if not table:
        return ax
    values = np.array([t["value"] for t in table])
    rank = values.argsort().argsort() / max(len(values) - 1, 1)
    columns = np.stack([_unit([t["params"].get(n) for t in table]) for n in names], axis=1)
    from matplotlib import colormaps

    shades = colormaps["viridis"](rank)
    for i in np.argsort(-values):  # the best are drawn last, on top
        ax.plot(columns[i], color=shades[i], alpha=0.25 + 0.6 * (1 - rank[i]), linewidth=0.7 + 1.3 * (1 - rank[i]))
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7.5)
    ax.set_yticks([0, 0.5, 1], ["low", "", "high"])
    ax.set_title(
        f"{len(table)} trials; best {values.min():+.3f}, median {np.median(values):+.3f} (log error to uniform)",
        loc="left",
        fontsize=8.5,
    )
    return ax


def plot_search_prediction(data: Data, ax: Axes | None = None) -> Axes:
    """Predicted loss against measured error of every map, one series a budget, with the rank correlation in the
    legend."""
    ax = axes_or_new(ax, (5.2, 3.8))
    ax.set_xscale("log")
    ax.set_yscale("log")
    correlation = {r["budget"]: r for r in data["predicted_vs_measured"]}
    for i, budget in enumerate(dict.fromkeys(p["budget"] for p in data["points"])):
        mine = [(p["predicted"], p["error"]) for p in data["points"] if p["budget"] == budget and p["predicted"] > 0]
        row = correlation.get(budget)
        label = budget if row is None else f"{budget}: {row['spearman']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
        if mine:
            ax.plot(
                *zip(*mine, strict=True),
                linestyle="",
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                color=COLOURS[i % len(COLOURS)],
                label=label,
            )
    ax.set_xlabel("predicted loss")
    ax.set_ylabel(data["error"])
    ax.legend(title="Spearman, 95 % interval", title_fontsize=8)
    return ax


def plot_winners_curse(data: Data, ax: Axes | None = None) -> Axes:
    """Error of the chosen maps as a share of uniform's: on the seeds that chose them, and on fresh ones. Above 1 is
    worse than uniform."""
    ax = axes_or_new(ax, (5.0, 3.2))
    entries = [b for b in data["budgets"] if b.get("fresh_ratio_to_uniform") is not None]
    x = np.arange(len(entries))
    ax.plot(x - 0.08, [b["ratio_to_uniform"] for b in entries], "o", color=COLOURS[0], label="search seeds")
    ax.plot(x + 0.08, [b["fresh_ratio_to_uniform"] for b in entries], "s", color=COLOURS[1], label="fresh seeds")
    ax.axhline(1.0, color=ink(), linewidth=0.9)
    ax.set_yscale("log")
    ax.set_xticks(x, [b["budget"] for b in entries])
    ax.set_xlim(-0.5, max(len(entries), 1) - 0.5)
    ax.set_ylabel("error / that of uniform")
    ax.legend()
    return ax


Drawing = tuple[str, str, str, str, Draw]
"""Key, title, caption, words and drawing of a figure."""


def search_drawings(data: Data) -> list[Drawing]:
    """Every figure that the data allow."""
    return [*_progress_drawings(data), *_parameter_drawings(data), *_trust_drawings(data)]


def _progress_drawings(data: Data) -> list[Drawing]:
    best = max(data["hypervolume"].items(), key=lambda kv: kv[1])
    volumes = ", ".join(f"{k} {v:.3f}" for k, v in sorted(data["hypervolume"].items(), key=lambda kv: -kv[1]))
    return [
        (
            "search_front",
            "Measured maps and control arms",
            "Error on the search seeds. Random and shuffled arms: geometric mean of their draws.",
            f"Scatter plot of {data['error']} against stored bits for {len(data['points'])} maps and the control arms.",
            partial(plot_search_front, data),
        ),
        (
            "search_history_forwards",
            "Progress against evaluation cost",
            "Forward passes of the trials; equal maps are counted each time. Dashed: control arms.",
            f"Line chart of hypervolume against forward passes. At the end: {volumes}. Best: {best[0]}.",
            partial(plot_search_history, data, "forwards"),
        ),
        (
            "search_history_trials",
            "Progress against trials",
            "The same against the number of trials.",
            f"Line chart of hypervolume against trials. At the end: {volumes}.",
            partial(plot_search_history, data, "trial"),
        ),
    ]


def _parameter_drawings(data: Data) -> list[Drawing]:
    drawings: list[Drawing] = []
    if data["importances"]:
        words = ", ".join(f"{k} {v:.2f}" for k, v in data["importances"].items())
        drawings.append(
            (
                "search_importances",
                "Which parameters matter",
                "PED-ANOVA importances.",
                f"Bar chart: {words}.",
                partial(plot_search_importances, data),
            )
        )
    if any(t["value"] is not None for t in data["trials_table"]):
        drawings.append(
            (
                "search_parallel",
                "Trials over the parameters",
                "A line a trial; dark and thick: better.",
                f"Parallel coordinates of {len(data['trials_table'])} trials.",
                partial(plot_search_parallel, data),
            )
        )
    return drawings


def _trust_drawings(data: Data) -> list[Drawing]:
    drawings: list[Drawing] = []
    if data["predicted_vs_measured"]:
        words = "; ".join(
            f"{r['budget']}: {r['spearman']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
            for r in data["predicted_vs_measured"]
        )
        drawings.append(
            (
                "search_prediction",
                "Predicted against measured within a budget",
                (
                    "Spearman correlation over the maps of the search; below 0.7 the prediction alone should not be "
                    "trusted."
                ),
                f"Scatter plot of predicted loss against measured error. Spearman {words}.",
                partial(plot_search_prediction, data),
            )
        )
    if any(b.get("fresh_ratio_to_uniform") is not None for b in data["budgets"]):
        words = "; ".join(
            f"{b['budget']}: {b['ratio_to_uniform']:.3f} chosen, {b['fresh_ratio_to_uniform']:.3f} fresh"
            for b in data["budgets"]
            if b.get("fresh_ratio_to_uniform") is not None
        )
        drawings.append(
            (
                "search_fresh_seeds",
                "The chosen maps on fresh seeds",
                (
                    "What was chosen looks better on the seeds that chose it (the winner's curse); the second value is "
                    "the one to believe."
                ),
                f"Ratios of the error to uniform. {words}.",
                partial(plot_winners_curse, data),
            )
        )
    return drawings


def write_search_figures(folder: Path, data: Data) -> list[Path]:
    """Every figure as PNG and SVG."""
    paths: list[Path] = []
    for key, _, _, _, draw in search_drawings(data):
        paths += save_figure(render(draw), folder / key)
    return paths


def search_tables(data: Data) -> dict[str, str]:
    """CSV texts by name: ``arms`` (chosen maps beside control arms), ``points`` (every measured map), ``history``."""
    arms = [
        {"budget": b["budget"], **{k: v for k, v in r.items() if k != "params"}}
        for b in data["budgets"]
        for r in b["rows"]
    ]
    return {
        "arms": _csv(arms),
        "points": _csv(data["points"]),
        "history": _csv(data["history"]),
    }


def arms_table(data: Data) -> list[dict[str, Any]]:
    """Rows for the report: each arm at each budget, errors as shares of uniform's."""
    rows: list[dict[str, Any]] = []
    for entry in data["budgets"]:
        uniform = next(r["error"] for r in entry["rows"] if r["arm"] == "uniform")
        rows += [
            {
                "budget": entry["budget"],
                "arm": r["arm"]
                + (" (worse than uniform)" if r["arm"] == "search" and entry["worse_than_uniform"] else ""),
                "bits": float(r["average_bits"]),
                "kB": float(r["size_bytes"] / 1000),
                "error to uniform": float(r["error"] / uniform),
                "FD to FP, fresh": f"{r['fd_fp']:.3f}" if "fd_fp" in r else "",
                "FD to data, fresh": f"{r['fd_data']:.3f}" if "fd_data" in r else "",
                "PSNR, fresh": f"{r['paired_psnr']:.2f}" if "paired_psnr" in r else "",
            }
            for r in entry["rows"]
        ]
    return rows


def _unit(column: Sequence[Any]) -> Any:
    """Values scaled to 0..1; texts by their order, missing ones in the middle."""
    present = [c for c in column if c is not None]
    if any(isinstance(c, str) for c in present):
        order = {c: i for i, c in enumerate(sorted({str(c) for c in present}))}
        numbers = np.array([order[str(c)] if c is not None else np.nan for c in column], dtype=float)
    else:
        numbers = np.array([np.nan if c is None else float(c) for c in column])
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    scaled = (numbers - low) / (high - low) if high > low else np.full(len(numbers), 0.5)
    return np.where(np.isnan(scaled), 0.5, scaled)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    buffer = io.StringIO()
    fields = list(dict.fromkeys(k for r in rows for k in r))
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
