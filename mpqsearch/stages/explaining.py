"""More of an integer program than one map: its whole path over all budgets, and why a map is as it is."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch import artifacts
from mpqsearch.allocate import AllocationResult, NextStep, ParetoPath, explain, relative_gap, solve, solve_path
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile
from mpqsearch.errors import ConfigError, InfeasibleBudgetError
from mpqsearch.methods import PROGRAMS, MethodSpec, Program
from mpqsearch.stages.allocating import allocation, allocation_inputs, programs_of, study_methods
from mpqsearch.stages.base import Run, slug

if TYPE_CHECKING:
    from mpqsearch.report import PathSeries

LISTED_VERTICES = 5_000
"""Vertices of a path that its JSON and CSV list; a longer path is listed in part, evenly over its cost, and is whole in
its npz."""

SAME = 1e-12
"""Relative difference of two sums of the same losses."""


def program_methods(run: Run) -> list[MethodSpec]:
    """The methods of the study that solve an integer program. Raises `ConfigError` when there is none."""
    methods = [m for m in study_methods(run) if m.allocator in PROGRAMS]
    if not methods:
        raise ConfigError(
            "no method of the study solves an integer program; add one with allocator = 'ilp-layer' or 'ilp-channel'."
        )
    return methods


def paths(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[dict[str, Any]]:
    """The least loss at every budget, for every ``ilp-*`` method: ``paths/<method>.json``, ``.csv`` and ``.npz``, and a
    figure.

    A path is over the quantity of the study's first budget; budgets of ``allocate.within`` play no part. A method's own
    loss is drawn; the paths of methods with different losses or schemes are not to be compared. ``ilp-channel`` is the
    program over channels, which pays for the width tags of every layer.
    """
    first = run.config.allocate.parsed()[0]
    budgets = [b for b in run.config.allocate.parsed() if b.unit == first.unit]
    answers, series = [], []
    for method in program_methods(run):
        with run.timed("allocate"):
            programs = programs_of(run, table, measured, method)
            program = programs.program(method, first)
            path = solve_path(program.problem)
        limits = [(budget, programs.limit(budget, method)) for budget in budgets]
        data = _path_data(table, method, limits, program, path)
        answers.append(data)
        series.append(_series(data, program, path))
        if not run.dry_run:
            _save_path(run, table, method, first, data, program, path)
    if not run.dry_run:
        from mpqsearch.report import plot_path, render, save_figure

        size = first.unit == "bits stored"
        label = "stored bits per parameter, everything counted" if size else f"{first.unit} of one forward pass"
        drawn = save_figure(render(lambda: plot_path(series, label)), run.path("paths", "path"))
        run.say(f"allocate: {len(answers)} paths in {run.path('paths')}, drawn in {drawn[0]} and {drawn[1].name}")
    return answers


def _path_data(
    table: LayerTable, method: MethodSpec, limits: Sequence[tuple[Budget, int]], program: Program, path: ParetoPath
) -> dict[str, Any]:
    first, _ = limits[0]
    first_map = program.weights(path.choice(0)) if program.by_layer else {}
    return {
        "method": asdict(method),
        "unit": first.unit,
        "fixed_cost": program.fixed_cost,
        "n_parameters": table.n_parameters,
        "items": program.problem.n_items,
        "vertices": len(path.budgets),
        "first_map": {name: int(bits) for name, bits in first_map.items()},
        "first_inputs": program.activations(path.choice(0)),
        "points": [_point(table, first, program, path, vertex) for vertex in _listed(path)],
        "budgets": [_answer(budget, limit, program, path) for budget, limit in limits],
    }


def _listed(path: ParetoPath) -> list[int]:
    last = len(path.budgets) - 1
    if last < LISTED_VERTICES:
        return list(range(last + 1))
    wanted = np.linspace(float(path.budgets[0]), float(path.budgets[-1]), LISTED_VERTICES)
    vertices = np.unique(np.concatenate([[0], np.searchsorted(path.budgets, wanted).clip(0, last), [last]]))
    return [int(vertex) for vertex in vertices]


def _point(table: LayerTable, budget: Budget, program: Program, path: ParetoPath, vertex: int) -> dict[str, Any]:
    """One vertex of a path, with the step that led to it where the items are layers."""
    cost, loss = int(path.budgets[vertex]) + program.fixed_cost, float(path.losses[vertex])
    rate = float(path.rates[vertex]) if vertex < len(path.rates) else 0.0
    point: dict[str, Any] = {"cost": cost, "loss": loss, "lower_bound": loss, "rate": rate}
    if budget.unit == "bits stored":
        point |= {"bits_a_parameter": cost / table.n_parameters, "bytes": -(-cost // 8)}
    if program.by_layer and vertex > 0:
        row, to = int(path.steps.item[vertex - 1]), int(path.steps.to[vertex - 1])
        moved = np.flatnonzero(path.tables.row == row)
        point |= {"layers": [program.layers[i] for i in moved], "bits": program.widths[to]}
        point |= {"input_bits": program.inputs[to]} if program.inputs else {}
    return point


def _answer(budget: Budget, limit: int, program: Program, path: ParetoPath) -> dict[str, Any]:
    """The path's own answer at a budget, without solving again."""
    answer: dict[str, Any] = {"budget": budget.label(), "limit": limit}
    try:
        result = path.at(limit - program.fixed_cost)
    except InfeasibleBudgetError:
        return answer | {"status": "infeasible", "smallest": int(path.budgets[0]) + program.fixed_cost}
    return answer | {
        "status": result.status,
        "cost": result.cost + program.fixed_cost,
        "loss": result.loss,
        "lower_bound": result.lower_bound,
        "gap": _finite(result.gap),
        "rate": result.multiplier,
    }


