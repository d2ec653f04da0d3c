"""Does the outer search pay? Plain integer programs, random search, TPE, and the search with its closing refinement at
equal cost.

    python studies/outer_search/study.py                 # runs what results.csv lacks, then draws the figure and the
    table python studies/outer_search/study.py --only-report   # draws them from results.csv alone

Rows that are in ``results.csv`` are not run again, so any later run, on any machine, continues. Searches that were
interrupted go on from their journal in ``runs/outer_search``.
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
from mpqsearch.pareto import hypervolume_2d
from mpqsearch.search.results import FLOOR, Box, finalists, finished_trials, importances, measured_points
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import Plan, open_study, work
from mpqsearch.search.surrogate import Candidate
from mpqsearch.stages import Run, layers, profile
from mpqsearch.stages.gptq import moments_of
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

KEPT = ("random-losses", "tpe-losses", "random-narrow", "tpe-narrow")
"""Rows of earlier versions. ``-losses``: only how losses are built was searched, with 20,000 forward passes.
``-narrow``: that and rounding, with ten random trials before TPE models."""

ARMS = ("ilp-layer", "ilp-channel", "ilp-channel-quantizer", *KEPT, "random-search", "outer-search")
"""``ilp-channel-quantizer``: the plain program by channel with `QUANTIZER`, measured without any search."""

QUANTIZER: dict[str, dict[str, Any]] = {
    "W16": {"rounding": "gptq"},
    "WA4": {"rounding": "gptq", "smooth": 0.5, "act_timesteps": "on"},
}
"""What of the quantizer the searches may choose besides, at no or counted storage; the second point of
``outer-search``."""

TARGETS = (2, 3, 4)
SEEDS = (0, 1, 2, 3, 4, 5)
FINALISTS, FINAL_SAMPLES = 2, 32
"""Searches end with their best maps of a size, and the plain program's, on so many further seeds; that is part of their
cost."""

LOSSES = {"exponent": [0.5, 2.0], "low_bits": [-1.0, 2.0]}
CHOICES = {"granularity": ["channel", "layer"], "scheme": ["base", "asymmetric"], "bias_correction": ["base", "off"]}
SPACES: dict[str, dict[str, Any]] = {
    model: LOSSES | {f"role_{role}": [0.2, 5.0] for role in roles} | CHOICES
    for model, roles in (
        ("fmnist-unet", ("conv", "shortcut", "resample", "attention", "time")),
        ("fmnist-dit", ("attention", "feed-forward", "norm", "time")),
    )
}


def settings(model: str, mode: str, seed: int, samples: int, report_samples: int) -> Any:
    """The study of one cell; search seeds and report seeds are its own."""
    quantizer = {name: ["base", value] for name, value in QUANTIZER[mode].items()}
    return config_from(
        {
            "model": {"source": model},
            "sampler": {"steps": 10, "guidance": 2.0},
            "calibration": {
                "samples": 8,
                "probe_inputs": 80,
                "probes": 2,
                "schemes": ["asymmetric", "auto"],
                "smooth": True,
            },
            "allocate": {"budgets": [f"uniform:{t}" for t in TARGETS]},
            "methods": [{"name": "plain", "allocator": "ilp-channel", "scheme": "auto", "bias_correction": True}],
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
                "space": SPACES[model] | quantizer,
            },
        }
    )


def cell(
    model: str, mode: str, seed: int, options: argparse.Namespace, missing: set[str], shared: dict[str, Any]
) -> None:
    """The missing arms of one model, mode and seed. ``shared`` is what all cells of a model have in common."""
    folder = options.runs / model
    config = settings(model, mode, seed, options.samples, options.report_samples)
    if model not in shared:
        base = Run(config=config, folder=folder)
        table = layers(base)
        measured = profile(base, table)
        assert measured is not None
        shared[model] = base, table, measured, moments_of(base, table), {}
    base, table, measured, moments, bank = shared[model]
    run = Run(config=config, folder=folder / f"{mode}-{seed}", moments=moments)
    run.__dict__["denoiser"] = base.denoiser
    objective, plan = study_of(run, table, measured)
    objective.ladder.evaluator.bank = bank
    box = Box.of(objective)
    for arm in (a for a in ARMS if a in missing):
        before = objective.ladder.asked
        if arm.startswith("ilp"):
            theta = QUANTIZER[mode] if arm == "ilp-channel-quantizer" else {}
            chosen = [
                objective.surrogate.candidate({"granularity": arm.split("-")[1], **theta}, b) for b in objective.budgets
            ]
            front = [(c.average_bits, objective.ladder.paired_error(c)) for c in chosen]
            cost = objective.ladder.asked - before
        else:
            chosen, front, cost = searched(arm, mode, run, objective, plan, options)
        volume = box.hypervolume(front)
        rows = [
            row_of(model, mode, arm, seed, t, c, objective.ladder.report(c), volume, cost)
            for t, c in zip(TARGETS, chosen, strict=True)
        ]
        print(f"{model} {mode} seed {seed} {arm}: fd_fp " + ", ".join(f"{r['fd_fp']:.3f}" for r in rows), flush=True)
        append(options.results, rows)


def searched(
    arm: str, mode: str, run: Run, objective: Any, plan: Plan, options: argparse.Namespace
) -> tuple[list[Candidate], list[Any], int]:
    """One search until its forward passes are spent: the map of every budget, all measured points, and the cost."""
    plain = dict(plan.starts[0])  # both begin with the plain program, so neither can end below it on the search seeds
    own = Plan(
        name=arm,
        trials=plan.trials,
        sampler="random" if arm == "random-search" else "tpe",
        pruner=plan.pruner,
        seed=plan.seed,
        starts=[plain] if arm == "random-search" else [plain, {**plain, **QUANTIZER[mode]}],
        context=objective.context,
    )
    study = open_study(own, open_storage(run.path(f"{arm}.journal")))

    def spent() -> int:
        return sum(int(t.user_attrs["record"]["forwards"]) for t in finished_trials(study))

    closing = len(objective.budgets) * (FINALISTS + 1) * FINAL_SAMPLES * objective.ladder.evaluator.forwards_per_sample
    work(study, own, objective.front, stop=lambda: spent() >= options.cost - closing)
    points = measured_points(finished_trials(study))
    before = objective.ladder.asked
    winners = [finalists(objective, points, budget, FINALISTS)[0]["candidate"] for budget in objective.budgets]
    found = importances(study)
    if found:
        write_text(
            run.path(f"{arm}-importances.csv"),
            "parameter,importance\n" + "".join(f"{k},{v:.4f}\n" for k, v in found.items()),
        )
    return winners, [(p["average_bits"], p["paired"]) for p in points], spent() + objective.ladder.asked - before


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
    every.sort(
        key=lambda r: (order[r["model"]], order[r["mode"]], int(r["seed"]), order[r["arm"]], int(r["target_bits"]))
    )
    lines = [",".join(COLUMNS), *(",".join(str(r[c]) for c in COLUMNS) for r in every)]
    write_text(path, "\n".join(lines) + "\n")


def report(results: Path) -> None:
    """The figure beside a table of results, and the table of the README where they are the study's own."""
    rows = read(results)
    if not rows:
        return
    present = [(m, k) for m in MODELS for k in MODES if any(r["model"] == m and r["mode"] == k for r in rows)]
    draw(rows, present, results.with_name("front"))
    text = [
        "| model, mode | arm | "
        + " | ".join(f"FD to FP, {t} bit" for t in TARGETS)
        + " | hypervolume | of FD | seeds | forward passes |"
    ]
    text.append("|---|---|" + "---|" * (len(TARGETS) + 4))
    for model, mode in present:
        for arm in ARMS:
            mine = [r for r in rows if (r["model"], r["mode"], r["arm"]) == (model, mode, arm)]
            if not mine:
                continue
            cells = [spread([float(r["fd_fp"]) for r in mine if int(r["target_bits"]) == t]) for t in TARGETS]
            volume = spread([float(r["hypervolume"]) for r in mine if int(r["target_bits"]) == TARGETS[0]], places=4)
            reported = spread(list(volumes(rows, model, mode, arm).values()), places=4)
            cost = f"{np.mean([float(r['evaluations']) for r in mine]):.0f}"
            seeds = ", ".join(sorted({r["seed"] for r in mine}))
            text.append(
                f"| {model}, {mode} | {arm} | " + " | ".join(cells) + f" | {volume} | {reported} | {seeds} | {cost} |"
            )
    text += ["", *comparisons(rows, present)]
    absent = [
        f"{m} {k} seed {s}: {', '.join(a for a in ARMS if a not in KEPT and not has(rows, m, k, a, s))}"
        for m, k in itertools.product(MODELS, MODES)
        for s in SEEDS
        if not all(has(rows, m, k, a, s) for a in ARMS if a not in KEPT)
    ]
    text += ["", "Rows that were not run yet: " + ("; ".join(absent) + "." if absent else "none.")]
    readme = HERE / "README.md"
    if readme.exists() and results == HERE / "results.csv":
        head, _, rest = readme.read_text().partition("<!-- table -->\n")
        _, _, tail = rest.partition("<!-- end of table -->\n")
        write_text(readme, head + "<!-- table -->\n" + "\n".join(text) + "\n<!-- end of table -->\n" + tail)
    print("\n".join(text))


