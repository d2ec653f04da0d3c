"""Integer programs through PuLP, the modelling layer for what the exact engine does not cover.

The only module that imports pulp, and only inside functions. Four rules make an integer programming solver's answer
trustworthy here (each was seen broken in the field):

- losses are divided by the objective of a feasible solution, so that the solver's absolute tolerances cannot matter;
- costs are reduced by their smallest choice and by the greatest common divisor;
- ``sol_status`` is read, never ``status``, and values are decoded only after it;
- the answer is costed again in integers from the choice, and competes with the solution it was scaled by.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import WIDTH_SLIP, Floats, Integers, LayerRules, PairwiseTerms
from mpqsearch.errors import SolverError, UnknownNameError

OBJECTIVE_SCALE = 1e4
"""What the known solution's objective becomes: far above every absolute tolerance, far below overflow."""

SOLVERS = {"highs": "HiGHS", "cbc": "PULP_CBC_CMD"}
"""Our names for PuLP's solvers; any other PuLP solver is accepted by PuLP's own name."""


@dataclass(frozen=True, slots=True, eq=False)
class IlpAnswer:
    """Answer of an integer program.

    Attributes:
        choice: ``[n]`` decoded choice, or None when the solver found none.
        proven: Whether the solver says that it is optimal.
        infeasible: Whether the solver says that nothing is feasible.
    """

    choice: NDArray[np.int32] | None
    proven: bool
    infeasible: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SideRules:
    """What couples the rows beside the budgets; rows are the items after ties were merged.

    Attributes:
        row: ``[n]`` row of every item.
        layers: Constraints on the items of a layer.
        pairs: Losses of pairs of rows.
    """

    row: Integers
    layers: LayerRules | None = None
    pairs: PairwiseTerms | None = None


Cells = list[dict[int, Any]]
"""The binary variable of every permitted choice, per row."""


def solve_ilp(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    *,
    reference: float | None,
    side: SideRules | None = None,
    solver: str = "highs",
    gap: float = 0.0,
    time_limit_s: float | None = None,
) -> IlpAnswer:
    """One binary variable per permitted cell, one row per item and per budget, and the side rules.

    Args:
        loss: ``[n, k]``, infinite where forbidden.
        costs: One ``[n, k]`` table per budget.
        limits: One limit per budget.
        reference: Objective of a feasible solution, by which losses are scaled; without one, the losses' range is used.
        side: Layer rules and pairwise terms.
        solver: ``highs``, ``cbc`` or the name of any PuLP solver.
        gap: Absolute gap, in units of the loss, at which the solver may stop.
        time_limit_s: Wall time for the solver.
    """
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    scale = objective_scale(loss, reference)
    cells: Cells = [
        {int(j): model.add_variable(f"z_{i}_{j}", cat="Binary") for j in np.flatnonzero(np.isfinite(loss[i]))}
        for i in range(len(loss))
    ]
    for row in cells:
        model += _linear((z, 1) for z in row.values()) == 1
    shifted = loss - loss.min(axis=1, keepdims=True)
    objective = [(z, float(shifted[i, j] * scale)) for i, row in enumerate(cells) for j, z in row.items()]
    if side is not None and side.pairs is not None:
        objective += _pair_terms(model, cells, side.pairs, scale)
    overhead = [] if side is None or side.layers is None else _layer_rules(model, cells, side.layers, side.row)
    for number, (cost, limit) in enumerate(zip(costs, limits, strict=True)):
        _budget(model, cells, loss, cost, limit, overhead if number == 0 else [])
    model.setObjective(_linear(objective))
    solution_status = run(model, solver, time_limit_s, gap * scale)
    infeasible = solution_status == pulp.LpSolutionInfeasible
    if solution_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return IlpAnswer(None, proven=False, infeasible=infeasible)
    # A binary may come back as 1.0000000000000044: the largest of its row is the chosen one.
    choice = np.array([max(row, key=lambda j: row[j].value() or 0.0) for row in cells], dtype=np.int32)
    return IlpAnswer(choice, proven=solution_status == pulp.LpSolutionOptimal, infeasible=False)


def _linear(terms: Iterable[tuple[Any, float]]) -> Any:
    """Sum of factor times variable. PuLP keeps the last factor of a variable that comes twice; tied items do."""
    import pulp

    factors: dict[Any, float] = {}
    for variable, factor in terms:
        factors[variable] = factors.get(variable, 0) + factor
    return pulp.LpAffineExpression(factors)