def _series(data: Mapping[str, Any], program: Program, path: ParetoPath) -> PathSeries:
    from mpqsearch.report import PathSeries

    unit = data["n_parameters"] if data["unit"] == "bits stored" else 1
    asked = [answer for answer in data["budgets"] if "loss" in answer]
    return PathSeries(
        name=data["method"]["name"],
        cost=(path.budgets + program.fixed_cost) / unit,
        loss=path.losses,
        asked_cost=np.array([answer["cost"] / unit for answer in asked]),
        asked_loss=np.array([answer["loss"] for answer in asked]),
    )


def _save_path(
    run: Run,
    table: LayerTable,
    method: MethodSpec,
    budget: Budget,
    data: Mapping[str, Any],
    program: Program,
    path: ParetoPath,
) -> None:
    folder = run.path("paths")
    rows = [{**p, "layers": " ".join(p.get("layers", ()))} for p in data["points"]]
    header = ["cost", "bits_a_parameter", "bytes", "loss", "lower_bound", "rate", "layers", "bits", "input_bits"]
    artifacts.write_text(folder / f"{method.name}.csv", _csv(header, rows))
    whole: dict[str, np.ndarray[Any, Any]] = {
        "cost": path.budgets + program.fixed_cost,
        "loss": path.losses,
        "rate": path.rates,
        "first_choice": path.steps.base,
        "step_row": path.steps.item,
        "step_choice": path.steps.to,
        "item_row": path.tables.row,
        "item_layer": program.item_layer,
        "widths": np.array(program.widths),
        "input_widths": np.array(program.inputs, dtype=np.int64),
    }
    artifacts.write_arrays(folder / f"{method.name}.npz", whole)
    inputs = allocation_inputs(run, table, method, budget)
    artifacts.write_json(folder / f"{method.name}.json", "mpqsearch/path", dict(data), inputs)


def explanations(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[dict[str, Any]]:
    """Why every map of every ``ilp-*`` method is as it is: ``explanation.json`` and ``.csv`` beside the map.

    The best next step of every layer, the shadow prices of the budgets, and the layers at an end of what they may take.
    """
    told = []
    for budget in run.config.allocate.parsed():
        for method in program_methods(run):
            bit_map, saved = allocation(run, table, measured, method, budget)
            with run.timed("allocate"):
                data = _explanation(run, table, measured, method, budget, bit_map)
            # Costed from the map: a layer whose channels all took one width stores no tags, which the program had to
            # reserve.
            main = saved["totals"][0]
            data |= {"limit": main["limit"], "slack": main["limit"] - main["cost"]}
            told.append(data)
            if not run.dry_run:
                folder = run.path("allocations", slug(method.name, budget))
                inputs = {**allocation_inputs(run, table, method, budget), "bit_map": bit_map.digest}
                artifacts.write_text(folder / "explanation.csv", _csv(list(data["layers"][0]), data["layers"]))
                artifacts.write_json(folder / "explanation.json", "mpqsearch/explanation", data, inputs)
    run.say(f"allocate: {len(told)} maps explained in {run.path('allocations')}")
    return told


def _explanation(
    run: Run, table: LayerTable, measured: SensitivityProfile, method: MethodSpec, budget: Budget, bit_map: BitMap
) -> dict[str, Any]:
    by_layer = bit_map.granularity == "layer"
    within = run.config.allocate.parsed_within()
    program = programs_of(run, table, measured, method).program(method, budget, within, by_layer=by_layer)
    solved = _as_saved(program, bit_map, solve(program.problem, solver=method.solver))
    sets, names = (None, None) if by_layer else (program.item_layer, program.layers)
    told = explain(program.problem, solved, sets, names)
    return {
        "method": method.name,
        "budget": budget.label(),
        "unit": budget.unit,
        "status": solved.status,
        "loss": solved.loss,
        "lower_bound": _finite(solved.lower_bound),
        "gap": _finite(solved.gap),
        "shadow_price": solved.multiplier,
        "shadow_prices": told.shadow_prices,
        "layers": [_layer_row(step, table, bit_map) for step in told.steps],
    }


def _layer_row(step: NextStep, table: LayerTable, bit_map: BitMap) -> dict[str, Any]:
    """One layer, or several that share their widths, and its best next step."""
    layers = step.name.split(", ")
    return {
        "layer": step.name,
        "bits": float(np.mean([np.mean(bit_map.weights[name]) for name in layers])),
        "channels": sum(table[name].n_channels for name in layers),
        "loss": step.loss,
        "cost": step.cost,
        "next": step.next_choice,
        "gain": step.gain,
        "extra_cost": step.extra_cost,
        "rate_up": step.rate_up,
        "rate_down": _finite(step.rate_down),
        "holds": step.holds,
    }


def _as_saved(program: Program, bit_map: BitMap, solved: AllocationResult) -> AllocationResult:
    """The solved program with the choice that was saved, which may be another one of the same loss."""
    choice = program.choice(bit_map)
    loss, costs = program.problem.evaluate(choice)
    best = loss <= solved.loss + SAME * abs(solved.loss)
    return replace(
        solved,
        choice=choice,
        loss=loss,
        cost=costs[0],
        costs=dict(zip(solved.costs, costs, strict=True)),
        gap=relative_gap(loss, min(solved.lower_bound, loss)),
        status=solved.status if best else "feasible",
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _csv(header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
