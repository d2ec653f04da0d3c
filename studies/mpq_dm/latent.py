"""MPQ-DM, its parts and this package on the embedded latent pipelines: a latent diffusion model and a flow model.

python studies/mpq_dm/latent.py                    # every row that latent.csv lacks, most telling first
python studies/mpq_dm/latent.py --minutes 60       # no new row after an hour; the same command continues
python studies/mpq_dm/latent.py --long fmnist-flow # one long training of mpq-dm and of ours, W2A4 and W3A4: long.csv
python studies/mpq_dm/latent.py --report-only      # the part of README.md that is about these

Methods, settings and budgets are those of study.py, with two differences: `ours` is trained once at W4A4 too, and
learning rates are the package's own for all methods.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from report import _cell, _paired, _verdicts, draw
from study import (
    CHECK_SEED,
    FULL_PRECISION,
    HERE,
    METHODS,
    Model,
    Schedule,
    commit,
    full_precision_row,
    measure,
    run_row,
    train,
    write_results,
)

from mpqsearch import artifacts
from mpqsearch.core import size_bytes
from mpqsearch.quant import convert
from mpqsearch.report.style import COLOURS, STYLE, plain_log_ticks
from mpqsearch.sampling import SamplerSpec

MODELS = ("fmnist-t2i", "fmnist-flow")
RECIPES = {m: METHODS[m] for m in ("mpq-dm", "ours", "uniform+qalora", "ours-untrained", "uniform", "omq-paper")}
CONTROL = "mpq-dm+faster"
RECIPES[CONTROL] = replace(METHODS["mpq-dm"], lr_factor=2.0)
"""Learning rates twice as high, which are those of study.py for low-rank updates: at four input bits and seed 0."""

MIXED = "ours+input-widths"
RECIPES[MIXED] = replace(METHODS["ours"], spec=replace(METHODS["ours"].spec, act_choices=(4, 5, 6, 8)))
"""The widths of inputs are chosen too, layer by layer, under the bytes of `mpq-dm` and the bit operations of `ours`."""

EQUAL = "ours+equal-operations"
RECIPES[EQUAL] = replace(RECIPES[MIXED], operations_of="mpq-dm")
"""The same, under the bytes *and* the bit operations of `mpq-dm`."""

TOKEN = "ours+token-scales"
RECIPES[TOKEN] = replace(METHODS["ours"], token_scales=True, own_inputs=False)
"""Every token of the input of a linear layer has its own scale; alpha 1/2, no zero points searched."""

SHARED = "mpq-dm+token-scales"
RECIPES[SHARED] = replace(METHODS["mpq-dm"], token_scales=True)
"""The control: how much of that are the scales alone."""

MAIN = ("mpq-dm", "ours")
"""Methods whose rows come first."""

ORDER = ("W2A4", "W3A4", "W2A6", "W3A6", "W4A4")
COLUMNS = (
    "model", "setting", "method", "seed", "average_bits", "size_bytes", "paired_mse", "fd_fp", "fd_data",
    "attributes_recognised", "paired_psnr", "n_samples", "train_steps", "seconds", "fd_fp_spread", "fd_data_spread",
    "paired_psnr_spread", "schedule", "commit",
)  # fmt: skip
"""``paired_mse``: of latents, to the full-precision ones of the same noise and prompt. The rest: as in study.py."""

SCHEDULE = Schedule(
    steps=80,
    trajectories=16,
    sampler=SamplerSpec(steps=10, batch=32),
    lora_lr=0.02,
    weight_lr=0.004,
)
"""Guidance is that of the pipeline's own ``sampler.json``."""

LONG = replace(SCHEDULE, steps=3000, trajectories=600, lora_lr=0.01, weight_lr=0.002)
LONG_EVERY = 250
LONG_SETTINGS = ("W2A4", "W3A4")
LONG_METHODS = {"mpq-dm": COLOURS[2], "ours": "black", TOKEN: COLOURS[3], MIXED: COLOURS[0], EQUAL: COLOURS[1]}
"""With the colours of their curves."""

LONG_COLUMNS = (
    "model", "setting", "method", "step", "size_bytes", "paired_mse", "fd_fp", "fd_fp_spread", "fd_data",
    "attributes_recognised", "paired_psnr", "n_samples", "commit",
)  # fmt: skip
BEGIN, END = "<!-- latent: written by latent.py -->", "<!-- end of latent -->"

PLACE = {name: place for place, name in enumerate(["full", "full-precision", *ORDER, *RECIPES])}
"""Of settings and methods in the tables."""

Key = tuple[str, str, str, int]


