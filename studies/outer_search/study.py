"""Does the outer search pay? Plain integer programs, random search and the outer search at equal evaluation cost.

    python studies/outer_search/study.py                 # runs what results.csv lacks, then draws the figure and the table
    python studies/outer_search/study.py --only-report   # draws them from results.csv alone

Rows that are in ``results.csv`` are not run again, so any later run, on any machine, continues. Searches that were interrupted go on
from their journal in ``runs/outer_search``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mpqsearch.artifacts import write_text
from mpqsearch.config import config_from
from mpqsearch.search.results import Box, finalists, finished_trials, importances, measured_points
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import Plan, open_study, work
from mpqsearch.search.surrogate import Candidate
from mpqsearch.stages import Run, layers, profile
from mpqsearch.stages.searching import study_of

HERE = Path(__file__).parent
COLUMNS = (
    "model",
    "mode",
    "arm",
    "seed",
    "target_bits",
    "average_bits",
    "size_bytes",
    "fd_fp",
    "fd_data",
    "paired_psnr",
    "hypervolume",
    "evaluations",
)
MODELS = ("fmnist-unet", "fmnist-dit")
MODES = {"W16": 16, "WA4": 4}
"""``W16``: weights only. ``WA4``: activations of searched layers at 4 bits as well."""

ARMS = ("ilp-layer", "ilp-channel", "random-search", "outer-search")
TARGETS = (2, 3, 4)
SEEDS = (0, 1, 2)
FINALISTS, FINAL_SAMPLES = 3, 24
"""Both searches end with their best three maps a size, and the plain program's, on so many further seeds; that is part of their cost."""

SPACES: dict[str, dict[str, Any]] = {
    "fmnist-unet": {
        "exponent": [0.5, 2.0],
        "row_exponent": [0.5, 2.0],
        "low_bits": [-1.0, 2.0],
        "kurtosis": [-1.0, 1.0],
        "depth": [-3.0, 3.0],
        "role_conv": [0.2, 5.0],
        "role_shortcut": [0.2, 5.0],
        "role_resample": [0.2, 5.0],
        "role_attention": [0.2, 5.0],
        "role_time": [0.2, 5.0],
        "granularity": ["channel", "layer"],
    },
    "fmnist-dit": {
        "exponent": [0.5, 2.0],
        "row_exponent": [0.5, 2.0],
        "low_bits": [-1.0, 2.0],
        "kurtosis": [-1.0, 1.0],
        "depth": [-3.0, 3.0],
        "role_attention": [0.2, 5.0],
        "role_feed-forward": [0.2, 5.0],
        "role_norm": [0.2, 5.0],
        "role_time": [0.2, 5.0],
        "granularity": ["channel", "layer"],
    },
}


def settings(model: str, mode: str, seed: int, samples: int, report_samples: int) -> Any:
    """The study of one cell; search seeds and report seeds are its own."""
    return config_from(
        {
            "model": {"source": model},
            "sampler": {"steps": 10, "guidance": 2.0},
            "calibration": {"samples": 8, "probe_inputs": 80, "probes": 2, "codebooks": ["affine", "auto"]},
            "allocate": {"budgets": [f"uniform:{t}" for t in TARGETS]},
            "methods": [{"name": "plain", "allocator": "ilp-channel", "codebook": "auto", "bias_correction": True}],
            "evaluate": {"samples": report_samples, "first_seed": 10_000 * seed},
            "search": {
                "trials": 1000,
                "samples": samples,
                "chunk": 4,
                "inputs": 16,
                "finalists": FINALISTS,
                "final_samples": FINAL_SAMPLES,
                "first_seed": 2_000_000 + 1000 * seed,
                "seed": seed,
                "act_bits": MODES[mode],
                "space": SPACES[model],
            },
        }
    )


