"""What exported files are worth, beside the best uniform file of their target at the same bytes.

For every target and each of its uniform types: the target's own map at the bytes of that type
(`mpqsearch allocate --target`), written, decoded by its consumer and measured; and the map of a general method
(by channel, corrected biases) at two uniform budgets, with the error that the report gives it.

    python studies/delivered/study.py --model fmnist-dit --csv studies/delivered/results.csv
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpqsearch import stages
from mpqsearch.artifacts import write_text
from mpqsearch.config import config_from
from mpqsearch.core import Budget, StudyRecord
from mpqsearch.export import ExportJob, get_exporter
from mpqsearch.export.allocation import uniform_maps
from mpqsearch.stages.targeting import names_bits

COLUMNS = (
    "model",
    "target",
    "budget",
    "method",
    "promised_bytes",
    "file_bytes",
    "reported_error",
    "delivered_error",
    "delivered_low",
    "delivered_high",
    "n_samples",
)
TYPES = {
    "quanto": ("qint4",),
    "gguf": ("Q4_0", "Q5_0"),
    "sdnq": ("uint3", "uint4"),
    "comfyui": ("asym_w4a8_int8", "asym_w6a8_int8"),
}
"""Uniform types at whose bytes a map for the target is made; torchao stores all widths in bytes."""

BUDGETS = ("uniform:3", "uniform:4")
"""Budgets of the general method's map."""


def settings(model: str, samples: int, targets: tuple[str, ...], own: bool) -> dict[str, Any]:
    """The configuration of a study; with ``own`` every target gets a map of its own."""
    method = {"name": "ilp-channel", "allocator": "ilp-channel", "scheme": "auto"}
    return {
        "model": {"source": model},
        "calibration": {"final_widths": [], "context_widths": [], "sampler_probes": 2},
        "allocate": {"budgets": list(BUDGETS), "targets": list(targets) if own else []},
        "methods": [method | {"bias_correction": True}],
        "evaluate": {"samples": samples},
        "export": {"targets": list(targets)},
    }


def run_of(model: str, samples: int, targets: tuple[str, ...], *, own: bool, folder: Path) -> stages.Run:
    """The run with its profile, measured once for both configurations."""
    run = stages.Run(config=config_from(settings(model, samples, targets, own)), folder=folder)
    stages.prepare(run)
    return run


def bytes_of(run: stages.Run, name: str, kind: str) -> Budget:
    """The size of the target's file with every layer that takes it in one type, names and shapes included."""
    target = get_exporter(name)
    made = uniform_maps(target, run.table)[kind]
    choices = {n: made.choices.get(n, "full") for n in run.table.by_name}
    job = ExportJob(table=run.table, bit_map=made.bit_map, choices=choices)
    bits = target.promise(job, target.plan(job)).total
    tensors = Budget(quantity="bytes", limit=-(-bits // 8))
    return Budget(quantity="bytes", limit=-(-(bits + names_bits(run, target, tensors, made)) // 8))


def rows_of(run: stages.Run, name: str, budget: Budget, reported: float | None) -> Iterator[dict[str, Any]]:
    """The measured file, and the uniform one that it was compared with."""
    (one,) = stages.export(run, [], verify="no", budgets=[budget], own_maps=name in run.config.allocate.targets)
    if one.error is not None:
        print(f"{name} at {budget.label()}: {one.error}")
        return
    found, model = one.data["delivered"], run.table.model
    shared = {"model": model, "target": name, "budget": budget.label(), "n_samples": run.config.evaluate.samples}
    entries = [(one.data["map"], one.data["promised_bytes"], found, found["metrics"]["paired_mse"], reported)]
    if found["uniform"]:
        uniform = found["uniform"]
        size = uniform["stored_bytes"] + uniform["header_bytes"]
        entries.append((f"uniform {uniform['choice']}", size, uniform, uniform["error"], None))
    for method, promised, sizes, error, said in entries:
        yield shared | {
            "method": method.partition(" at ")[0],
            "promised_bytes": promised,
            "file_bytes": sizes["stored_bytes"] + sizes["header_bytes"],
            "reported_error": "" if said is None else f"{said:.6g}",
            "delivered_error": f"{error['value']:.6g}",
            "delivered_low": f"{error['low']:.6g}",
            "delivered_high": f"{error['high']:.6g}",
        }


def study(model: str, samples: int, targets: tuple[str, ...], folder: Path) -> Iterator[dict[str, Any]]:
    """All rows, target by target."""
    general = run_of(model, samples, (), own=False, folder=folder)
    records: list[StudyRecord] = stages.evaluate(general)
    errors = {r.budget: r.metrics["paired_mse"].value for r in records if r.method == "ilp-channel"}
    for name in targets:
        run = run_of(model, samples, (name,), own=False, folder=folder)
        for text in BUDGETS:
            yield from rows_of(run, name, Budget.parse(text), errors[text])
        if name in TYPES:
            run = run_of(model, samples, (name,), own=True, folder=folder)
            for kind in TYPES[name]:
                yield from rows_of(run, name, bytes_of(run, name, kind), None)


def main() -> None:
    """Write the CSV, row by row as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fmnist-dit")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--targets", nargs="+", default=["packed", "quanto", "gguf", "sdnq", "torchao", "comfyui"])
    parser.add_argument("--folder", type=Path, default=Path("runs/delivered"))
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for row in study(options.model, options.samples, tuple(options.targets), options.folder / options.model):
        rows.append(row)
        print(row, flush=True)
        write_text(options.csv, text_of(rows))


def text_of(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV."""
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


if __name__ == "__main__":
    main()
