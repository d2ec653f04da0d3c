"""Figure and tables of the study from results.csv alone; the text around them in README.md is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from mpqsearch import artifacts
from mpqsearch.report.style import STYLE, plain_log_ticks, series_styles

METRICS = {
    "fd_fp": "FD to full precision",
    "fd_data": "FD to data",
    "paired_psnr": "paired PSNR (dB)",
}
PAIRS = (
    ("ours", "mpq-dm"),
    ("ours", "mpq-dm+checked"),
    ("ours", "ours-nearest"),
    ("ours", "ours-gptq"),
    ("ours+gentle", "mpq-dm"),
    ("mpq-dm+gentle", "mpq-dm"),
)
"""Methods that are compared seed by seed."""

SHOWN = ("uniform", "omq-paper", "uniform+qalora", "mpq-dm", "ours-untrained", "ours")
"""Methods in the figure; the tables have all."""

BEGIN, END = "<!-- results: written by study.py -->", "<!-- end of results -->"


def write_report(folder: Path, results: Path, schedule: Mapping[str, Any], planned: int) -> None:
    """Draw ``results.png`` and replace the part of README.md between the markers."""
    table = pd.read_csv(results, dtype={"commit": str})
    draw(table).savefig(folder / "results.png", dpi=110)
    readme = folder / "README.md"
    text = readme.read_text() if readme.is_file() else f"# MPQ-DM in full\n\n{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    artifacts.write_text(readme, f"{head}{BEGIN}\n\n{describe(table, schedule, planned)}\n{END}{tail}")
    print(readme)


def describe(table: pd.DataFrame, schedule: Mapping[str, Any], planned: int) -> str:
    """Tables and what follows from them by arithmetic."""
    quantized = table[table["method"] != "full-precision"]
    full = table[table["method"] == "full-precision"]
    steps = schedule["steps"]
    n = int(table["n_samples"].iloc[0])
    lines = [
        (
            f"{len(table)} of {planned} rows are there. {steps} optimiser steps of "
            f"{schedule['relation']['window']} timesteps and {schedule['batch']} samples each; {n} evaluation samples "
            "a seed; "
            f"{schedule['sampler']['name'].upper()} {schedule['sampler']['steps']} steps, guidance "
            f"{schedule['sampler']['guidance']:g}. "
            "Commit of the code that made them: "
            f"{', '.join(f'{c} ({n} rows)' for c, n in table['commit'].value_counts().items())}."
        ),
        "",
        (
            "Mean over seeds; ± half the width of the 95 % bootstrap interval over samples with one seed, half the "
            "range over seeds with more."
        ),
        "",
    ]
    for model, rows in quantized.groupby("model", sort=False):
        reference = full[full["model"] == model]["fd_data"]
        lines += [
            f"### {model}",
            "",
            f"Full precision has FD to data {reference.mean():.3f}."
            if len(reference)
            else "Full precision is not measured yet.",
            "",
            "| setting | method | seeds | bytes | bits a parameter | FD to FP | FD to data | PSNR dB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for setting, group in rows.groupby("setting", sort=False):
            best = group.groupby("method")["fd_fp"].mean().idxmin() if group["fd_fp"].notna().any() else None
            for method, g in group.groupby("method", sort=False):
                name = f"**{method}**" if method == best else method
                cells = " | ".join(_cell(g, key) for key in METRICS)
                lines.append(
                    f"| {setting} | {name} | {len(g)} | {g['size_bytes'].iloc[0]} | {g['average_bits'].iloc[0]:.3f} | "
                    f"{cells} |"
                )
        lines.append("")
    lines += ["### In ratios", "", *_verdicts(quantized, full), ""]
    for control in ("mpq-dm", "mpq-dm+checked"):
        lines += [
            (
                f"`ours` less `{control}`, where at least three seeds have both: mean ± standard error, and at how "
                "many seeds it is below 0."
            ),
            "",
            *_differences(quantized, "ours", control),
            "",
        ]
    for a, b in PAIRS:
        lines += [
            f"`{a}` against `{b}`, ratios (PSNR: difference) seed by seed:",
            "",
            *_paired(quantized, full, a, b),
            "",
        ]
    lines += ["![Distances and PSNR by setting and method](results.png)"]
    return "\n".join(lines)


def draw(table: pd.DataFrame) -> Figure:
    """Models by rows, metrics by columns; settings along the axis, one marker for each of `SHOWN`, whiskers as in the
    tables."""
    models = list(dict.fromkeys(table["model"]))
    quantized = table[table["method"] != "full-precision"]
    settings = [s for s in ("W2A4", "W2A6", "W3A4", "W3A6", "W4A4") if s in set(quantized["setting"])]
    methods = [m for m in SHOWN if m in set(quantized["method"])]
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 3.4 * len(models)), layout="constrained")
        grid = figure.subplots(len(models), len(METRICS), squeeze=False)
        styles = series_styles(methods)
        for i, model in enumerate(models):
            for j, (key, label) in enumerate(METRICS.items()):
                ax = grid[i, j]
                for k, method in enumerate(methods):
                    rows = quantized[(quantized["model"] == model) & (quantized["method"] == method)]
                    points = [
                        (settings.index(s), *_value(g, key)) for s, g in rows.groupby("setting") if g[key].notna().any()
                    ]
                    if not points:
                        continue
                    x, y, spread = (np.array(v) for v in zip(*sorted(points), strict=True))
                    style = styles[method]
                    ax.errorbar(
                        x + (k - (len(methods) - 1) / 2) * 0.13, y,
                        np.minimum(spread, y * 0.95) if key != "paired_psnr" else spread,
                        fmt=style.marker, color="black" if method == "ours" else style.colour, ms=style.size, lw=1,
                        label=method,
                    )  # fmt: skip
                full = table[(table["model"] == model) & (table["method"] == "full-precision")]["fd_data"]
                if key == "fd_data" and len(full):
                    ax.axhline(full.mean(), ls="--", lw=1, color="#8A8A8A")
                if key != "paired_psnr":
                    ax.set_yscale("log")
                    plain_log_ticks(ax)
                ax.set_xticks(range(len(settings)), settings)
                ax.set_xlim(-0.6, len(settings) - 0.4)
                ax.set_title(f"{model}: {label}")
                for edge in range(len(settings) - 1):
                    ax.axvline(edge + 0.5, lw=0.5, color="#8A8A8A", alpha=0.5)
        # A model may lack methods that another has.
        named = {n: h for ax in grid.flat for h, n in zip(*ax.get_legend_handles_labels(), strict=True)}
        shown = [m for m in methods if m in named]
        figure.legend([named[m] for m in shown], shown, loc="outside lower center", ncols=max(1, min(len(shown), 6)))
    return figure


def _value(group: pd.DataFrame, key: str) -> tuple[float, float]:
    """Mean over seeds and its spread."""
    values = group[key].dropna()
    spread = group[f"{key}_spread"].dropna().iloc[0] if len(values) == 1 else (values.max() - values.min()) / 2
    return float(values.mean()), float(spread)


def _cell(group: pd.DataFrame, key: str) -> str:
    if group[key].isna().all():
        return "diverged"
    mean, spread = _value(group, key)
    return f"{mean:.1f} ± {spread:.1f}" if key == "paired_psnr" else f"{mean:.3f} ± {spread:.3f}"


def _paired(quantized: pd.DataFrame, full: pd.DataFrame, a: str, b: str) -> list[str]:
    """One method over another at each seed that has both: settings by rows, models and metrics by columns."""
    models = list(dict.fromkeys(quantized["model"]))
    heads = [f"{model}, {what}" for model in models for what in ("FD to FP", "excess FD to data", "PSNR dB")]
    lines = ["| setting | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    at = quantized.set_index(["model", "setting", "method", "seed"])
    base = full.set_index(["model", "seed"])["fd_data"]
    for setting in dict.fromkeys(quantized["setting"]):
        cells = []
        for model in models:
            seeds = [
                s for s in sorted(set(quantized["seed"])) if {(model, setting, m, s) for m in (a, b)} <= set(at.index)
            ]
            pairs = [
                (at.loc[(model, setting, a, s)], at.loc[(model, setting, b, s)], base.get((model, s), np.nan))
                for s in seeds
            ]
            cells += [
                ", ".join(f"{x['fd_fp'] / y['fd_fp']:.2f}" for x, y, _ in pairs),
                ", ".join(f"{(x['fd_data'] - z) / (y['fd_data'] - z):.2f}" for x, y, z in pairs),
                ", ".join(f"{x['paired_psnr'] - y['paired_psnr']:+.1f}" for x, y, _ in pairs),
            ]
        if any(cells):
            lines.append(f"| {setting} | " + " | ".join(c or "-" for c in cells) + " |")
    return lines


def _differences(quantized: pd.DataFrame, a: str, b: str) -> list[str]:
    """Paired differences of the metrics, for each model and setting with three seeds or more."""
    lines = [
        "| model | setting | seeds | " + " | ".join(METRICS.values()) + " |",
        "|---|---|---|" + "---|" * len(METRICS),
    ]
    for (model, setting), group in quantized.groupby(["model", "setting"], sort=False):
        both = group.pivot_table(index="seed", columns="method", values=list(METRICS))
        cells = []
        for key in METRICS:
            pair = both[key].reindex(columns=[a, b]).dropna()
            d = pair[a] - pair[b]
            if len(d) >= 3:
                cells.append(
                    f"{d.mean():+.3f} ± {d.std(ddof=1) / len(d) ** 0.5:.3f} ({int((d < 0).sum())} of {len(d)})"
                )
        if cells:
            lines.append(f"| {model} | {setting} | {len(d)} | " + " | ".join(cells) + " |")
    return lines


def _verdicts(quantized: pd.DataFrame, full: pd.DataFrame) -> list[str]:
    lines = [
        (
            "| model | setting | ours / mpq-dm, FD to FP | ours / mpq-dm, excess FD to data "
            "| mpq-dm / uniform+qalora, FD to FP | to data |"
        )
    ]
    lines.append("|---|---|---|---|---|---|")
    for (model, setting), group in quantized.groupby(["model", "setting"], sort=False):
        values = {k: group.pivot_table(index="seed", columns="method", values=k) for k in ("fd_fp", "fd_data")}
        base = full[full["model"] == model].set_index("seed")["fd_data"]

        def ratio(a: str, b: str, key: str, less: Any = 0.0, values: Mapping[str, pd.DataFrame] = values) -> str:
            both = values[key].reindex(columns=[a, b]).sub(less, axis=0).dropna()  # seeds that have the two
            return f"{both[a].mean() / both[b].mean():.2f}" if len(both) else "-"

        cells = [
            ratio("ours", "mpq-dm", "fd_fp"),
            ratio("ours", "mpq-dm", "fd_data", base),
            ratio("mpq-dm", "uniform+qalora", "fd_fp"),
            ratio("mpq-dm", "uniform+qalora", "fd_data"),
        ]
        lines.append(f"| {model} | {setting} | " + " | ".join(cells) + " |")
    return lines
