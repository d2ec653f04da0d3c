"""Tables, figures and the page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpqsearch import artifacts
from mpqsearch.core import Budget, LayerTable, SensitivityProfile, StudyRecord
from mpqsearch.methods import MethodSpec, available_losses, channel_losses
from mpqsearch.search.storage import redact
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.references import evaluation_key
from mpqsearch.stages.searching import search_results


def report(
    run: Run, table: LayerTable, measured: SensitivityProfile, records: list[StudyRecord], command: str = ""
) -> Path:
    """Write tables, figures and ``report.html``, or reuse them when nothing changed."""
    page = run.path("report.html")
    inputs = {
        "records": artifacts.digest_of([r.to_data() for r in records]),
        "config": artifacts.digest_of(run.config.to_data()),
        "profile": artifacts.digest_of(profile_inputs(run, table)),
    }
    exports = {p.stem: artifacts.digest_file(p) for p in sorted(run.path("export").glob("*.json"))}
    if exports:
        inputs["exports"] = artifacts.digest_of(exports)
    results = run.path("search", "search.json")
    if run.config.search.trials and results.exists():
        inputs["search"] = artifacts.digest_file(results)
    path = run.path("pareto.json")
    # Metrics changed or not, a report is cheap and made of other artifacts only: a stale one is simply drawn again.
    if page.exists() and artifacts.is_current(path, "mpqsearch/pareto", inputs, overwrite=True):
        run.say(f"report: reused {page}")
        return page
    if run.dry_run:
        run.say(f"report: would draw {page}")
        return page
    from mpqsearch.report import ReportContent, build_report

    searched = search_results(run, table)
    chosen = chosen_method(run, records)
    maps = {}
    for budget in run.config.allocate.parsed():
        maps[f"{chosen.name} at {budget.label()}"], _ = allocation(run, table, measured, chosen, budget)
    exported, _ = allocation(run, table, measured, chosen, export_budget(run))
    every = [
        allocation(run, table, measured, m, b)[0] for b in run.config.allocate.parsed() for m in run.config.methods
    ]
    content = ReportContent(
        title=run.config.report.title or f"Bit allocation of {table.model}",
        records=records,
        table=table,
        policy=run.config.policy,
        maps=maps,
        point_maps={m.digest: m for m in every},
        profile=measured,
        variant=chosen.format_name,
        grids=_grids(run, table, measured),
        correlations=rank_correlations(table, measured),
        exports=size_rows(run),
        environment=artifacts.environment(),
        config=run.config.to_toml(),
        command=redact(command or shlex.join(["mpqsearch", *sys.argv[1:]])),
        digests={"model": table.digest, **inputs},
        seconds=run.seconds,
        notes=_notes(run, table, measured),
        search=searched,
        chosen=next((r for r in records if r.method == chosen.name and r.bit_map_digest == exported.digest), None),
    )
    with run.timed("report"):
        build_report(run.folder, content, inputs)
    run.say(f"report: {page}")
    return page


SIZE_COLUMNS = (
    "target",
    "map",
    "ideal_bytes",
    "accounted_bytes",
    "stored_bytes",
    "header_bytes",
    "stored_bits_per_parameter",
    "weights",
    "verified",
)
"""Columns of ``export/sizes.csv``; see `size_rows`."""


def size_rows(run: Run) -> list[dict[str, Any]]:
    """One row for each target that was exported: ideal, accounted and found bytes side by side.

    ``ideal_bytes``: what the asked map takes when its codes are packed densely, as a budget counts.
    ``accounted_bytes``: what the target's own format takes, headers apart. ``stored_bytes``, ``header_bytes``: what was
    found in the file; empty until it was verified, and for targets that write no weights.
    """
    rows = []
    for path in sorted(run.path("export").glob("*.json")):
        data = artifacts.read_json(path, "mpqsearch/export").data
        if data.get("accounted_bits") is None:
            continue  # the neutral map promises no file; an export of an earlier version did not say
        found = data["verification"] or {}
        accounted, stored = -(-data["accounted_bits"] // 8), found.get("stored_bytes")
        rows.append(
            {
                "target": data["target"],
                "map": data["map"],
                "ideal_bytes": -(-data["ideal_bits"] // 8),
                "accounted_bytes": accounted,
                "stored_bytes": "" if stored is None else stored,
                "header_bytes": "" if stored is None else found["header_bytes"],
                "stored_bits_per_parameter": round(
                    8 * (accounted if stored is None else stored) / data["n_parameters"], 4
                ),
                "weights": "yes" if data["payload"] else "no, settings only",
                "verified": _verdict(found),
            }
        )
    return rows


def _verdict(found: Mapping[str, Any]) -> str:
    if not found:
        return "no"
    if not found["ok"]:
        return "DIFFERS"
    return "yes" if found.get("verified") else "no, its consumer was not run"


def rank_correlations(table: LayerTable, measured: SensitivityProfile) -> list[dict[str, Any]]:
    """Spearman correlation over layers of every predictor with one-layer-at-a-time error of final samples, at each
    measured width."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for key in sorted(k for k in measured.arrays if k.startswith("layer_final_error/")):
        variant, final = key.split("/")[1], measured.arrays[key]
        searched = [i for i, name in enumerate(measured.names) if table[name].macs]
        for j, bits in enumerate(measured.widths):
            if not np.isfinite(final[searched, j]).all():
                continue
            truth = pd.Series(final[searched, j]).rank()
            for loss in [k for k in available_losses(measured) if k != "final"]:
                totals = measured.layer_sum(channel_losses(measured, table, variant, loss, bias_correction=True))
                value = pd.Series(totals[searched, j]).rank().corr(truth)
                rows.append(
                    {
                        "predictor": loss,
                        "scheme": variant,
                        "bits": bits,
                        "layers": len(searched),
                        "spearman": round(float(value), 3),
                    }
                )
    return rows