def _budget(
    model: Any, cells: Cells, loss: Floats, cost: Integers, limit: int, overhead: list[tuple[Any, int]]
) -> None:
    """One budget in reduced costs; overheads keep the divisor of everything at one."""
    reduced, room, grain = reduce_costs(loss, cost, limit)
    if overhead:
        reduced, room, grain = reduced * grain, limit - _cheapest_total(loss, cost), 1
    terms = [(z, int(reduced[i, j])) for i, row in enumerate(cells) for j, z in row.items() if reduced[i, j]]
    model += _linear([*terms, *overhead]) <= room


def _pair_terms(model: Any, cells: Cells, pairs: PairwiseTerms, scale: float) -> list[tuple[Any, float]]:
    """Products of two binaries by the reformulation-linearization: their sums over one index are the other binary."""
    objective = []
    for number, (first, second) in enumerate(zip(pairs.first, pairs.second, strict=True)):
        rows, columns = cells[int(first)], cells[int(second)]
        product = {(a, b): model.add_variable(f"y_{number}_{a}_{b}", 0.0, 1.0) for a in rows for b in columns}
        for a, z in rows.items():
            model += _linear([*((product[a, b], 1) for b in columns), (z, -1)]) == 0
        for b, z in columns.items():
            model += _linear([*((product[a, b], 1) for a in rows), (z, -1)]) == 0
        objective += [(y, float(pairs.value[number, a, b] * scale)) for (a, b), y in product.items()]
    return objective


def _layer_rules(model: Any, cells: Cells, rules: LayerRules, row: Integers) -> list[tuple[Any, int]]:
    """Averages, distinct choices and overheads of layers; returns the overheads as terms of the main budget."""
    low, high = rules.average_bounds()
    overhead: list[tuple[Any, int]] = []
    for layer in range(rules.n_layers):
        members = [cells[int(r)] for r in row[np.flatnonzero(rules.layer == layer)]]
        if not members:
            continue
        total = _linear((z, float(rules.width[j])) for member in members for j, z in member.items())
        if np.isfinite(low[layer]):
            model += total >= float(low[layer] - WIDTH_SLIP) * len(members)
        if np.isfinite(high[layer]):
            model += total <= float(high[layer] + WIDTH_SLIP) * len(members)
        if rules.average_step is not None:
            steps = model.add_variable(f"steps_{layer}", cat="Integer")
            model += total == rules.average_step * len(members) * steps
        if any(
            rule is not None
            for rule in (rules.max_distinct, rules.max_widths, rules.mixed_overhead, rules.choice_overhead)
        ):
            overhead += _used_choices(model, members, rules, layer)
    return overhead


def _used_choices(model: Any, members: Cells, rules: LayerRules, layer: int) -> list[tuple[Any, int]]:
    used = {j: model.add_variable(f"used_{layer}_{j}", cat="Binary") for j in {j for member in members for j in member}}
    for member in members:
        for j, z in member.items():
            model += z <= used[j]
    if rules.max_distinct is not None:
        model += _linear((u, 1) for u in used.values()) <= rules.max_distinct
    if rules.max_widths is not None:
        values = sorted({float(rules.width[j]) for j in used})
        wide = {value: model.add_variable(f"width_{layer}_{v}", cat="Binary") for v, value in enumerate(values)}
        for j, u in used.items():
            model += u <= wide[float(rules.width[j])]
        model += _linear((w, 1) for w in wide.values()) <= rules.max_widths
    terms: list[tuple[Any, int]] = []
    if rules.choice_overhead is not None:
        terms += [(u, int(rules.choice_overhead[layer, j])) for j, u in used.items()]
    if rules.mixed_overhead is not None:
        mixed = model.add_variable(f"mixed_{layer}", cat="Binary")
        model += _linear((u, 1) for u in used.values()) <= 1 + (len(used) - 1) * mixed
        terms.append((mixed, int(np.broadcast_to(rules.mixed_overhead, (rules.n_layers,))[layer])))
    return terms


