"""Integer programs through PuLP, the modelling layer for what the exact core does not cover.

The only module that imports pulp, and only inside functions. Four rules make an integer programming solver's answer
trustworthy here (each was seen broken in the field):

- losses are divided by the objective of a feasible solution, so that the solver's absolute tolerances cannot matter;
- costs are reduced by their smallest choice and by the greatest common divisor;
- ``sol_status`` is read, never ``status``, and values are decoded only after it;
- the answer is costed again in integers from the choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import Floats, Integers
from mpqsearch.errors import SolverError, UnknownNameError

OBJECTIVE_SCALE = 1e4
"""What the known solution's objective becomes: far above every absolute tolerance, far below overflow."""

SOLVERS = {"highs": "HiGHS", "cbc": "PULP_CBC_CMD"}
"""Our names for PuLP's solvers; any other PuLP solver is accepted by PuLP's own name."""


@dataclass(frozen=True, slots=True, eq=False)
class IlpAnswer:
    """Answer of an integer program.

    Attributes:
        choice: ``[r]`` decoded choice, or None when the solver found none.
        proven: Whether the solver says that it is optimal.
        infeasible: Whether the solver says that nothing is feasible.
    """

    choice: NDArray[np.int32] | None
    proven: bool
    infeasible: bool


@dataclass(frozen=True, slots=True, eq=False)
class FormatRule:
    """At most ``most`` different formats among the rows ``row [p]`` that are in one layer: ``layer [p]``."""

    most: int
    row: NDArray[np.int64]
    layer: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Who solves, until which absolute gap in units of the loss, and for how many seconds."""

    solver: str = "highs"
    gap: float = 0.0
    seconds: float | None = None


def solve_ilp(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    effort: Effort,
    *,
    reference: float | None = None,
    formats: Sequence[FormatRule] = (),
) -> IlpAnswer:
    """One binary variable per permitted cell, one constraint per row and per budget, and the limits on formats.

    Args:
        loss: ``[r, k]``, infinite where forbidden.
        costs: One ``[r, k]`` table per budget.
        limits: One limit per budget.
        effort: Solver, gap and time.
        reference: Objective of a feasible solution, by which losses are scaled; without one, the losses' range is used.
        formats: Limits on the number of different formats.
    """
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    scale = objective_scale(loss, reference)
    cells = [
        {int(j): model.add_variable(f"z_{i}_{j}", cat="Binary") for j in np.flatnonzero(np.isfinite(loss[i]))}
        for i in range(len(loss))
    ]
    shifted = (loss - loss.min(axis=1, keepdims=True)) * scale
    model.setObjective(_linear((z, float(shifted[i, j])) for i, row in enumerate(cells) for j, z in row.items()))
    for row in cells:
        model += _linear((z, 1) for z in row.values()) == 1
    for cost, limit in zip(costs, limits, strict=True):
        reduced, room = reduce_costs(loss, cost, limit)
        model += _linear((z, int(reduced[i, j])) for i, row in enumerate(cells) for j, z in row.items()) <= room
    for number, rule in enumerate(formats):
        _limit_formats(model, cells, rule, f"used_{number}")
    solution = run(model, effort, effort.gap * scale)
    if solution not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return IlpAnswer(None, proven=False, infeasible=solution == pulp.LpSolutionInfeasible)
    # A binary may come back as 1.0000000000000044: the largest of its row is the chosen one.
    choice = np.array([max(row, key=lambda j: row[j].value() or 0.0) for row in cells], dtype=np.int32)
    return IlpAnswer(choice, proven=solution == pulp.LpSolutionOptimal, infeasible=False)


def _linear(terms: Iterable[tuple[Any, float]]) -> Any:
    import pulp

    return pulp.LpAffineExpression([(variable, factor) for variable, factor in terms if factor])


def _limit_formats(model: Any, cells: list[dict[int, Any]], rule: FormatRule, name: str) -> None:
    """A binary variable for every format that a layer may use, and the limit on their sum."""
    used: dict[int, dict[int, Any]] = {}
    for i, layer in zip(rule.row.tolist(), rule.layer.tolist(), strict=True):
        inside = used.setdefault(layer, {})
        for j, z in cells[i].items():
            if j not in inside:
                inside[j] = model.add_variable(f"{name}_{layer}_{j}", cat="Binary")
            model += z <= inside[j]
    for inside in used.values():
        model += _linear((u, 1) for u in inside.values()) <= rule.most


def objective_scale(loss: Floats, reference: float | None) -> float:
    """Factor that brings the known solution's objective (above the unattainable minimum) to ``OBJECTIVE_SCALE``."""
    least = float(loss.min(axis=1).sum(dtype=np.float64))
    excess = 0.0 if reference is None else reference - least
    if excess <= 0:  # nothing known, or every row already has its best choice
        excess = float(np.where(np.isfinite(loss), loss, -np.inf).max(axis=1).sum(dtype=np.float64)) - least
    return OBJECTIVE_SCALE / excess if excess > 0 else 1.0


def reduce_costs(loss: Floats, cost: Integers, limit: int) -> tuple[NDArray[np.int64], int]:
    """Costs above each row's cheapest choice, and what is left of the limit, divided by their common divisor."""
    permitted = np.isfinite(loss)
    sizes = cost.astype(np.int64)
    least = np.where(permitted, sizes, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    reduced = np.where(permitted, sizes - least, 0)
    grain = max(int(np.gcd.reduce(reduced, axis=None)), 1)
    return reduced // grain, (limit - int(least.sum())) // grain


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
        tilt = _linear((step, float(slope[b] * (high[b] - low[b]) / value_unit)) for b, step in enumerate(steps))
        model += value - tilt <= (height - floor) / value_unit
    if run(model, Effort()) != pulp.LpSolutionOptimal:
        raise SolverError("the cutting-plane program of the Lagrangian dual was not solved.")
    point = low + (high - low) * np.array([float(step.value() or 0.0) for step in steps])
    return point, floor + value_unit * float(value.value())


def run(model: Any, effort: Effort, gap: float = 0.0) -> int:
    """Solve ``model`` and return its ``sol_status``.

    Raises:
        UnknownNameError: PuLP has no such solver here.
        SolverError: The solver crashed.
    """
    import pulp

    try:
        model.solve(make_solver(effort.solver, effort.seconds, gap))
    except pulp.PulpError as error:
        raise SolverError(f"{effort.solver} failed on {len(model.variables())} variables: {error}") from error
    return int(model.sol_status)


def make_solver(solver: str, seconds: float | None = None, gap: float = 0.0) -> Any:
    """A fresh PuLP solver: copies lose their time limit."""
    import pulp

    name = SOLVERS.get(solver, solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the bundled CBC is announced to move to an extra
        if name not in pulp.listSolvers(onlyAvailable=True):
            raise UnknownNameError("solver", solver, ["auto", "core", *SOLVERS, *pulp.listSolvers(onlyAvailable=True)])
        options: dict[str, Any] = {"msg": False, "gapRel": 0.0}
        if gap > 0:
            options["gapAbs"] = gap
        if seconds is not None:
            options["timeLimit"] = max(seconds, 0.01)
        return pulp.getSolver(name, **options)


def available_solvers() -> dict[str, bool]:
    """Every solver that PuLP knows, by the name that we take, and whether it works here."""
    import pulp

    ours = {theirs: name for name, theirs in SOLVERS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        working = set(pulp.listSolvers(onlyAvailable=True))
        return {ours.get(name, name): name in working for name in pulp.listSolvers()}
