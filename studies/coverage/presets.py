"""The models that `mpqsearch init` has presets for: layers and weights of their true shapes, exact, and what a profile
of the weights alone costs.

Run from the repository root: ``python -m studies.coverage.presets`` writes the tables of `studies/guides/presets.md`,
from shapes alone (structures on the device ``meta``: no weights). ``python -m studies.coverage.presets FOLDER [NAME
...]`` measures, too: a denoiser with random weights is written under FOLDER, and ``profile --weights-only`` runs on it
in a process of its own, on one thread. U-Nets and models of less than 10^9 weights are written whole, others with one
block of each kind.
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
SMALL = 1e9
"""Models of fewer weights are measured whole."""
SAME = {
    "FLUX.1-schnell": "FLUX.1-dev",
    "FLUX.2 Klein 9B": "FLUX.2 Klein 4B",
    "Wan 2.1 14B; each half of Wan 2.2 A14B": "Wan 2.2 5B",
    "LTX-Video 13B": "LTX-Video 2B",
}
"""Models that are not measured, and the one of the same class whose rate they get."""
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
    config = dict(shape.config)
    if one_block:
        config |= {key: 1 for key in BLOCKS if key in inspect.signature(kind).parameters}
    if one_block and shape.denoiser == "SD3Transformer2DModel":  # its last block has no text stream after attention
        dual = config.get("dual_attention_layers", ())
        config |= {"num_layers": 3, "dual_attention_layers": dual[:1]} if dual else {"num_layers": 2}
    with torch.device("meta"):
        return kind(**config)


def facts(shape: Shape) -> tuple[int, int, float]:
    """Layers, their weights, and the share of these at 16 bits."""
    from mpqsearch.core import Policy
    from mpqsearch.models.discover import table_of

    table, policy = table_of(build(shape), [], name=shape.model), Policy(overrides=shape.kept)
    weights = sum(layer.n_weights for layer in table)
    return len(table), weights, sum(la.n_weights for la in table if policy.fixed_width(la) == 16) / weights


def write_model(shape: Shape, folder: Path) -> int:
    """The whole of a small model, one block of each kind of others: random weights, bfloat16; gives their number."""
    import torch

    module = build(shape, one_block=facts(shape)[1] >= SMALL).to(torch.bfloat16).to_empty(device="cpu")
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
    """The tables of the page. Time: that of what was measured, times the weights of the model over those of it. Peak:
    the file, and what the measured process had beside its own file."""
    rows = read()
    lines = ["| model | layers | weights, M | GB at 16 bits | kept at 16 bits | CPU min | peak, GB | measured |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for shape in shapes():
        layers, weights, kept = facts(shape)
        row = rows[SAME.get(shape.model, shape.model)]
        part, peak = weights / int(row["weights"]), float(row["peak_gigabytes"]) - 2e-9 * int(row["weights"])
        how = "whole" if part < 1.01 else "one block of each kind"
        how = f"as {SAME[shape.model]}" if shape.model in SAME else how
        minutes = float(row["cpu_seconds"]) * part / 60
        size, cost = f"{weights / 1e6:,.0f} | {2e-9 * weights:.1f}", f"{minutes:.0f} | {peak + 2e-9 * weights:.1f}"
        lines.append(f"| {shape.model} | {layers} | {size} | {kept:.1%} | {cost} | {how} |")
    lines += ["", "| measured | weights, M | CPU s | peak, GB |", "|---|---|---|---|"]
    for row in rows.values():
        million = f"{int(row['weights']) / 1e6:,.0f}"
        lines.append(f"| {row['model']} | {million} | {row['cpu_seconds']} | {row['peak_gigabytes']} |")
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
