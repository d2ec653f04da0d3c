"""``solve``: pick the method for a problem, run it, cost the answer again and report what is proven."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import mckp, passes
from mpqsearch.allocate.canonical import Tables, canonical_tables
from mpqsearch.allocate.exhaustive import exhaustive_choice
from mpqsearch.allocate.greedy import greedy_choice
from mpqsearch.allocate.problem import AllocationProblem, AllocationResult, Status, relative_gap
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, SolverError

INFINITY = float("inf")


def solve(
    problem: AllocationProblem,
    *,
    solver: str = "auto",
    time_limit_s: float | None = None,
    gap_tolerance: float = 0.0,
) -> AllocationResult:
    """Best admissible choice of ``problem``.

    Args:
        problem: What to solve.
        solver: ``auto``, ``core`` (the exact engine), ``highs`` or ``cbc`` (integer programs), ``greedy``,
            ``exhaustive``, or the name of any other PuLP solver.
        time_limit_s: Return the best found after this many seconds, with its gap and a status that says so.
        gap_tolerance: Stop when the relative gap is certified to be at most this; 0 asks for a proof of optimality.

    Raises:
        InfeasibleBudgetError: Nothing fits; the message states the smallest attainable cost.
        UnknownNameError: There is no such solver.
        ConfigError: The solver cannot take this kind of problem.
    """
    started = time.perf_counter()
    deadline = INFINITY if time_limit_s is None else started + time_limit_s
    method = METHODS.get(solver, _solve_pulp)
    tables = canonical_tables(problem)
    return method(
        Task(problem=problem, tables=tables, solver=solver, gap_tolerance=gap_tolerance, started=started, deadline=deadline)
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What a method is asked: the problem, its tables, who should solve it and until when."""

    problem: AllocationProblem
    tables: Tables
    solver: str
    gap_tolerance: float
    started: float
    deadline: float


Method = Callable[[Task], AllocationResult]


def make_result(
    problem: AllocationProblem,
    choice: NDArray[np.int32],
    *,
    proven: bool,
    in_time: bool,
    bound: float,
    dual_bound: float,
    multipliers: tuple[float, ...],
    solver: str,
    started: float,
) -> AllocationResult:
    """Cost ``choice`` again from the raw tables, check it and name what is proven.

    Raises:
        SolverError: The choice breaks a constraint; a solver's word is never taken.
    """
    loss, costs = problem.evaluate(choice)
    if not problem.permits(choice):
        raise SolverError(f"{solver} returned a choice that breaks allowed, fixed or ties.")
    for budget, cost in zip(problem.budgets, costs, strict=True):
        if cost > budget.limit:
            raise SolverError(f"{solver} returned {budget.name} = {cost}, above the limit {budget.limit}.")
    bound = loss if proven else min(bound, loss)
    status: Status = "optimal" if proven else ("feasible" if in_time else "time_limit")
    if status == "feasible" and bound == -INFINITY:
        status = "heuristic"
    choice.flags.writeable = False
    return AllocationResult(
        status=status,
        choice=choice,
        loss=loss,
        cost=costs[0],
        costs={budget.name: cost for budget, cost in zip(problem.budgets, costs, strict=True)},
        lower_bound=bound,
        gap=relative_gap(loss, bound),
        multipliers=multipliers,
        dual_bound=min(dual_bound, loss),
        solver=solver,
        seconds=time.perf_counter() - started,
    )


def check_feasible(problem: AllocationProblem, tables: Tables) -> None:
    """Refuse budgets that even the cheapest choices exceed.

    Raises:
        InfeasibleBudgetError: With the smallest attainable value.
    """
    for budget, cost in zip(problem.budgets, tables.costs, strict=True):
        smallest = mckp.smallest_cost(tables.loss, cost)
        if smallest > budget.limit:
            raise InfeasibleBudgetError(
                f"no choice fits: the limit on {budget.name} is {budget.limit}, the smallest attainable value is {smallest}."
            )


def _solve_core(task: Task) -> AllocationResult:
    _require_plain(task.problem, "core")
    tables = task.tables
    try:
        answer = mckp.solve_table(tables.loss, tables.cost, tables.limit, gap_tolerance=task.gap_tolerance, deadline=task.deadline)
    except mckp.BudgetTooSmallError:
        check_feasible(task.problem, tables)
        raise
    return make_result(
        task.problem,
        tables.expand(answer.choice),
        proven=answer.proven,
        in_time=answer.in_time,
        bound=answer.floor,
        dual_bound=answer.dual_bound,
        multipliers=(answer.rate,),
        solver="core",
        started=task.started,
    )


def _solve_greedy(task: Task) -> AllocationResult:
    _require_plain(task.problem, "greedy")
    tables = task.tables
    check_feasible(task.problem, tables)
    relaxed = mckp.relax(tables.loss, tables.cost, tables.limit)
    return make_result(
        task.problem,
        tables.expand(greedy_choice(tables.loss, tables.cost, tables.limit)),
        proven=False,
        in_time=True,
        bound=relaxed.bound,
        dual_bound=relaxed.bound,
        multipliers=(relaxed.rate,),
        solver="greedy",
        started=task.started,
    )


def _solve_exhaustive(task: Task) -> AllocationResult:
    choice = exhaustive_choice(task.problem)
    if choice is None:
        raise InfeasibleBudgetError("no choice meets all budgets together.")
    return make_result(
        task.problem,
        choice,
        proven=True,
        in_time=True,
        bound=INFINITY,
        dual_bound=-INFINITY,
        multipliers=tuple(0.0 for _ in task.problem.budgets),
        solver="exhaustive",
        started=task.started,
    )


def _solve_pulp(task: Task) -> AllocationResult:
    from mpqsearch.allocate import ilp

    ilp.make_solver(task.solver, None)  # an unknown name is refused before any work
    _require_plain(task.problem, task.solver)
    tables = task.tables
    check_feasible(task.problem, tables)
    relaxed = mckp.relax(tables.loss, tables.cost, tables.limit)
    known = greedy_choice(tables.loss, tables.cost, tables.limit)
    known_loss = passes.totals(tables.loss, tables.cost, known)[0]
    answer = ilp.solve_ilp(
        tables.loss,
        tables.costs,
        tables.limits,
        reference=known_loss,
        solver=task.solver,
        time_limit_s=ilp.remaining(task.deadline),
    )
    choice, improved = known, False
    if answer.choice is not None:
        loss, cost = passes.totals(tables.loss, tables.cost, answer.choice)
        improved = cost <= tables.limit and loss <= known_loss
        choice = answer.choice if improved else known
    return make_result(
        task.problem,
        tables.expand(choice),
        proven=answer.proven and improved,
        in_time=answer.proven or time.perf_counter() < task.deadline,
        bound=relaxed.bound,
        dual_bound=relaxed.bound,
        multipliers=(relaxed.rate,),
        solver=task.solver,
        started=task.started,
    )


def _require_plain(problem: AllocationProblem, solver: str) -> None:
    """Refuse what a single-budget separable solver cannot take."""
    extra = [
        word
        for word, present in (
            ("several budgets", problem.more_budgets),
            ("per-layer rules", problem.layers),
            ("pairwise terms", problem.pairwise),
        )
        if present
    ]
    if extra:
        raise ConfigError(f"solver {solver!r} takes one budget and separable losses; this problem has {', '.join(extra)}.")


METHODS: dict[str, Method] = {
    "auto": _solve_core,
    "core": _solve_core,
    "greedy": _solve_greedy,
    "exhaustive": _solve_exhaustive,
}