def cell(model: str, mode: str, seed: int, options: argparse.Namespace, missing: set[str]) -> list[dict[str, Any]]:
    """The missing arms of one model, mode and seed."""
    folder = options.runs / model
    config = settings(model, mode, seed, options.samples, options.report_samples)
    base = Run(config=config, folder=folder)
    table = layers(base)
    measured = profile(base, table)
    assert measured is not None
    run = Run(config=config, folder=folder / f"{mode}-{seed}")
    run.__dict__["denoiser"] = base.denoiser
    objective, plan = study_of(run, table, measured)
    box = Box.of(objective)
    rows = []
    for arm in (a for a in ARMS if a in missing):
        before = objective.ladder.asked
        if arm.startswith("ilp"):
            theta = {"granularity": arm.split("-")[1]}
            chosen = [objective.surrogate.candidate(theta, b) for b in objective.budgets]
            front = [(c.average_bits, objective.ladder.paired_error(c)) for c in chosen]
            cost = objective.ladder.asked - before
        else:
            chosen, front, cost = searched(arm, run, objective, plan, options)
        for target, candidate in zip(TARGETS, chosen, strict=True):
            rows.append(
                row_of(model, mode, arm, seed, target, candidate, objective.ladder.report(candidate), box.hypervolume(front), cost)
            )
        print(
            f"{model} {mode} seed {seed} {arm}: fd_fp " + ", ".join(f"{r['fd_fp']:.3f}" for r in rows[-len(TARGETS) :]), flush=True
        )
        append(options.results, rows[-len(TARGETS) :])
    return rows


def searched(arm: str, run: Run, objective: Any, plan: Plan, options: argparse.Namespace) -> tuple[list[Candidate], list[Any], int]:
    """One search until its forward passes are spent: the best map of every budget, all measured points, and the cost."""
    random = arm == "random-search"
    own = Plan(
        name=arm,
        trials=plan.trials,
        sampler="random" if random else "tpe",
        pruner=plan.pruner,
        seed=plan.seed,
        starts=plan.starts[:1],  # both begin with the plain program, so neither can end below it on the search seeds
        context=objective.context,
    )
    study = open_study(own, open_storage(run.path(f"{arm}.journal")))

    def spent() -> int:
        return sum(int(t.user_attrs["record"]["forwards"]) for t in finished_trials(study))

    finals = len(objective.budgets) * (FINALISTS + 1) * FINAL_SAMPLES * objective.ladder.evaluator.forwards_per_sample
    work(study, own, objective.front, folder=run.path("workers"), stop=lambda: spent() >= options.cost - finals)
    points = measured_points(finished_trials(study))
    winners = [finalists(objective, points, b, FINALISTS)[0]["candidate"] for b in objective.budgets]
    found = importances(study)
    if found and not random:
        write_text(run.path("importances.csv"), "parameter,importance\n" + "".join(f"{k},{v:.4f}\n" for k, v in found.items()))
    return winners, [(p["average_bits"], p["paired"]) for p in points], spent() + finals


