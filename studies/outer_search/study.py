"""Does the outer search pay? Plain integer programs, random search, TPE, and the search with its closing refinement at equal cost.

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
from mpqsearch.config import INPUT_SEEDS, config_from
from mpqsearch.pareto import hypervolume_2d
from mpqsearch.search.objective import Point
from mpqsearch.search.refine import RefineSpec, refine
from mpqsearch.search.results import FLOOR, Box, finalists, finished_trials, importances, measured_points, winner_candidates
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import Plan, counts, open_study, work
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

ARMS = ("ilp-layer", "ilp-channel", "ilp-channel-inputs", "random-search", "tpe-search", "outer-search")
"""``ilp-channel-inputs`` (``WA4`` only): the plain program by channel with the settings of inputs in `INPUTS`. ``random-search`` and ``tpe-search``
end with their best maps on the final seeds. ``outer-search`` measures its first points, and TPE's where the cost leaves room, and refines
the best map of every size (`mpqsearch.search.refine`)."""

INPUTS = {"prescale": "layers", "act_timesteps": "on"}
"""Settings of four-bit inputs among the first points of ``outer-search``, beside searched zero points: pre-scaling with strengths by layer,
and a scale for each timestep, which the size pays for."""

TARGETS = (2, 3, 4)
SEEDS = (0, 1, 2)
FINALISTS, FINAL_SAMPLES = 2, 48
"""Searches end with their best maps of a size, and the plain program's, on so many further seeds; that is part of their cost."""

REFINE = RefineSpec(rounds=2, slope_samples=16, samples=16, shares=(0.2, 0.5), decay=0.5)

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


def settings(model: str, mode: str, seed: int, samples: int, report_samples: int, *, inputs: bool = False) -> Any:
    """The study of one cell; search seeds and report seeds are its own. ``inputs``: with searched zero points and priced pre-scaling."""
    return config_from(
        {
            "model": {"source": model},
            "sampler": {"steps": 10, "guidance": 2.0},
            "calibration": {"samples": 8, "probe_inputs": 80, "probes": 2, "codebooks": ["affine", "auto"], "prescale": inputs},
            "activations": {"zero_points": inputs},
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
                "space": SPACES[model] | ({"prescale": ["base", "layers"], "act_timesteps": ["base", "on"]} if inputs else {}),
            },
        }
    )


def study_at(model: str, mode: str, seed: int, options: argparse.Namespace, *, inputs: bool) -> tuple[Run, Any, Plan]:
    """Run, objective and plan of one cell."""
    folder = options.runs / f"{model}{'-inputs' * inputs}"
    config = settings(model, mode, seed, options.samples, options.report_samples, inputs=inputs)
    base = Run(config=config, folder=folder)
    table = layers(base)
    measured = profile(base, table)
    assert measured is not None
    run = Run(config=config, folder=folder / f"{mode}-{seed}")
    run.__dict__["denoiser"] = base.denoiser
    return run, *study_of(run, table, measured)


def cell(model: str, mode: str, seed: int, options: argparse.Namespace, missing: set[str]) -> None:
    """The missing arms of one model, mode and seed."""
    box = Box.of(study_at(model, mode, seed, options, inputs=False)[1])  # the same for all arms
    for inputs in (False, True):
        # Of four-bit inputs the plain arms, random search and TPE know nothing but a width.
        mine = [a for a in ARMS if a in missing and (mode == "WA4" and a in ("ilp-channel-inputs", "outer-search")) == inputs]
        if not mine:
            continue
        run, objective, plan = study_at(model, mode, seed, options, inputs=inputs)
        for arm in mine:
            before = objective.ladder.asked
            if arm.startswith("ilp"):
                theta = {"granularity": arm.split("-")[1], **(INPUTS if inputs else {})}
                chosen = [objective.surrogate.candidate(theta, b) for b in objective.budgets]
                front = [(c.average_bits, objective.ladder.paired_error(c)) for c in chosen]
                cost = objective.ladder.asked - before
            else:
                chosen, front, cost = searched(arm, run, objective, plan, options, inputs=inputs)
            volume = box.hypervolume(front)
            rows = [
                row_of(model, mode, arm, seed, t, c, objective.ladder.report(c), volume, cost)
                for t, c in zip(TARGETS, chosen, strict=True)
            ]
            print(f"{model} {mode} seed {seed} {arm}: fd_fp " + ", ".join(f"{r['fd_fp']:.3f}" for r in rows), flush=True)
            append(options.results, rows)


