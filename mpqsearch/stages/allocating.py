"""Solve the methods of a study at its budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile
from mpqsearch.methods import Allocation, MethodSpec, allocate
from mpqsearch.stages.base import Run, slug
from mpqsearch.stages.gptq import moment_inputs, priced
from mpqsearch.stages.importing import given_map
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.searching import searched_map
from mpqsearch.stages.smoothing import alphas_of


def allocation(
    run: Run, table: LayerTable, measured: SensitivityProfile, method: MethodSpec, budget: Budget
) -> tuple[BitMap, dict[str, Any]]:
    """Solve one method at one budget, or reuse its folder. Returns the map and what ``allocation.json`` holds."""
    if method.allocator == "search":
        return searched_map(run, table, budget)
    if method.allocator == "map":
        return given_map(run, table, measured, method)
    folder = run.path("allocations", slug(method.name, budget))
    c = run.config.to_data()
    inputs = profile_inputs(run, table) | {
        "method": artifacts.digest_of([m for m in c["methods"] if m["name"] == method.name]),
        "budget": artifacts.digest_of(budget.label()),
        "policy": artifacts.digest_of(c["policy"]),
    }
    if method.rounding != "nearest":
        inputs |= moment_inputs(run, table)
    if method.smooth_by_layer:
        inputs["ranges"] = artifacts.digest_of([c["activations"][k] for k in ("p", "n_candidates", "zero_points")])
    path, map_path = folder / "allocation.json", folder / "bitmap.json"
    if artifacts.is_current(path, "mpqsearch/allocation", inputs, overwrite=run.overwrite):
        return artifacts.load_bit_map(map_path), artifacts.read_json(path, "mpqsearch/allocation").data
    with run.timed("allocate"):
        made = allocate(
            method,
            budget,
            table,
            priced(run, table, measured, method),
            run.config.policy,
            run.config.quantizer.format(),
        )
        if method.smooth_by_layer and not run.dry_run:
            made = replace(made, bit_map=alphas_of(run, table, measured)(made.bit_map))
    data = made.to_data()
    if not run.dry_run:
        _save_map(map_path, made, table, inputs)
        artifacts.write_json(path, "mpqsearch/allocation", data, inputs)
    return made.bit_map, data


def allocations(
    run: Run, table: LayerTable, measured: SensitivityProfile
) -> list[tuple[MethodSpec, Budget, BitMap, dict[str, Any]]]:
    """All methods at all budgets of the configuration; maps from elsewhere once, at their own size."""
    out = []
    for place, given in enumerate(run.config.allocate.parsed()):
        for method in run.config.methods:
            if method.allocator == "map" and place:
                continue
            bit_map, data = allocation(run, table, measured, method, given)
            budget = Budget.parse(data["budget"]) if method.allocator == "map" else given
            out.append(
                (
                    replace(method, bias_correction=data.get("bias_correction", method.bias_correction)),
                    budget,
                    bit_map,
                    data,
                )
            )
    run.say(f"allocate: {len(out)} maps in {run.path('allocations')}")
    return out


def _save_map(path: Path, made: Allocation, table: LayerTable, inputs: Mapping[str, str]) -> None:
    from mpqsearch.export import neutral_extra

    provenance = {"method": made.method.name, "budget": made.budget.label(), "predicted_loss": made.predicted_loss}
    artifacts.save_bit_map(path, made.bit_map, inputs, neutral_extra(table, made.bit_map, provenance=provenance))
