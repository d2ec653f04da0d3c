"""Trials of the training of ``ours``, on noise that no row of the study uses.

python studies/mpq_dm/trials.py --recipes plain weighted --settings W4A4     # rows that trials.csv lacks

Training noise of seeds 101 and onwards; 128 evaluation samples of noise from seed 1,500,000. A trial is one (model,
setting, recipe, training seed). Choices are made on these rows; what was chosen is then measured by study.py.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from study import HERE, METHODS, MODELS, OURS, SETTINGS, Model, Recipe, Schedule, commit, measure, train

from mpqsearch import artifacts
from mpqsearch.quant import convert

EVALUATION_SEED = 150
"""The study's seed whose evaluation noise begins at 1,500,000."""

PLAIN = replace(OURS, timestep_weights="uniform", clip_norm=1.0, ema=0.0, lr_factor=1.0)
WEIGHTED = replace(PLAIN, timestep_weights="sampler")
SLOWER = 0.25
RECIPES: dict[str, Recipe] = {
    "untrained": replace(PLAIN, trainable=None, relation=False),
    "plain": PLAIN,
    "nearest": replace(PLAIN, gptq=False),
    "clipped": replace(PLAIN, clip_norm=0.1),
    "weighted": WEIGHTED,
    "weighted-averaged": replace(WEIGHTED, ema=0.9),
    "slower": replace(PLAIN, lr_factor=SLOWER),
    "clipped-slower": replace(PLAIN, clip_norm=0.1, lr_factor=SLOWER),
    "weighted-slower": replace(WEIGHTED, lr_factor=SLOWER),
    "weighted-clipped-slower": replace(WEIGHTED, clip_norm=0.1, lr_factor=SLOWER),
    "mpq-dm": METHODS["mpq-dm"],
}
"""``nearest`` rounds to the nearest level, `mpq-dm` as the paper has it; all others by GPTQ. Gradients are
clipped at a norm of 0.1 where the name says so, at 1 else."""

COLUMNS = (
    "model",
    "setting",
    "recipe",
    "training_seed",
    "fd_fp",
    "fd_fp_spread",
    "paired_psnr",
    "fd_data",
    "seconds",
    "digest",
    "commit",
)


def trial(model: Model, setting: str, name: str, seed: int) -> dict[str, Any]:
    """Train one student and measure it."""
    began = time.perf_counter()
    recipe = RECIPES[name]
    bit_map = model.bit_map(recipe, setting)
    student = model.student(recipe, bit_map, seed)
    if recipe.trainable:
        folder = model.work / f"trial-{setting}-{name}-{seed}"
        train(model, recipe, student, seed, folder, {"bit_map": bit_map.digest})
        shutil.rmtree(folder, ignore_errors=True)
    found = measure(model, convert(student).module, EVALUATION_SEED)
    row = {"model": model.name, "setting": setting, "recipe": name, "training_seed": seed, **found}
    row |= {
        "seconds": round(time.perf_counter() - began, 1),
        "digest": recipe.digest(model.schedule),
        "commit": commit(),
    }
    return {k: row[k] for k in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--settings", nargs="+", default=("W4A4", "W2A4"), choices=SETTINGS)
    parser.add_argument("--recipes", nargs="+", default=tuple(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(101, 102), help="of training")
    parser.add_argument("--results", type=Path, default=HERE / "trials.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/mpq_dm"))
    args = parser.parse_args()
    schedule = Schedule()
    rows: list[dict[str, Any]] = list(csv.DictReader(args.results.open())) if args.results.is_file() else []
    done = {(r["model"], r["setting"], r["recipe"], int(r["training_seed"])): r["digest"] for r in rows}
    models: dict[str, Model] = {}
    for name in args.recipes:
        for setting in args.settings:
            for key in args.models:
                for seed in args.seeds[:1] if name == "untrained" else args.seeds:
                    found = done.get((key, setting, name, seed))
                    if found is not None:
                        if found != RECIPES[name].digest(schedule):
                            raise SystemExit(
                                f"{args.results}: {key} {setting} {name} {seed} is of another recipe; give another "
                                "--results"
                            )
                        continue
                    if key not in models:
                        models[key] = Model(key, schedule, args.work)
                    row = trial(models[key], setting, name, seed)
                    rows.append(row)
                    lines = [",".join(COLUMNS), *(",".join(str(r[k]) for k in COLUMNS) for r in rows)]
                    artifacts.write_text(args.results, "\n".join(lines) + "\n")
                    print(", ".join(f"{k} {row[k]}" for k in COLUMNS[:-2]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