def row_of(
    model: str,
    mode: str,
    arm: str,
    seed: int,
    target: int,
    candidate: Candidate,
    report: dict[str, float],
    volume: float,
    cost: int,
) -> dict[str, Any]:
    """One row of the table."""
    return {
        "model": model,
        "mode": mode,
        "arm": arm,
        "seed": seed,
        "target_bits": target,
        "average_bits": round(candidate.average_bits, 5),
        "size_bytes": candidate.size_bytes,
        "fd_fp": round(report["fd_fp"], 5),
        "fd_data": round(report["fd_data"], 5),
        "paired_psnr": round(report["paired_psnr"], 4),
        "hypervolume": round(volume, 5),
        "evaluations": cost,
    }


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table again with more rows, atomically and in order."""
    every = [*read(path), *rows]
    order = {name: i for i, name in enumerate((*MODELS, *MODES, *ARMS))}
    every.sort(key=lambda r: (order[r["model"]], order[r["mode"]], int(r["seed"]), order[r["arm"]], int(r["target_bits"])))
    lines = [",".join(COLUMNS), *(",".join(str(r[c]) for c in COLUMNS) for r in every)]
    write_text(path, "\n".join(lines) + "\n")


def report(results: Path) -> None:
    """The figure and the table of the README, from ``results.csv`` alone."""
    rows = read(results)
    if not rows:
        return
    present = [(m, k) for m in MODELS for k in MODES if any(r["model"] == m and r["mode"] == k for r in rows)]
    draw(rows, present)
    text = [
        "| model, mode | arm | " + " | ".join(f"FD to FP, {t} bit" for t in TARGETS) + " | hypervolume | seeds | forward passes |"
    ]
    text.append("|---|---|" + "---|" * (len(TARGETS) + 3))
    for model, mode in present:
        for arm in ARMS:
            mine = [r for r in rows if (r["model"], r["mode"], r["arm"]) == (model, mode, arm)]
            if not mine:
                continue
            cells = [spread([float(r["fd_fp"]) for r in mine if int(r["target_bits"]) == t]) for t in TARGETS]
            volume = spread([float(r["hypervolume"]) for r in mine if int(r["target_bits"]) == TARGETS[0]], places=4)
            cost = f"{np.mean([float(r['evaluations']) for r in mine]):.0f}"
            seeds = ", ".join(sorted({r["seed"] for r in mine}))
            text.append(f"| {model}, {mode} | {arm} | " + " | ".join(cells) + f" | {volume} | {seeds} | {cost} |")
    absent = [
        f"{m} {k} seed {s}: {', '.join(a for a in ARMS if not has(rows, m, k, a, s))}"
        for m, k, s in itertools.product(MODELS, MODES, SEEDS)
        if not all(has(rows, m, k, a, s) for a in ARMS)
    ]
    text += ["", "Rows that were not run yet: " + ("; ".join(absent) + "." if absent else "none.")]
    readme = HERE / "README.md"
    if readme.exists() and results == HERE / "results.csv":
        head, _, rest = readme.read_text().partition("<!-- table -->\n")
        _, _, tail = rest.partition("<!-- end of table -->\n")
        write_text(readme, head + "<!-- table -->\n" + "\n".join(text) + "\n<!-- end of table -->\n" + tail)
    print("\n".join(text))


def draw(rows: list[dict[str, str]], present: list[tuple[str, str]]) -> None:
    """FD to full precision against stored bits, a panel for each model and mode."""
    from matplotlib.figure import Figure

    from mpqsearch.report.figures import render, save_figure
    from mpqsearch.report.style import series_styles

    def panels() -> Figure:
        figure = Figure(figsize=(4.2 * len(present), 3.4), layout="constrained")
        for ax, (model, mode) in zip(np.atleast_1d(figure.subplots(1, len(present))), present, strict=True):
            ax.set_yscale("log")
            for arm, style in series_styles(ARMS).items():
                mine = [r for r in rows if (r["model"], r["mode"], r["arm"]) == (model, mode, arm)]
                if not mine:
                    continue
                bits = [np.mean([float(r["average_bits"]) for r in mine if int(r["target_bits"]) == t]) for t in TARGETS]
                values = [[float(r["fd_fp"]) for r in mine if int(r["target_bits"]) == t] for t in TARGETS]
                middle = [float(np.exp(np.mean(np.log(v)))) for v in values]
                bars = [
                    [m - min(v) for m, v in zip(middle, values, strict=True)],
                    [max(v) - m for m, v in zip(middle, values, strict=True)],
                ]
                ax.errorbar(bits, middle, bars, color=style.colour, marker=style.marker, capsize=2, label=arm)
            ax.set_title(f"{model}, {mode}", loc="left")
            ax.set_xlabel("stored bits per parameter")
            ax.set_ylabel("Fréchet distance to full precision")
            ax.legend()
        return figure

    save_figure(render(panels), HERE / "front")


def has(rows: list[dict[str, str]], model: str, mode: str, arm: str, seed: int) -> bool:
    """Whether an arm of a cell is in the table with all its targets."""
    mine = [r for r in rows if (r["model"], r["mode"], r["arm"], int(r["seed"])) == (model, mode, arm, seed)]
    return len(mine) == len(TARGETS)


def spread(values: list[float], places: int = 3) -> str:
    """Mean, and the sample standard deviation over seeds where there are several."""
    if not values:
        return ""
    text = f"{np.mean(values):.{places}f}"
    return text if len(values) < 2 else f"{text} ± {math.sqrt(np.var(values, ddof=1)):.{places}f}"


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/outer_search"))
    parser.add_argument("--cost", type=int, default=20_000, help="forward passes of each search (one sample, one call)")
    parser.add_argument("--samples", type=int, default=8, help="search seeds")
    parser.add_argument("--report-samples", type=int, default=128)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--only-report", action="store_true")
    options = parser.parse_args()
    if not options.only_report:
        for seed, mode, model in itertools.product(options.seeds, options.modes, options.models):
            missing = {a for a in ARMS if not has(read(options.results), model, mode, a, seed)}
            if missing:
                cell(model, mode, seed, options, missing)
    report(options.results)


if __name__ == "__main__":
    main()
