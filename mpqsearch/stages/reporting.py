"""Tables, figures and the page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile, StudyRecord
from mpqsearch.methods import MethodSpec, available_losses, channel_losses
from mpqsearch.pareto import main_metric
from mpqsearch.ranks import spearman
from mpqsearch.secrets import redact
from mpqsearch.specs.distill import TRAINED
from mpqsearch.stages.allocating import allocation, study_methods
from mpqsearch.stages.base import Run, slug
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.references import SHOWN, evaluation_key, full_precision, key_frames
from mpqsearch.stages.reuse import PARETO, current
from mpqsearch.stages.searched import search_results
from mpqsearch.stages.selecting import DOUBTFUL

if TYPE_CHECKING:
    from mpqsearch.report import ReportContent, SampleGrid

Solved = Mapping[tuple[MethodSpec, Budget], tuple[BitMap, Mapping[str, Any]]]
"""Maps with what ``allocation.json`` holds, by method and budget."""

CAPTIONED = 5
"""Samples with captions that the page shows of a method; without captions `SHOWN`."""


def report(run: Run, records: list[StudyRecord], command: str = "") -> Path:
    """Write tables, figures and ``report.html``, or reuse them when nothing changed."""
    page, inputs = run.path("report.html"), report_inputs(run, records)
    # A report is cheap and made of other artifacts only: a stale one is drawn again.
    if current(PARETO, run.path("pareto.json"), inputs) is not None:
        run.say(f"report: reused {page}")
        return page
    if run.dry_run:
        run.say(f"report: would draw {page}")
        return page
    from mpqsearch.report import build_report

    command = redact(command or shlex.join(["mpqsearch", *sys.argv[1:]]))
    content = report_content(run, records, command, inputs)
    with run.timed("report"):
        build_report(run.folder, content, inputs)
    run.say(f"report: {page}")
    return page


def report_inputs(run: Run, records: list[StudyRecord]) -> dict[str, str]:
    """Digests of all that a report shows."""
    inputs = {
        "records": artifacts.digest_of([r.to_data() for r in records]),
        "config": artifacts.digest_of(run.config.to_data()),
        "profile": artifacts.digest_of(profile_inputs(run)),
    }
    exports = {p.stem: artifacts.digest_file(p) for p in sorted(run.path("export").glob("*.json"))}
    if exports:
        inputs["exports"] = artifacts.digest_of(exports)
    results = run.path("search", "search.json")
    if run.config.search.trials and results.exists():
        inputs["search"] = artifacts.digest_file(results)
    return inputs


def report_content(
    run: Run,
    records: list[StudyRecord],
    command: str,
    inputs: Mapping[str, str],
) -> ReportContent:
    """What the report shows, from the artifacts of the run."""
    from mpqsearch.report import ReportContent

    budgets, methods = run.config.allocate.parsed(), study_methods(run)
    solved = {(m, b): allocation(run, m, b) for b in budgets for m in methods}
    chosen, budget = chosen_method(run, records), export_budget(run)
    exported, _ = allocation(run, chosen, budget)
    named = run.config.report.chosen or chosen.name
    return ReportContent(
        title=run.config.report.title or f"Bit allocation of {run.table.model}",
        records=records,
        table=run.table,
        policy=run.config.policy,
        maps={f"{chosen.name} at {b.label()}": bit_map for (m, b), (bit_map, _) in solved.items() if m == chosen},
        point_maps={bit_map.digest: bit_map for bit_map, _ in solved.values()},
        profile=run.profile,
        format_name=chosen.format_name,
        grids=_grids(run, solved, records),
        correlations=rank_correlations(run.table, run.profile),
        selections=_selections(solved),
        exports=size_rows(run),
        environment=artifacts.environment(),
        config=run.config.to_toml(),
        command=command,
        digests={"model": run.table.digest, **inputs},
        seconds=run.seconds,
        notes=[*_faults(run), *_notes(solved)],
        search=search_results(run),
        chosen=next((r for r in records if r.method == named and r.bit_map_digest == exported.digest), None),
        chosen_file=f"allocations/{slug(chosen.name, budget)}/bitmap.json",
        export_command=_export_command(run, named, budget),
    )


def _export_command(run: Run, method: str, budget: Budget) -> str:
    """What exports the chosen map: for the first target of the study that holds weights, else as a checkpoint of our
    own."""
    target = next((name for name in run.config.export.targets if name != "neutral"), "packed")
    words = ["mpqsearch", "export", "--config", str(run.path("config.toml")), "--run-dir", str(run.folder)]
    return shlex.join([*words, "--budget", budget.label(), "--method", method, "--target", target])


def _grids(run: Run, solved: Solved, records: list[StudyRecord]) -> list[SampleGrid]:
    """Samples of every method at every budget that were kept, below those of the full-precision model; those of a
    trained map below its own."""
    from mpqsearch.report import sample_grid

    full = full_precision(run).read(0, SHOWN)
    if full.images is None:
        return []
    captions = [label for label in full.labels if isinstance(label, str)]  # prompts, and no classes
    columns, grids = CAPTIONED if captions else SHOWN, []
    points = {(r.method, r.budget) for r in records}
    for budget in dict.fromkeys(b for _, b in solved):
        rows = {"full precision": key_frames(full.images)[:columns].numpy()}
        for (method, b), (bit_map, data) in solved.items():
            corrected = data.get("bias_correction", method.bias_correction)
            file = run.path("stats", f"{evaluation_key(run, bit_map, bias_correction=corrected)[:16]}.npz")
            if b == budget and file.exists():
                rows[method.name] = artifacts.read_arrays(file)["images"][:columns]
            trained, name = run.path("distilled", slug(method.name, b), "samples.npz"), f"{method.name}{TRAINED}"
            if b == budget and (name, b.label()) in points and trained.exists():
                rows[name] = artifacts.read_arrays(trained)["images"][:columns]
        first = None if run.config.prompts.preset else run.config.evaluate.first_seed
        grids.append(
            sample_grid(f"Budget {budget.label()}", rows, columns=columns, captions=captions, first_seed=first)
        )
    return grids


def _selections(solved: Solved) -> list[dict[str, Any]]:
    """What measured selections tried, a row a candidate."""
    return [
        {
            "budget": budget.label(),
            "candidate": row["candidate"],
            "kB": f"{row['size_bytes'] / 1000:,.1f}",
            "predicted loss": _short(row["predicted"]),
            "measured error": _short(row["error"]),
            "times the chosen": _short(row["ratio"]),
            "samples": row["samples"],
            "verdict": row["verdict"],
        }
        for (_, budget), (_, data) in solved.items()
        for row in data.get("selection", {}).get("rows", ())
    ]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _faults(run: Run) -> list[str]:
    """What a user must know of the exported files before taking them."""
    stamps = (artifacts.read_json(path, "mpqsearch/export").data for path in sorted(run.path("export").glob("*.json")))
    return [
        f"At {data['budget']} {fault}." for data in stamps for fault in (data.get("delivered") or {}).get("faults", ())
    ]


def _notes(solved: Solved) -> list[str]:
    over = [
        f"{method.name} at {budget.label()} by {(data['size_bits'] - data['limit']) / 8000:.2f} kB"
        for (method, budget), (_, data) in solved.items()
        if not data["within_budget"]
    ]
    notes = [f"Over the budget, because the method has no means to pay for its channel tags: {'; '.join(over)}."]
    doubted = [
        f"{budget.label()} ({data['selection']['spearman']:.2f})"
        for (_, budget), (_, data) in solved.items()
        if (data.get("selection", {}).get("spearman") or 1.0) < DOUBTFUL
    ]
    notes = notes if over else []
    if doubted:
        notes.append(
            "Do not believe predicted losses here: over the maps that were measured their rank correlation with the "
            f"measured errors is low at {', '.join(doubted)}."
        )
    return notes


SIZE_COLUMNS = (
    "target",
    "budget",
    "map",
    "ideal_bytes",
    "accounted_bytes",
    "stored_bytes",
    "header_bytes",
    "stored_bits_per_parameter",
    "weights",
    "verified",
    "error",
    "uniform",
    "uniform_error",
)
"""Columns of ``export/sizes.csv``; see `size_rows`."""


def size_rows(run: Run) -> list[dict[str, Any]]:
    """One row for each file that was exported: ideal, accounted and found bytes side by side, and what it delivers.

    ``ideal_bytes``: what the asked map takes when its codes are packed densely, as a budget counts.
    ``accounted_bytes``: what the target's own format takes, headers apart. ``stored_bytes``, ``header_bytes``: what is
    in the file; empty for targets that write no weights. ``error``: mean squared error of samples against full
    precision, from the same noise, with the weights that the consumer decodes; ``uniform``, ``uniform_error``: the
    target's largest uniform file that is no larger, and its error. Empty where it was not measured.
    """
    rows = []
    for path in sorted(run.path("export").glob("*.json")):
        data = artifacts.read_json(path, "mpqsearch/export").data
        verification, found = data["verification"] or {}, data["delivered"] or {}
        uniform = found.get("uniform") or {"choice": "", "error": {"value": ""}}
        promised, stored = data.get("accounted_bits"), found.get("stored_bytes")
        accounted = "" if promised is None else -(-promised // 8)  # the neutral map is no file of weights
        total = stored if stored is not None else accounted or data["ideal_bits"] / 8
        rows.append(
            {
                "target": data["target"],
                "budget": data["budget"],
                "map": data["map"],
                "ideal_bytes": -(-data["ideal_bits"] // 8),
                "accounted_bytes": accounted,
                "stored_bytes": "" if stored is None else stored,
                "header_bytes": "" if stored is None else found["header_bytes"],
                "stored_bits_per_parameter": round(8 * total / data["n_parameters"], 4),
                "weights": "yes" if data["payload"] else "no, settings only",
                "verified": _verdict(verification),
                "error": found["metrics"]["paired_mse"]["value"] if found.get("metrics") else "",
                "uniform": uniform["choice"],
                "uniform_error": uniform["error"]["value"],
            }
        )
    return rows


def _verdict(verification: Mapping[str, Any]) -> str:
    if not verification:
        return "no"
    if not verification["ok"]:
        return "DIFFERS"
    return "yes" if verification.get("verified") else "no, its consumer was not run"


def rank_correlations(table: LayerTable, measured: SensitivityProfile) -> list[dict[str, Any]]:
    """Spearman correlation over layers of every loss with the error of final samples, one layer at a time quantized, at
    each width at which that was measured."""
    searched = [i for i, name in enumerate(measured.names) if table[name].macs]
    losses = [k for k in available_losses(measured) if k != "final"]
    rows: list[dict[str, Any]] = []
    for key in sorted(k for k in measured.arrays if k.startswith("layer_final_error/")):
        format_name, errors = key.split("/")[1], measured.arrays[key][searched]
        widths = np.flatnonzero(np.isfinite(errors).all(axis=0))
        for loss in losses:
            totals = measured.layer_sum(channel_losses(measured, table, format_name, loss, bias_correction=True))
            rows += [
                {
                    "predictor": loss,
                    "scheme": format_name,
                    "bits": measured.widths[j],
                    "layers": len(searched),
                    "spearman": round(spearman(totals[searched, j], errors[:, j]), 3),
                }
                for j in widths
            ]
    return rows


def export_budget(run: Run) -> Budget:
    """The budget of the map that is exported: the configured one, else the first of the study."""
    return Budget.parse(run.config.export.budget) if run.config.export.budget else run.config.allocate.parsed()[0]


def chosen_method(run: Run, records: list[StudyRecord]) -> MethodSpec:
    """The method that is drawn and exported: the configured one, else the one with the least mean log of what points
    are judged by (`mpqsearch.pareto.main_metric`)."""
    by_name = {m.name: m for m in run.config.methods}
    if run.config.report.chosen:
        return by_name[run.config.report.chosen.removesuffix(TRAINED)]
    scores: dict[str, list[float]] = {}
    metric = main_metric(records)
    for r in records:
        if r.method in by_name and metric in r.metrics:
            scores.setdefault(r.method, []).append(float(np.log(max(r.metrics[metric].value, 1e-12))))
    if not scores:
        return run.config.methods[-1]
    return by_name[min(scores, key=lambda name: float(np.mean(scores[name])))]