def objective_scale(loss: Floats, reference: float | None) -> float:
    """Factor that brings the known solution's objective (above the unattainable minimum) to ``OBJECTIVE_SCALE``."""
    least = float(loss.min(axis=1).sum(dtype=np.float64))
    excess = 0.0 if reference is None else reference - least
    if excess <= 0:  # nothing known, or every item already has its best choice
        excess = float(np.where(np.isfinite(loss), loss, -np.inf).max(axis=1).sum(dtype=np.float64)) - least
    return OBJECTIVE_SCALE / excess if excess > 0 else 1.0


def maximize_planes(
    planes: list[tuple[float, NDArray[np.float64]]], low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Maximum over a box of the least of some planes (value at zero, slope): the cutting-plane model of a dual.

    Raises:
        SolverError: The linear program was not solved.
    """
    import pulp

    model = pulp.LpProblem("cutting_planes", pulp.LpMaximize)
    # Steps from the box's corner and differences of values keep the numbers near one, whatever the magnitudes.
    heights = [height + float(slope @ low) for height, slope in planes]
    floor = min(heights)
    value_unit = max(max(heights) - floor, *(float(np.abs(slope) @ (high - low)) for _, slope in planes), 1e-300)
    value = model.add_variable("value")
    steps = [model.add_variable(f"step_{b}", 0.0, 1.0) for b in range(len(low))]
    model += value
    for height, (_, slope) in zip(heights, planes, strict=True):
        tilt = pulp.LpAffineExpression(
            (step, float(slope[b] * (high[b] - low[b]) / value_unit)) for b, step in enumerate(steps)
        )
        model += value - tilt <= (height - floor) / value_unit
    if run(model, "highs", None) != pulp.LpSolutionOptimal:
        raise SolverError("the cutting-plane program of the Lagrangian dual was not solved.")
    point = low + (high - low) * np.array([float(step.value() or 0.0) for step in steps])
    return point, floor + value_unit * float(value.value())


def _cheapest_total(loss: Floats, cost: Integers) -> int:
    least = np.where(np.isfinite(loss), cost.astype(np.int64), np.iinfo(np.int64).max).min(axis=1)
    return int(least.sum())


def reduce_costs(loss: Floats, cost: Integers, limit: int) -> tuple[NDArray[np.int64], int, int]:
    """Costs above each item's cheapest choice and what is left of the limit, divided by their common divisor (last)."""
    permitted = np.isfinite(loss)
    sizes = cost.astype(np.int64)
    least = np.where(permitted, sizes, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    reduced = np.where(permitted, sizes - least, 0)
    grain = max(int(np.gcd.reduce(reduced, axis=None)), 1)
    return reduced // grain, (limit - int(least.sum())) // grain, grain


def run(model: Any, solver: str, time_limit_s: float | None, gap: float = 0.0) -> int:
    """Solve ``model`` and return its ``sol_status``.

    Raises:
        UnknownNameError: PuLP has no such solver here.
        SolverError: The solver crashed.
    """
    import pulp

    backend = make_solver(solver, time_limit_s, gap)
    try:
        model.solve(backend)
    except pulp.PulpError as error:
        raise SolverError(f"{solver} failed on {len(model.variables())} variables: {error}") from error
    return int(model.sol_status)


def make_solver(solver: str, time_limit_s: float | None, gap: float = 0.0) -> Any:
    """A fresh PuLP solver: copies lose their time limit."""
    import warnings

    import pulp

    name = SOLVERS.get(solver, solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the bundled CBC is announced to move to an extra
        if name not in pulp.listSolvers(onlyAvailable=True):
            raise UnknownNameError("solver", solver, [*SOLVERS, *pulp.listSolvers(onlyAvailable=True)])
        options: dict[str, Any] = {"msg": False, "gapRel": 0.0}
        if gap > 0:
            options["gapAbs"] = gap
        if time_limit_s is not None:
            options["timeLimit"] = max(time_limit_s, 0.01)
        return pulp.getSolver(name, **options)


def available_solvers() -> dict[str, bool]:
    """Every solver that PuLP knows, by the name that we take, and whether it works here."""
    import warnings

    import pulp

    ours = {theirs: name for name, theirs in SOLVERS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        working = set(pulp.listSolvers(onlyAvailable=True))
        return {ours.get(name, name): name in working for name in pulp.listSolvers()}


def remaining(deadline: float) -> float | None:
    """Seconds left until ``deadline``, or None without one."""
    return None if deadline == float("inf") else max(deadline - time.perf_counter(), 0.0)