def plan(models: Sequence[str], seeds: int) -> Iterator[Key]:
    """Rows in the order in which they tell most: the main methods of all seeds before the rest; two weight bits and
    four input bits first."""
    rest = [method for method in RECIPES if method not in (*MAIN, CONTROL, TOKEN, SHARED, MIXED, EQUAL)]
    for seed in range(seeds):
        yield from ((m, "full", "full-precision", seed) for m in models)
        yield from ((m, s, method, seed) for s in ORDER for m in models for method in MAIN)
    yield from ((m, s, CONTROL, 0) for s in ORDER[:2] for m in models)
    yield from ((m, s, TOKEN, seed) for seed in range(seeds) for s in ORDER for m in models)
    four = [s for s in ORDER if s.endswith("A4")]
    yield from ((m, s, SHARED, 0) for s in four for m in models)
    yield from ((m, s, way, seed) for seed in range(seeds) for way in (EQUAL, MIXED) for s in four for m in models)
    yield from ((m, s, method, seed) for seed in range(seeds) for s in ORDER for m in models for method in rest)


def digest(method: str) -> str:
    """What the column ``schedule`` says."""
    return RECIPES.get(method, FULL_PRECISION).digest(SCHEDULE)


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """Finished rows by key; `SystemExit` when one is of another schedule."""
    rows: list[dict[str, Any]] = list(csv.DictReader(path.open())) if path.is_file() else []
    other = [r for r in rows if r["schedule"] != digest(r["method"])]
    if other:
        raise SystemExit(
            f"{path} holds {len(other)} rows of another schedule, the first {other[0]['method']} with "
            f"{other[0]['schedule']}, which is {digest(other[0]['method'])} now. Give another --results."
        )
    return {(r["model"], r["setting"], r["method"], int(r["seed"])): r for r in rows}


def run(args: argparse.Namespace) -> None:
    """Make the rows that are not there, and write each when it is finished."""
    done, began = read(args.results), time.perf_counter()
    models: dict[str, Model] = {}
    keys = list(plan(args.models, args.seeds))
    for key in (k for k in keys if k not in done):
        if time.perf_counter() - began > 60 * args.minutes:
            print(f"the time is up; {sum(k in done for k in keys)} of {len(keys)} rows are there", file=sys.stderr)
            return
        name, setting, method, seed = key
        if name not in models:
            models[name] = Model(name, SCHEDULE, args.work)
        model = models[name]
        full = setting == "full"
        made = full_precision_row(model, seed) if full else run_row(model, setting, method, seed, RECIPES[method])
        done[key] = made
        write_results(args.results, done, COLUMNS)
        told = ("size_bytes", "paired_mse", "fd_fp", "fd_data", "attributes_recognised", "paired_psnr", "seconds")
        print(*key, *(f"{k} {made.get(k, '-')}" for k in told), file=sys.stderr, flush=True)


def long(name: str, settings: Sequence[str], methods: Sequence[str], path: Path, work: Path) -> None:
    """Train to the end, and measure on development noise on the way; an interrupted training continues."""
    rows: dict[Any, dict[str, Any]] = {}
    for row in csv.DictReader(path.open()) if path.is_file() else ():
        rows[row["model"], row["setting"], row["method"], int(row["step"])] = row
    model = Model(name, LONG, work)
    for setting, method in ((s, m) for s in settings for m in methods):
        if (name, setting, method, LONG.steps) in rows:
            continue
        bit_map = model.bit_map(RECIPES[method], setting)
        student = model.student(RECIPES[method], bit_map, 0)
        facts = {"size_bytes": size_bytes(model.table, bit_map), "n_samples": LONG.samples, "commit": commit()}

        def watch(
            step: int,
            key: tuple[str, ...] = (name, setting, method),
            student: torch.nn.Module = student,
            facts: dict[str, Any] = facts,
        ) -> None:
            if step % LONG_EVERY or (*key, step) in rows:
                return
            found = measure(model, convert(student).module, CHECK_SEED)
            row = dict(zip(LONG_COLUMNS, (*key, step), strict=False)) | facts | found
            rows[(*key, step)] = row
            write_results(path, rows, LONG_COLUMNS)
            print(*(row.get(k) for k in LONG_COLUMNS), file=sys.stderr, flush=True)

        watch(0)
        folder = work / name / f"long-{setting}-{method}"
        train(model, RECIPES[method], student, 0, folder, {"bit_map": bit_map.digest}, watch)


