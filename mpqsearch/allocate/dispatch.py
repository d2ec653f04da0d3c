"""``solve``: pick the method for a problem, run it, cost the answer again and report what is proven."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from mpqsearch.allocate import ilp, infeasible, mckp
from mpqsearch.allocate.constrained import NothingFoundError, solve_by_program, solve_constrained
from mpqsearch.allocate.pairwise import solve_pairwise
from mpqsearch.allocate.problem import AllocationProblem, CostBudget
from mpqsearch.allocate.result import AllocationResult, Status, relative_gap
from mpqsearch.allocate.tables import plain_tables, total_cost
from mpqsearch.allocate.task import Answer, Task
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, SolverError


def solve(problem: AllocationProblem, *, solver: str = "auto", gap_tolerance: float = 0.0) -> AllocationResult:
    """Best admissible choice of ``problem``.

    One budget with ``allowed`` and ``groups`` goes to the exact core, at any size. Several budgets and
    limits on formats go to PuLP, with a Lagrangian bound and a heuristic around it (see ``constrained``): proofs up to
    some thousand items, a certified gap beyond, in a minute at most. Losses of pairs go to a heuristic.

    Args:
        problem: What to solve.
        solver: ``auto``, ``core`` (the exact core, one budget only), ``highs``, ``cbc`` or the name of any other PuLP
            solver.
        gap_tolerance: Stop when the relative gap is certified to be at most this; 0 asks for a proof of optimality.

    Raises:
        InfeasibleBudgetError: Nothing fits; the message names the constraint and its smallest attainable value.
        UnknownNameError: There is no such solver.
        ConfigError: The solver cannot take this kind of problem, or an argument is out of range.
        SolverError: A solver failed or found nothing in its time.
    """
    if not 0 <= gap_tolerance < 1:
        raise ConfigError(f"gap_tolerance must be in [0, 1), got {gap_tolerance}.")
    _check_solver(problem, solver)
    try:
        return _run(problem, solver, gap_tolerance)
    except NothingFoundError as error:
        raise _nothing_fits(problem, error.impossible) from error


def _run(problem: AllocationProblem, solver: str, gap_tolerance: float) -> AllocationResult:
    started = time.perf_counter()
    tables = plain_tables(problem)
    infeasible.check_groups(problem, tables)
    infeasible.check_budgets(problem, tables)
    task = Task(
        problem=problem,
        tables=tables,
        solver=solver,
        gap_tolerance=gap_tolerance,
        started=started,
    )
    return finish(task, _answer(task))


def _check_solver(problem: AllocationProblem, solver: str) -> None:
    constrained = bool(problem.more_budgets) or problem.limits_formats
    if solver not in ("auto", "core"):
        ilp.make_solver(solver)  # an unknown name is refused before any work
    if problem.pairwise is not None and (constrained or solver not in ("auto", "core")):
        raise ConfigError("losses of pairs take one budget, no limit on formats, and solver='auto'.")
    if solver == "core" and constrained:
        raise ConfigError("solver 'core' takes one budget and no limit on formats. Use solver='auto'.")


def _answer(task: Task) -> Answer:
    problem = task.problem
    if not problem.n_items:
        nothing = np.empty(0, dtype=np.int32)
        zeros = (0.0,) * len(problem.limits)
        return Answer(choice=nothing, proof="bound", floor=0.0, dual_bound=0.0, multipliers=zeros, solver="core")
    if problem.pairwise is not None and len(problem.pairwise.first):
        return solve_pairwise(task)
    if problem.more_budgets or problem.limits_formats:
        return solve_constrained(task)
    return _solve_core(task) if task.solver in ("auto", "core") else solve_by_program(task)


def _solve_core(task: Task) -> Answer:
    tables = task.tables
    solved = mckp.solve_table(tables.loss, tables.cost, tables.limit, gap_tolerance=task.gap_tolerance)
    met = solved.loss - solved.dual_bound <= mckp.ROUNDING * abs(solved.loss)
    return Answer(
        choice=solved.choice,
        proof="bound" if met else "search" if solved.proven else "none",
        floor=solved.floor,
        dual_bound=solved.dual_bound,
        multipliers=(solved.rate,),
        solver="core",
    )


def finish(task: Task, answer: Answer) -> AllocationResult:
    """Cost the choice again from the raw tables, check it and name what is proven.

    Raises:
        SolverError: The choice breaks a constraint; a solver's word is never taken.
    """
    problem, choice = task.problem, task.tables.expand(answer.choice)
    if not problem.permits(choice):
        raise SolverError(f"{answer.solver} returned a choice that breaks allowed, groups or limits on formats.")
    loss, costs = problem.evaluate(choice)
    spent = {b.name: cost for b, cost in zip(problem.budgets, costs, strict=True)}
    for (name, cost), limit in zip(spent.items(), problem.limits, strict=True):
        if cost > limit:
            raise SolverError(f"{answer.solver} returned {name} = {cost}, above the limit {limit}.")
    dual_bound = min(answer.dual_bound, loss)
    proven_here = answer.proof in ("bound", "search")
    bound = loss if proven_here else min(max(answer.floor, dual_bound), loss)
    choice.flags.writeable = False
    return AllocationResult(
        status=_status(task, answer),
        proof=answer.proof,
        choice=choice,
        loss=loss,
        cost=costs[0],
        costs=spent,
        lower_bound=bound,
        gap=relative_gap(loss, bound),
        multipliers=answer.multipliers,
        dual_bound=dual_bound,
        solver=answer.solver,
        seconds=time.perf_counter() - task.started,
    )


def _status(task: Task, answer: Answer) -> Status:
    if answer.proof != "none":
        return "optimal"
    return "heuristic" if task.problem.pairwise is not None else "feasible"


def _nothing_fits(problem: AllocationProblem, impossible: bool) -> Exception:
    """Why no choice was found: the smallest value of a budget under all other constraints, if it is above the limit."""
    smallest: dict[str, int] = {}
    for number, limit in enumerate(problem.limits):
        least = _smallest_under_others(problem, number)
        if least is not None and least > limit:
            smallest[problem.budgets[number].name] = least
    if smallest or impossible:
        return infeasible.jointly(problem, smallest)
    return SolverError("no choice that meets all constraints was found in time; loosen a limit.")


def _smallest_under_others(problem: AllocationProblem, number: int) -> int | None:
    """Smallest total of one budget when all other constraints hold; None where that is not proven."""
    others = [b for other, b in enumerate(problem.budgets) if other != number]
    cost = problem.budgets[number].cost
    first = others[0] if others else CostBudget(name="nothing", cost=np.zeros_like(problem.cost), limit=0)
    program = replace(
        problem,
        loss=cost.astype(np.float64),
        cost=first.cost,
        limit=int(first.limit),
        budget_name=first.name,
        more_budgets=tuple(others[1:]),
    )
    try:
        least = _run(program, "auto", 0.0)
    except (InfeasibleBudgetError, NothingFoundError):
        return None
    return total_cost(cost, least.choice) if least.status == "optimal" else None