def volumes(rows: list[dict[str, str]], model: str, mode: str, arm: str) -> dict[str, float]:
    """Hypervolume on the report seeds, by seed: of the handed-out maps in stored bits and log FD to full precision.

    The box reaches from the plain program by layer at the smallest size to 8 bits and to `FLOOR` of its distance.
    """
    found = {}
    for seed in sorted({r["seed"] for r in rows if (r["model"], r["mode"]) == (model, mode)}):
        mine = [r for r in rows if (r["model"], r["mode"], r["seed"]) == (model, mode, seed)]
        corner = [r for r in mine if r["arm"] == "ilp-layer" and int(r["target_bits"]) == TARGETS[0]]
        points = [r for r in mine if r["arm"] == arm]
        if not corner or len(points) != len(TARGETS):
            continue
        left, top = float(corner[0]["average_bits"]), math.log(float(corner[0]["fd_fp"]))
        low = top + math.log(FLOOR)
        scaled = [
            (
                max((float(r["average_bits"]) - left) / (8 - left), 0.0),
                (max(math.log(max(float(r["fd_fp"]), 1e-30)), low) - low) / (top - low),
            )
            for r in points
        ]
        found[seed] = hypervolume_2d(scaled, (1.0, 1.0))
    return found


def comparisons(rows: list[dict[str, str]], present: list[tuple[str, str]]) -> list[str]:
    """A table of ``outer-search`` against every other arm, seed by seed: ratios of FD, and paired differences of
    hypervolumes."""
    text = [
        (
            "`outer-search` against the other arms, over the seeds that both have: geometric mean of the ratios of FD, "
            "and mean difference of the"
        ),
        "hypervolumes with its standard error. Rows of a model alone: all pairs of its two modes together.",
        "",
        "| model, mode | against | seeds | "
        + " | ".join(f"FD ratio, {t} bit" for t in TARGETS)
        + " | hypervolume | of FD |",
        "|---|---|---|" + "---|" * (len(TARGETS) + 2),
    ]
    pairs: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for model, mode in present:

        def value(arm: str, seed: str, target: int, column: str, model: str = model, mode: str = mode) -> float:
            return next(
                float(r[column])
                for r in rows
                if (r["model"], r["mode"], r["arm"], r["seed"], int(r["target_bits"]))
                == (model, mode, arm, seed, target)
            )

        own = volumes(rows, model, mode, "outer-search")
        for arm in (a for a in ARMS if a != "outer-search"):
            other = volumes(rows, model, mode, arm)
            seeds = sorted(set(own) & set(other))
            if not seeds:
                continue
            ratios = [
                np.exp(
                    np.mean([math.log(value("outer-search", s, t, "fd_fp") / value(arm, s, t, "fd_fp")) for s in seeds])
                )
                for t in TARGETS
            ]
            searched_seeds = [
                value("outer-search", s, TARGETS[0], "hypervolume") - value(arm, s, TARGETS[0], "hypervolume")
                for s in seeds
            ]
            of_fd = [own[s] - other[s] for s in seeds]
            for total, part in zip(pairs.setdefault((model, arm), ([], [])), (searched_seeds, of_fd), strict=True):
                total.extend(part)
            text.append(
                f"| {model}, {mode} | {arm} | {len(seeds)} | "
                + " | ".join(f"{r:.2f}" for r in ratios)
                + f" | {difference(searched_seeds)} | {difference(of_fd)} |"
            )
    empty = " |" * len(TARGETS)
    for (model, arm), (searched, of_fd) in pairs.items():
        if arm not in KEPT:
            text.append(
                f"| {model} | {arm} | {len(of_fd)} pairs |{empty} {difference(searched)} | {difference(of_fd)} |"
            )
    return text