def describe(table: pd.DataFrame) -> str:
    """Tables of latent.csv, and what follows from them by arithmetic."""
    table = table.sort_values(["setting", "method"], key=lambda names: names.map(PLACE), kind="stable")
    full, quantized = (table[(table["method"] == "full-precision") == is_full] for is_full in (True, False))
    commits = ", ".join(f"{c} ({n} rows)" for c, n in table["commit"].value_counts().items())
    lines = [
        (
            f"{len(table)} rows; {SCHEDULE.steps} optimiser steps of two timesteps and {SCHEDULE.batch} samples; "
            f"{SCHEDULE.samples} evaluation samples a seed. Commits of the code: {commits}. Mean over seeds; ± half "
            "the width of the 95 % bootstrap interval over samples with one seed, half the range over seeds with more."
        ),
        "",
    ]
    for model, rows in quantized.groupby("model", sort=False):
        own = full[full["model"] == model][["fd_data", "attributes_recognised"]].mean()
        lines += [
            f"### {model}",
            "",
            f"Full precision: FD to data {own['fd_data']:.3f}, attributes {100 * own['attributes_recognised']:.1f} %.",
            "",
            "| setting | method | seeds | bytes | paired error | FD to FP | FD to data | attributes | PSNR dB | s |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for (setting, method), g in rows.groupby(["setting", "method"], sort=False):
            cells = " | ".join(_cell(g, key) for key in ("fd_fp", "fd_data"))
            lines.append(
                f"| {setting} | {method} | {len(g)} | {g['size_bytes'].iloc[0]:.0f} | {g['paired_mse'].mean():.4f} | "
                f"{cells} | {100 * g['attributes_recognised'].mean():.1f} % | {_cell(g, 'paired_psnr')} | "
                f"{g['seconds'].mean():.0f} |"
            )
        lines.append("")
    lines += [*_verdicts(quantized, full), "", "`ours` against `mpq-dm`, ratios (PSNR: difference) seed by seed:", ""]
    return "\n".join([*lines, *_paired(quantized, full, "ours", "mpq-dm")])


def describe_long(table: pd.DataFrame) -> str:
    """Paired error and distance by step."""
    shown = {"paired_mse": "paired error", "fd_fp": "FD to FP", "paired_psnr": "PSNR dB"}
    lines = []
    for (model, setting), rows in table.groupby(["model", "setting"], sort=False):
        values = rows.pivot_table(index="step", columns="method", values=list(shown))
        columns = [(key, m) for key in shown for m in LONG_METHODS if m in set(rows["method"])]
        lines += [f"### {model} at {setting}, {LONG.steps} steps", ""]
        lines += ["| step | " + " | ".join(f"{m}, {shown[key]}" for key, m in columns) + " |"]
        lines += ["|---" * (len(columns) + 1) + "|"]
        lines += [
            f"| {step} | " + " | ".join("-" if pd.isna(row[c]) else f"{row[c]:.4g}" for c in columns) + " |"
            for step, row in values.iterrows()
        ]
        lines.append("")
    return "\n".join(lines[:-1])


def draw_long(table: pd.DataFrame) -> Figure:
    """Paired error and distance, with its interval, by step; a row for each setting."""
    shown = {"paired_mse": "paired error", "fd_fp": "FD to full precision"}
    settings = list(dict.fromkeys(table["setting"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.9 * len(settings)), layout="constrained")
        grid = figure.subplots(len(settings), len(shown), squeeze=False)
        for (i, setting), (j, key) in product(enumerate(settings), enumerate(shown)):
            ax = grid[i, j]
            for method, colour in LONG_METHODS.items():
                rows = table[(table["setting"] == setting) & (table["method"] == method)].sort_values("step")
                ax.plot(rows["step"], rows[key], marker="o", ms=3, lw=1, color=colour, label=method)
                if key == "fd_fp":
                    low = np.maximum(rows[key] - rows["fd_fp_spread"], rows[key] * 0.05)
                    ax.fill_between(rows["step"], low, rows[key] + rows["fd_fp_spread"], color=colour, alpha=0.12, lw=0)
            ax.set_yscale("log")
            plain_log_ticks(ax)
            ax.set_title(f"{setting}: {shown[key]}")
            ax.set_xlabel("optimiser steps" if i == len(settings) - 1 else "")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def report(results: Path) -> None:
    """Replace the part of README.md between the markers."""
    readme = results.with_name("README.md")
    head, rest = readme.read_text().split(BEGIN)
    table = pd.read_csv(results, dtype={"commit": str})
    figure = results.with_name("latent.png")
    draw(table).savefig(figure, dpi=110)
    parts = [describe(table), f"![Distances and PSNR by setting and method]({figure.name})"]
    if results.with_name("long.csv").is_file():
        curves = pd.read_csv(results.with_name("long.csv"))
        picture = results.with_name("long.png")
        draw_long(curves).savefig(picture, dpi=110)
        parts += [describe_long(curves), f"![Paired error and FD to full precision by training step]({picture.name})"]
    artifacts.write_text(readme, f"{head}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after this time")
    parser.add_argument("--long", choices=MODELS, help="one long training of this model instead")
    parser.add_argument("--settings", nargs="+", default=LONG_SETTINGS, choices=ORDER, help="of the long training")
    parser.add_argument("--methods", nargs="+", default=MAIN, choices=LONG_METHODS, help="of the long training")
    parser.add_argument("--results", type=Path, default=HERE / "latent.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/mpq_dm_latent"))
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    if args.long:
        long(args.long, args.settings, args.methods, args.results.with_name("long.csv"), args.work / "long")
    elif not args.report_only:
        run(args)
    if args.report_only:
        report(args.results)


if __name__ == "__main__":
    main()