def searched(
    arm: str, run: Run, objective: Any, plan: Plan, options: argparse.Namespace, *, inputs: bool
) -> tuple[list[Candidate], list[Any], int]:
    """One search until its forward passes are spent: the map of every budget, all measured points, and the cost."""
    starts = [dict(plan.starts[0])]  # all begin with the plain program, so none can end below it on the search seeds
    if inputs:
        starts += [{**starts[0], **INPUTS}]
    own = Plan(
        name=arm,
        trials=plan.trials,
        sampler="random" if arm == "random-search" else "tpe",
        pruner=plan.pruner,
        seed=plan.seed,
        starts=starts,
        context=objective.context,
    )
    study = open_study(own, open_storage(run.path(f"{arm}.journal")))

    def spent() -> int:
        return sum(int(t.user_attrs["record"]["forwards"]) for t in finished_trials(study))

    descent = arm == "outer-search"
    judged = len(objective.budgets) * (2 if descent else FINALISTS + 1) * FINAL_SAMPLES
    if descent:
        each = 4 * REFINE.slope_samples + (1 + len(REFINE.shares)) * REFINE.samples
        judged += len(objective.budgets) * REFINE.rounds * each
    closing = judged * objective.ladder.evaluator.forwards_per_sample
    work(
        study,
        own,
        objective.front,
        folder=run.path("workers"),
        stop=lambda: counts(study).finished >= len(starts) and spent() >= options.cost - closing,
    )
    points = measured_points(finished_trials(study))
    before = objective.ladder.asked
    winners = []
    for budget in objective.budgets:
        if not descent:
            winners.append(finalists(objective, points, budget, FINALISTS)[0]["candidate"])
            continue
        c = run.config.search
        first = winner_candidates(objective, points, budget, 1)[0]
        refined = refine(
            objective.surrogate,
            objective.ladder,
            first["candidate"],
            REFINE,
            first_seed=c.first_seed + c.samples + INPUT_SEEDS + c.final_samples,
        )
        for row in refined.rounds:
            tried = ", ".join(f"{t['share']:g}: {t['change'] / row['error']:+.2f}" for t in row["tried"])
            print(f"  {budget.label()} round {row['round']}: {tried}{'' if row['accepted'] else ' (none taken)'}", flush=True)
        last = refined.candidate
        more = {**Point.of(last, paired=objective.ladder.paired_error(last)).to_data(), "candidate": last} | {
            k: first[k] for k in ("trial", "params")
        }
        points.append(more)
        winners.append(finalists(objective, [], budget, 0, [more])[0]["candidate"])
    found = importances(study)
    if found and arm == "tpe-search":
        write_text(run.path("importances.csv"), "parameter,importance\n" + "".join(f"{k},{v:.4f}\n" for k, v in found.items()))
    front = [(p["average_bits"], p["paired"]) for p in points]
    return winners, front, spent() + objective.ladder.asked - before


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
            text.append(f"| {model}, {mode} | {arm} | " + " | ".join(cells) + f" | {volume} | {reported} | {seeds} | {cost} |")
    text += ["", *comparisons(rows, present)]
    absent = [
        f"{m} {k} seed {s}: {', '.join(a for a in arms_of(k) if not has(rows, m, k, a, s))}"
        for m, k, s in itertools.product(MODELS, MODES, SEEDS)
        if not all(has(rows, m, k, a, s) for a in arms_of(k))
    ]
    text += ["", "Rows that were not run yet: " + ("; ".join(absent) + "." if absent else "none.")]
    readme = HERE / "README.md"
    if readme.exists() and results == HERE / "results.csv":
        head, _, rest = readme.read_text().partition("<!-- table -->\n")
        _, _, tail = rest.partition("<!-- end of table -->\n")
        write_text(readme, head + "<!-- table -->\n" + "\n".join(text) + "\n<!-- end of table -->\n" + tail)
    print("\n".join(text))


def arms_of(mode: str) -> list[str]:
    """The arms of a mode."""
    return [a for a in ARMS if mode == "WA4" or a != "ilp-channel-inputs"]


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
    """A table of ``outer-search`` against every other arm, seed by seed: ratios of FD, and paired differences of hypervolumes."""
    text = [
        "`outer-search` against the other arms, over the seeds that both have: geometric mean of the ratios of FD, and mean difference of the",
        "hypervolumes with its standard error.",
        "",
        "| model, mode | against | seeds | " + " | ".join(f"FD ratio, {t} bit" for t in TARGETS) + " | hypervolume | of FD |",
        "|---|---|---|" + "---|" * (len(TARGETS) + 2),
    ]
    for model, mode in present:

        def value(arm: str, seed: str, target: int, column: str, model: str = model, mode: str = mode) -> float:
            return next(
                float(r[column])
                for r in rows
                if (r["model"], r["mode"], r["arm"], r["seed"], int(r["target_bits"])) == (model, mode, arm, seed, target)
            )

        own = volumes(rows, model, mode, "outer-search")
        for arm in (a for a in ARMS if a != "outer-search"):
            other = volumes(rows, model, mode, arm)
            seeds = sorted(set(own) & set(other))
            if not seeds:
                continue
            ratios = [
                np.exp(np.mean([math.log(value("outer-search", s, t, "fd_fp") / value(arm, s, t, "fd_fp")) for s in seeds]))
                for t in TARGETS
            ]
            searched_seeds = [
                value("outer-search", s, TARGETS[0], "hypervolume") - value(arm, s, TARGETS[0], "hypervolume") for s in seeds
            ]
            text.append(
                f"| {model}, {mode} | {arm} | {len(seeds)} | "
                + " | ".join(f"{r:.2f}" for r in ratios)
                + f" | {difference(searched_seeds)} | {difference([own[s] - other[s] for s in seeds])} |"
            )
    return text


def difference(values: list[float]) -> str:
    """Mean with its standard error over seeds."""
    text = f"{np.mean(values):+.4f}"
    return text if len(values) < 2 else f"{text} ± {math.sqrt(np.var(values, ddof=1) / len(values)):.4f}"


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
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--only-report", action="store_true")
    options = parser.parse_args()
    if not options.only_report:
        for seed, mode, model in itertools.product(options.seeds, options.modes, options.models):
            missing = {a for a in arms_of(mode) if a in options.arms and not has(read(options.results), model, mode, a, seed)}
            if missing:
                cell(model, mode, seed, options, missing)
    report(options.results)


if __name__ == "__main__":
    main()