def difference(values: list[float]) -> str:
    """Mean with its standard error over seeds."""
    text = f"{np.mean(values):+.4f}"
    return text if len(values) < 2 else f"{text} ± {math.sqrt(np.var(values, ddof=1) / len(values)):.4f}"


def draw(rows: list[dict[str, str]], present: list[tuple[str, str]], path: Path) -> None:
    """FD to full precision against stored bits, a panel for each model and mode; the arms of earlier versions stand in
    the table alone."""
    from matplotlib.figure import Figure

    from mpqsearch.report.figures import render, save_figure
    from mpqsearch.report.style import series_styles

    def panels() -> Figure:
        figure = Figure(figsize=(3.6 * len(present), 3.6), layout="constrained")
        for ax, (model, mode) in zip(np.atleast_1d(figure.subplots(1, len(present))), present, strict=True):
            ax.set_yscale("log")
            for arm, style in series_styles([a for a in ARMS if a not in KEPT]).items():
                mine = [r for r in rows if (r["model"], r["mode"], r["arm"]) == (model, mode, arm)]
                if not mine:
                    continue
                bits = [
                    np.mean([float(r["average_bits"]) for r in mine if int(r["target_bits"]) == t]) for t in TARGETS
                ]
                values = [[float(r["fd_fp"]) for r in mine if int(r["target_bits"]) == t] for t in TARGETS]
                middle = [float(np.exp(np.mean(np.log(v)))) for v in values]
                bars = [  # of one seed the mean may be off by a rounding
                    [max(m - min(v), 0.0) for m, v in zip(middle, values, strict=True)],
                    [max(max(v) - m, 0.0) for m, v in zip(middle, values, strict=True)],
                ]
                ax.errorbar(
                    bits,
                    middle,
                    bars,
                    color="black" if arm == "outer-search" else style.colour,
                    marker=style.marker,
                    capsize=2,
                    label=arm,
                )
            ax.set_title(f"{model}, {mode}", loc="left")
            ax.set_xlabel("stored bits per parameter")
        figure.axes[0].set_ylabel("Fréchet distance to full precision")
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS) - len(KEPT)
        )
        return figure

    save_figure(render(panels), path)


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
    parser.add_argument("--cost", type=int, default=12_000, help="forward passes of each search (one sample, one call)")
    parser.add_argument("--samples", type=int, default=8, help="search seeds")
    parser.add_argument("--report-samples", type=int, default=128)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument(
        "--arms", nargs="*", default=[a for a in ARMS if a not in KEPT], choices=[a for a in ARMS if a not in KEPT]
    )
    parser.add_argument("--only-report", action="store_true")
    options = parser.parse_args()
    if not options.only_report:
        shared: dict[str, Any] = {}
        cells = [(m, k, s) for m, k in itertools.product(options.models, options.modes) for s in options.seeds]
        for model, mode, seed in sorted(cells, key=lambda c: c[2]):
            missing = {
                a
                for a in ARMS
                if a in options.arms and a not in KEPT and not has(read(options.results), model, mode, a, seed)
            }
            if missing:
                cell(model, mode, seed, options, missing, shared)
    report(options.results)


if __name__ == "__main__":
    main()
