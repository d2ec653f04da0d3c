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
from mpqsearch.methods import MethodSpec, Program, program_of
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run, slug
from mpqsearch.stages.profiling import profile_inputs

if TYPE_CHECKING:
    from mpqsearch.report import PathSeries

LISTED_VERTICES = 5_000
"""Vertices of a path that its JSON and CSV list; a longer path is listed in part, evenly over its cost, and is whole in
its npz."""

SAME = 1e-12
"""Relative difference of two sums of the same losses."""


def programs(run: Run) -> list[MethodSpec]:
    """The methods of the study that solve an integer program. Raises `ConfigError` when there is none."""
    found = [m for m in run.config.methods if m.allocator in ("ilp-layer", "ilp-channel")]
    if not found:
        raise ConfigError(
            "no method of the study solves an integer program; add one with allocator = 'ilp-layer' or 'ilp-channel'."
        )
    return found


def paths(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[dict[str, Any]]:
    """The least loss at every budget, for every ``ilp-*`` method: ``paths/<method>.json``, ``.csv`` and ``.npz``, and a
    figure.

    A method's own loss is drawn; the paths of methods with different losses or schemes are not to be compared.
    ``ilp-channel`` is the program over channels, which pays for the width tags of every layer.
    """
    budgets = run.config.allocate.parsed()
    sizes = [b for b in budgets if b.quantity != "bops"]
    found, series = [], []
    for method in programs(run):
        own = sizes or budgets
        if not sizes and method.allocator == "ilp-channel":
            run.say(
                f"allocate: no path of {method.name}: it takes a size budget, and the study has budgets in BOPs only"
            )
            continue
        with run.timed("allocate"):
            program = program_of(method, own[0], table, measured, run.config.policy, run.config.quantizer.format())
            path = solve_path(program.problem)
        data = _path_data(run, table, method, own, program, path)
        found.append(data)
        series.append(_series(table, data, program, path))
        if not run.dry_run:
            _save_path(run, table, method, data, program, path)
    if series and not run.dry_run:
        from mpqsearch.report import path_info, plot_path, render, save_figure

        label = "stored bits per parameter, everything counted" if sizes else "BOPs of one forward pass"
        info = path_info(series, label)
        drawn = save_figure(render(lambda: plot_path(info)), run.path("paths", "path"))
        run.say(f"allocate: {len(found)} paths in {run.path('paths')}, drawn in {drawn[0]} and {drawn[1].name}")
    return found


def _path_data(
    run: Run, table: LayerTable, method: MethodSpec, budgets: Sequence[Budget], program: Program, path: ParetoPath
) -> dict[str, Any]:
    vertices = len(path.budgets)
    listed = _listed(path)
    by_layer = len(program.item_layer) == len(program.layers)
    rates = np.append(path.rates, 0.0)
    totals = path.budgets + program.fixed_cost
    points = []
    for vertex in listed.tolist():
        point: dict[str, Any] = {
            "cost": int(totals[vertex]),
            "loss": float(path.losses[vertex]),
            "lower_bound": float(path.losses[vertex]),
            "rate": float(rates[vertex]),
        }
        if program.problem.budget_name != "BOPs":
            point |= {
                "bits_a_parameter": int(totals[vertex]) / table.n_parameters,
                "bytes": int(-(-totals[vertex] // 8)),
            }
        if by_layer and vertex > 0:
            row, to = int(path.steps.item[vertex - 1]), int(path.steps.to[vertex - 1])
            moved = np.flatnonzero(path.tables.row == row)
            point |= {"layers": [program.layers[i] for i in moved], "bits": program.widths[to]}
            point |= {"input_bits": program.inputs[to]} if program.inputs else {}
        points.append(point)
    start = program.weights(path.choice(0)) if by_layer else {}
    inputs = program.activations(path.choice(0)) if program.inputs else {}
    return {
        "method": asdict(method),
        "unit": program.problem.budget_name,
        "fixed_cost": program.fixed_cost,
        "n_parameters": table.n_parameters,
        "items": program.problem.n_items,
        "vertices": vertices,
        "first_map": {name: int(bits) for name, bits in start.items()},
        "first_inputs": inputs,
        "points": points,
        "budgets": [_answer(run, table, budget, program, path) for budget in budgets],
    }


def _listed(path: ParetoPath) -> np.ndarray[Any, np.dtype[np.int64]]:
    last = len(path.budgets) - 1
    if last < LISTED_VERTICES:
        return np.arange(last + 1)
    wanted = np.linspace(float(path.budgets[0]), float(path.budgets[-1]), LISTED_VERTICES)
    return np.unique(np.concatenate([[0], np.searchsorted(path.budgets, wanted).clip(0, last), [last]]))


def _answer(run: Run, table: LayerTable, budget: Budget, program: Program, path: ParetoPath) -> dict[str, Any]:
    """The path's own answer at a budget, without solving again."""
    limit = int(budget.limit) if budget.quantity == "bops" else budget.limit_bits(table, run.config.policy)
    answer: dict[str, Any] = {"budget": budget.label(), "limit": limit}
    try:
        found = path.at(limit - program.fixed_cost)
    except InfeasibleBudgetError:
        return answer | {"status": "infeasible", "smallest": int(path.budgets[0]) + program.fixed_cost}
    return answer | {
        "status": found.status,
        "cost": found.cost + program.fixed_cost,
        "loss": found.loss,
        "lower_bound": found.lower_bound,
        "gap": found.gap if np.isfinite(found.gap) else None,
        "rate": found.multiplier,
    }


def _series(table: LayerTable, data: Mapping[str, Any], program: Program, path: ParetoPath) -> PathSeries:
    from mpqsearch.report import PathSeries

    unit = 1 if program.problem.budget_name == "BOPs" else table.n_parameters
    asked = [answer for answer in data["budgets"] if "loss" in answer]
    return PathSeries(
        name=data["method"]["name"],
        cost=(path.budgets + program.fixed_cost) / unit,
        loss=path.losses,
        asked_cost=np.array([answer["cost"] / unit for answer in asked]),
        asked_loss=np.array([answer["loss"] for answer in asked]),
        asked_bound=np.array([answer["lower_bound"] for answer in asked]),
    )


def _save_path(
    run: Run, table: LayerTable, method: MethodSpec, data: Mapping[str, Any], program: Program, path: ParetoPath
) -> None:
    folder = run.path("paths")
    inputs = _inputs(run, table, method)
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
    artifacts.write_json(folder / f"{method.name}.json", "mpqsearch/path", dict(data), inputs)


def explanations(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[dict[str, Any]]:
    """Why every map of every ``ilp-*`` method is as it is: ``explanation.json`` and ``.csv`` beside the map.

    Marginal rates of every layer, the shadow price of the budget, and the layers at a bound.
    """
    found = []
    for budget in run.config.allocate.parsed():
        for method in programs(run):
            bit_map, saved = allocation(run, table, measured, method, budget)
            with run.timed("allocate"):
                data = _explanation(run, table, measured, method, budget, bit_map)
            # Costed from the map: a layer whose channels all took one width stores no tags, which the program had to
            # reserve.
            spent = saved["bops"] if budget.quantity == "bops" else saved["size_bits"]
            data |= {"limit": saved["limit"], "slack": saved["limit"] - spent}
            found.append(data)
            if not run.dry_run:
                folder = run.path("allocations", slug(method.name, budget))
                inputs = {**_inputs(run, table, method), "bit_map": bit_map.digest}
                artifacts.write_text(folder / "explanation.csv", _csv(list(data["layers"][0]), data["layers"]))
                artifacts.write_json(folder / "explanation.json", "mpqsearch/explanation", data, inputs)
    run.say(f"allocate: {len(found)} maps explained in {run.path('allocations')}")
    return found


def _explanation(
    run: Run, table: LayerTable, measured: SensitivityProfile, method: MethodSpec, budget: Budget, bit_map: BitMap
) -> dict[str, Any]:
    by_layer = bit_map.granularity == "layer"
    policy, fmt = run.config.policy, run.config.quantizer.format()
    program = program_of(method, budget, table, measured, policy, fmt, by_layer=by_layer, overrides=by_layer)
    solved = _as_saved(program, bit_map, solve(program.problem, solver=method.solver))
    sets, names = (None, None) if by_layer else (program.item_layer, program.layers)
    told = explain(program.problem, solved, sets, names)
    return {
        "method": method.name,
        "budget": budget.label(),
        "unit": program.problem.budget_name,
        "status": solved.status,
        "loss": solved.loss,
        "lower_bound": solved.lower_bound if np.isfinite(solved.lower_bound) else None,
        "gap": _finite(solved.gap),
        "shadow_price": solved.multiplier,
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
        costs={program.problem.budget_name: costs[0]},
        gap=relative_gap(loss, min(solved.lower_bound, loss)),
        status=solved.status if best else "feasible",
    )


def _inputs(run: Run, table: LayerTable, method: MethodSpec) -> dict[str, str]:
    c = run.config.to_data()
    return profile_inputs(run, table) | {
        "method": artifacts.digest_of([m for m in c["methods"] if m["name"] == method.name]),
        "policy": artifacts.digest_of(c["policy"]),
        "budgets": artifacts.digest_of({"budgets": c["allocate"]["budgets"]}),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _csv(header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
