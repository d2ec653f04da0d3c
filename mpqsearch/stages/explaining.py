"""More of an integer program than one map: its whole path over all budgets, and why a map is as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mpqsearch import artifacts
from mpqsearch.allocate import NextStep, ParetoPath, explain, solve_path
from mpqsearch.core import BitMap, Budget, LayerTable
from mpqsearch.errors import ConfigError
from mpqsearch.methods import PROGRAMS, MethodSpec, Program
from mpqsearch.methods.programs import ONE_EACH
from mpqsearch.stages.allocating import allocation, allocation_inputs, programs_of, study_methods
from mpqsearch.stages.base import Run, slug

LISTED_VERTICES = 600
"""Vertices of a path that are listed and drawn, evenly over its cost: more cannot be told apart."""

COLUMNS = ("cost", "loss", "rate")
"""Columns of a path's CSV."""


def program_methods(run: Run) -> list[MethodSpec]:
    """The methods of the study that solve an integer program. Raises `ConfigError` when there is none, or one for each
    part."""
    if run.apart:
        raise ConfigError(ONE_EACH)
    methods = [m for m in study_methods(run) if m.allocator in PROGRAMS]
    if not methods:
        raise ConfigError(
            "no method of the study solves an integer program; add one with allocator = 'ilp-layer' or 'ilp-channel'."
        )
    return methods


def paths(run: Run) -> list[dict[str, Any]]:
    """The least loss at every budget, for every ``ilp-*`` method: ``paths/<method>.json`` and ``.csv``, and a figure.

    A path is over the quantity of the study's first budget; budgets of ``allocate.within`` play no part. A method's own
    loss is drawn; the paths of methods with different losses or schemes are not to be compared. ``ilp-channel`` is the
    program over channels, which pays for the width tags of every layer.
    """
    first = run.config.allocate.parsed()[0]
    budgets = [b for b in run.config.allocate.parsed() if b.unit == first.unit]
    answers = []
    for method in program_methods(run):
        with run.timed("allocate"):
            programs = programs_of(run, method)
            program = programs.program(method, first)
            path = solve_path(program.problem)
        data: dict[str, Any] = {
            "method": asdict(method),
            "unit": first.unit,
            "fixed_cost": program.fixed_cost,
            "n_parameters": run.table.n_parameters,
            "items": program.problem.n_items,
            "vertices": len(path.budgets),
            "points": [_point(program, path, vertex) for vertex in _listed(path)],
            "budgets": [_answer(budget, programs.limit(budget, method), program, path) for budget in budgets],
        }
        answers.append(data)
        if not run.dry_run:
            file = run.path("paths", f"{method.name}.json")
            artifacts.write_text(file.with_suffix(".csv"), artifacts.csv_text(COLUMNS, data["points"]))
            artifacts.write_json(file, "mpqsearch/path", data, allocation_inputs(run, method, first))
    if not run.dry_run:
        _draw(run, answers)
    return answers


def _draw(run: Run, answers: Sequence[Mapping[str, Any]]) -> None:
    from mpqsearch.report import plot_path, render, save_figure

    drawn = save_figure(render(lambda: plot_path(answers)), run.path("paths", "path"))
    run.say(f"allocate: {len(answers)} paths in {run.path('paths')}, drawn in {drawn[0]} and {drawn[1].name}")


def _listed(path: ParetoPath) -> list[int]:
    last = len(path.budgets) - 1
    if last < LISTED_VERTICES:
        return list(range(last + 1))
    wanted = np.linspace(float(path.budgets[0]), float(path.budgets[-1]), LISTED_VERTICES)
    vertices = np.unique(np.concatenate([[0], np.searchsorted(path.budgets, wanted).clip(0, last), [last]]))
    return [int(vertex) for vertex in vertices]


def _point(program: Program, path: ParetoPath, vertex: int) -> dict[str, Any]:
    cost = int(path.budgets[vertex]) + program.fixed_cost
    return {"cost": cost, "loss": float(path.losses[vertex]), "rate": float(path.rates[vertex])}


def _answer(budget: Budget, limit: int, program: Program, path: ParetoPath) -> dict[str, Any]:
    """The path's own answer at a budget, without solving again."""
    left = limit - program.fixed_cost
    answer, vertex = {"budget": budget.label(), "limit": limit}, path.vertex(left)
    if vertex < 0:
        return answer | {"smallest": int(path.budgets[0]) + program.fixed_cost}
    return answer | _point(program, path, vertex) | {"lower_bound": path.lower_bound(left)}


def explanations(run: Run) -> list[dict[str, Any]]:
    """Why every map of every ``ilp-*`` method is as it is: ``explanation.json`` and ``.csv`` beside the map.

    The best next step of every layer, and the shadow prices of the budgets.
    """
    answers = []
    for budget in run.config.allocate.parsed():
        for method in program_methods(run):
            bit_map, saved = allocation(run, method, budget)
            with run.timed("allocate"):
                data = _explanation(run, method, budget, bit_map, saved)
            answers.append(data)
            if not run.dry_run:
                file = run.path("allocations", slug(method.name, budget), "explanation.json")
                inputs = {**allocation_inputs(run, method, budget), "bit_map": bit_map.digest}
                rows = data["layers"]
                artifacts.write_text(file.with_suffix(".csv"), artifacts.csv_text(list(rows[0]), rows))
                artifacts.write_json(file, "mpqsearch/explanation", data, inputs)
    run.say(f"allocate: explanations of {len(answers)} map{'s' * (len(answers) != 1)} in {run.path('allocations')}")
    return answers


def _explanation(
    run: Run,
    method: MethodSpec,
    budget: Budget,
    bit_map: BitMap,
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    """Limit and slack are those of the map: a layer whose channels all took one width stores no tags, which the program
    had to reserve."""
    result, prices, main = saved["result"], saved["certificate"]["multipliers"], saved["totals"][0]
    by_layer, within = result["program"] == "layers", run.config.allocate.parsed_within()
    program = programs_of(run, method).program(method, budget, within, by_layer=by_layer, like=bit_map)
    sets, names = (None, None) if by_layer else (program.item_layer, program.layers)
    steps = explain(program.problem, program.choice(bit_map), sets, names)
    return {
        "method": method.name,
        "budget": budget.label(),
        "unit": budget.unit,
        **{key: result[key] for key in ("status", "loss", "lower_bound", "gap")},
        "shadow_price": next(iter(prices.values())),
        "shadow_prices": prices,
        "layers": [_layer_row(step, run.table, bit_map) for step in steps],
        "limit": main["limit"],
        "slack": main["limit"] - main["cost"],
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
        "saved": step.saved,
        "extra_cost": step.extra_cost,
        "rate": step.rate,
    }
