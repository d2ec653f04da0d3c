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
        choice: ``[n]`` decoded choice, or None when the solver found none.
        proven: Whether the solver says that it is optimal.
        infeasible: Whether the solver says that nothing is feasible.
    """

    choice: NDArray[np.int32] | None
    proven: bool
    infeasible: bool


def solve_ilp(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    *,
    reference: float | None,
    solver: str = "highs",
    gap: float = 0.0,
    time_limit_s: float | None = None,
) -> IlpAnswer:
    """One binary variable per permitted cell, one row per item and per budget.

    Args:
        loss: ``[n, k]``, infinite where forbidden.
        costs: One ``[n, k]`` table per budget.
        limits: One limit per budget.
        reference: Objective of a feasible solution, by which losses are scaled; without one, the losses' range is used.
        solver: ``highs``, ``cbc`` or the name of any PuLP solver.
        gap: Absolute gap, in units of the loss, at which the solver may stop.
        time_limit_s: Wall time for the solver.
    """
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    shifted = loss - loss.min(axis=1, keepdims=True)
    scale = objective_scale(loss, reference)
    cells = [
        [(int(j), model.add_variable(f"z_{i}_{j}", cat="Binary")) for j in np.flatnonzero(np.isfinite(loss[i]))]
        for i in range(len(loss))
    ]
    model += pulp.LpAffineExpression((z, float(shifted[i, j] * scale)) for i, row in enumerate(cells) for j, z in row)
    for row in cells:
        model += pulp.LpAffineExpression((z, 1) for _, z in row) == 1
    for cost, limit in zip(costs, limits, strict=True):
        reduced, room = reduce_costs(loss, cost, limit)
        model += (
            pulp.LpAffineExpression((z, int(reduced[i, j])) for i, row in enumerate(cells) for j, z in row if reduced[i, j]) <= room
        )
    solution_status = run(model, solver, time_limit_s, gap * scale)
    infeasible = solution_status == pulp.LpSolutionInfeasible
    if solution_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return IlpAnswer(None, proven=False, infeasible=infeasible)
    choice = np.array([max(row, key=lambda cell: cell[1].value() or 0.0)[0] for row in cells], dtype=np.int32)
    return IlpAnswer(choice, proven=solution_status == pulp.LpSolutionOptimal, infeasible=False)


def objective_scale(loss: Floats, reference: float | None) -> float:
    """Factor that brings the known solution's objective (above the unattainable minimum) to ``OBJECTIVE_SCALE``."""
    least = float(loss.min(axis=1).sum(dtype=np.float64))
    if reference is None:
        reference = float(np.where(np.isfinite(loss), loss, -np.inf).max(axis=1).sum(dtype=np.float64))
    excess = reference - least
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
        tilt = pulp.LpAffineExpression((step, float(slope[b] * (high[b] - low[b]) / value_unit)) for b, step in enumerate(steps))
        model += value - tilt <= (height - floor) / value_unit
    if run(model, "highs", None) != pulp.LpSolutionOptimal:
        raise SolverError("the cutting-plane program of the Lagrangian dual was not solved.")
    point = low + (high - low) * np.array([float(step.value() or 0.0) for step in steps])
    return point, floor + value_unit * float(value.value())


def reduce_costs(loss: Floats, cost: Integers, limit: int) -> tuple[NDArray[np.int64], int]:
    """Costs above each item's cheapest choice, divided by their common divisor, and what is left of the limit."""
    permitted = np.isfinite(loss)
    sizes = cost.astype(np.int64)
    least = np.where(permitted, sizes, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    reduced = np.where(permitted, sizes - least, 0)
    grain = max(int(np.gcd.reduce(reduced, axis=None)), 1)
    return reduced // grain, (limit - int(least.sum())) // grain


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


def remaining(deadline: float) -> float | None:
    """Seconds left until ``deadline``, or None without one."""
    return None if deadline == float("inf") else max(deadline - time.perf_counter(), 0.0)