def export_budget(run: Run) -> Budget:
    """The budget of the map that is exported: the configured one, else the first of the study."""
    return Budget.parse(run.config.export.budget) if run.config.export.budget else run.config.allocate.parsed()[0]


def chosen_method(run: Run, records: list[StudyRecord]) -> MethodSpec:
    """The method that is drawn and exported: the configured one, else the one with the least mean log distance to full
    precision."""
    by_name = {m.name: m for m in run.config.methods}
    if run.config.report.chosen:
        return by_name[run.config.report.chosen]
    scores: dict[str, list[float]] = {}
    for r in records:
        if r.method in by_name and "fd_fp" in r.metrics:
            scores.setdefault(r.method, []).append(float(np.log(max(r.metrics["fd_fp"].value, 1e-12))))
    if not scores:
        return run.config.methods[-1]
    return by_name[min(scores, key=lambda name: float(np.mean(scores[name])))]


def _grids(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[Any]:
    from mpqsearch.report import sample_grid
    from mpqsearch.sampling import to_uint8

    key = evaluation_key(run, table, None, bias_correction=False)
    import torch

    columns = run.config.report.grid_columns
    full = to_uint8(
        torch.from_numpy(
            artifacts.read_arrays(run.path("stats", f"full-precision-{key[:16]}.npz"))["samples"][:columns]
        )
    )
    grids = []
    for budget in run.config.allocate.parsed():
        rows = {"full precision": full.numpy()}
        for method in run.config.methods:
            bit_map, data = allocation(run, table, measured, method, budget)
            point = evaluation_key(
                run, table, bit_map, bias_correction=data.get("bias_correction", method.bias_correction)
            )
            file = run.path("stats", f"{point[:16]}.npz")
            if file.exists():
                rows[method.name] = artifacts.read_arrays(file)["images"][:columns]
        grids.append(sample_grid(f"Budget {budget.label()}", rows, columns=columns))
    return grids


def _notes(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[str]:
    notes = [
        (
            f"Policy: {run.config.policy.describe()}. Everything that is stored is counted: scales, zero points, channel "
            "tags, leftovers."
        )
    ]
    over = []
    for method, budget in ((m, b) for b in run.config.allocate.parsed() for m in run.config.methods):
        _, data = allocation(run, table, measured, method, budget)
        if not data["within_budget"]:
            over.append(f"{method.name} at {budget.label()} by {(data['size_bits'] - data['limit']) / 8 / 1000:.2f} kB")
    if over:
        notes.append(
            "Over the budget, because the method has no means to pay for its channel tags: " + "; ".join(over) + "."
        )
    return notes
