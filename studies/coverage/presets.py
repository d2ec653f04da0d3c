"""The models that `mpqsearch init` has presets for: layers and weights of their true shapes, exact, and what a profile
of the weights alone costs.

Run from the repository root: ``python -m studies.coverage.presets`` writes the tables of `studies/guides/presets.md`,
from shapes alone (structures on the device ``meta``: no weights). ``python -m studies.coverage.presets FOLDER [NAME
...]`` measures, too: a denoiser with one block of each kind and random weights is written under FOLDER (U-Nets are
written whole) and ``profile --weights-only`` runs on it in a process of its own, on one thread.
"""

from __future__ import annotations

import csv
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpqsearch.cli.init import presets
from studies.coverage.stable_diffusion import measured

HERE = Path(__file__).parent
TABLE = HERE / "presets.csv"
PAGE = HERE.parent / "guides" / "presets.md"
START, END = "<!-- presets: made by studies/coverage/presets.py -->", "<!-- end of presets -->"
COLUMNS = ("model", "weights", "cpu_seconds", "peak_gigabytes")
BLOCKS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
"""Arguments of transformers that say how many blocks of a kind there are."""
START_UP = "fmnist-unet"
"""A model of which a profile is all start-up: its time is taken off."""


class Shape(NamedTuple):
    model: str
    denoiser: str
    config: Mapping[str, Any]
    kept: Mapping[str, int]


def shapes() -> Iterator[Shape]:
    for preset in presets()["preset"]:
        for model, config in preset.get("shapes", {}).items():
            yield Shape(model, preset["denoiser"], config, preset["study"]["policy.overrides"])


def build(shape: Shape, *, one_block: bool = False) -> Any:
    """The denoiser on the device ``meta``."""
    import diffusers
    import torch

    kind = getattr(diffusers, shape.denoiser)
    ones = {key: 1 for key in BLOCKS if one_block and key in inspect.signature(kind).parameters}
    with torch.device("meta"):
        return kind(**{**shape.config, **ones})


def facts(shape: Shape) -> tuple[int, int, float]:
    """Layers, their weights, and the share of these at 16 bits."""
    from mpqsearch.core import Policy
    from mpqsearch.models.discover import table_of

    table, policy = table_of(build(shape), [], name=shape.model), Policy(overrides=shape.kept)
    weights = sum(layer.n_weights for layer in table)
    return len(table), weights, sum(la.n_weights for la in table if policy.fixed_width(la) == 16) / weights


def write_model(shape: Shape, folder: Path) -> int:
    """One block of each kind with random weights, bfloat16; gives the number of weights."""
    import torch

    module = build(shape, one_block=True).to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    module.save_pretrained(folder)
    return sum(p.numel() for p in module.parameters())


def measure(shape: Shape, folder: Path, start_up: float) -> dict[str, str]:
    shutil.rmtree(folder, ignore_errors=True)
    weights = write_model(shape, folder / "model")
    row = measured(("profile", "--weights-only", "--model", folder / "model", "--run-dir", folder / "run"))
    shutil.rmtree(folder)
    seconds = float(row["cpu_seconds"]) - start_up
    values = (shape.model, str(weights), f"{seconds:.0f}", row["peak_gigabytes"])
    return dict(zip(COLUMNS, values, strict=True))


def read() -> dict[str, dict[str, str]]:
    if not TABLE.is_file():
        return {}
    with TABLE.open(newline="") as handle:
        return {row["model"]: row for row in csv.DictReader(handle)}


def write(rows: Mapping[str, Mapping[str, str]]) -> None:
    with TABLE.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def tables() -> list[str]:
    """Both tables of the page; the time is the mean rate of what was measured times the weights."""
    rows = read().values()
    each = sum(float(row["cpu_seconds"]) for row in rows) / sum(int(row["weights"]) for row in rows)
    lines = ["| model | layers | weights, M | GB at 16 bits | kept at 16 bits | profile of weights, CPU min |"]
    lines += ["|---|---|---|---|---|---|"]
    whole: dict[str, int] = {}
    for shape in shapes():
        layers, weights, kept = facts(shape)
        whole[shape.model] = weights
        size = f"{weights / 1e6:,.0f} | {2e-9 * weights:.1f}"
        lines.append(f"| {shape.model} | {layers} | {size} | {kept:.1%} | {weights * each / 60:.0f} |")
    lines += ["", "| measured | weights, M | CPU s | peak, GB |", "|---|---|---|---|"]
    for row in rows:
        part = "" if int(row["weights"]) >= whole[row["model"]] else ", one block of each kind"
        million = f"{int(row['weights']) / 1e6:,.0f}"
        lines.append(f"| {row['model']}{part} | {million} | {row['cpu_seconds']} | {row['peak_gigabytes']} |")
    lines += ["", "| preset | class | steps | guidance | other arguments | export |", "|---|---|---|---|---|---|"]
    for preset in presets()["preset"]:
        study = preset["study"]
        call = ", ".join(f"{key} {value!r}" for key, value in study["sampler.call"].items())
        steps, guidance = study["sampler.steps"], study.get("sampler.guidance", "")
        target = ", ".join(study["export.targets"])
        lines.append(f"| {preset['name']} | `{preset['pipeline']}` | {steps} | {guidance} | {call} | {target} |")
    return lines


def main() -> None:
    logging.disable(logging.WARNING)
    if arguments := sys.argv[1:]:
        folder, names = Path(arguments[0]).resolve(), arguments[1:]
        rows = read()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        words = ("profile", "--weights-only", "--model", START_UP, "--run-dir", folder / "start-up", "--overwrite")
        start_up = float(measured(words)["cpu_seconds"])
        for shape in shapes():
            if shape.model in names or not names:
                rows[shape.model] = measure(shape, folder / "measured", start_up)
                write({s.model: rows[s.model] for s in shapes() if s.model in rows})
    page = PAGE.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text("\n".join([before + START, *tables(), END]) + after)


if __name__ == "__main__":
    main()
