"""``solve``: pick the method for a problem, run it, cost the answer again and report what is proven."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from mpqsearch.allocate import ilp, infeasible, mckp
from mpqsearch.allocate.certificate import broken_rule
from mpqsearch.allocate.constrained import NothingFoundError, solve_constrained
from mpqsearch.allocate.pairwise import solve_pairwise
from mpqsearch.allocate.problem import AllocationProblem, CostBudget
from mpqsearch.allocate.result import AllocationResult, Answer, Status
from mpqsearch.allocate.tables import Tables, plain_tables
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, SolverError


def solve(problem: AllocationProblem, *, solver: str = "auto") -> AllocationResult:
    """Best admissible choice of ``problem``.

    One budget with ``allowed`` and ``groups`` goes to the exact core, at any size. Several budgets and
    limits on formats go to PuLP, with a Lagrangian bound and a heuristic around it (see ``constrained``): proofs for
    some hundred items, a certified gap beyond, in a minute at most. Losses of pairs go to a heuristic.

    Args:
        problem: What to solve.
        solver: ``auto``, ``core`` (the exact core, one budget only), ``highs``, ``cbc`` or the name of any other PuLP
            solver.

    Raises:
        InfeasibleBudgetError: Nothing fits; the message names the constraint and its smallest attainable value.
        UnknownNameError: There is no such solver.
        ConfigError: The solver cannot take this kind of problem.
        SolverError: A solver failed or found nothing in its time.
    """
    if solver not in ("auto", "core"):
        ilp.make_solver(solver)  # an unknown name is refused before any work
    if problem.pairwise is not None and (problem.constrained or solver not in ("auto", "core")):
        raise ConfigError("losses of pairs take one budget, no limit on formats, and solver='auto'.")
    if solver == "core" and problem.constrained:
        raise ConfigError("solver 'core' takes one budget and no limit on formats. Use solver='auto'.")
    try:
        return _solve(problem, solver)
    except NothingFoundError as error:
        raise _nothing_fits(problem, error.impossible) from error


def _solve(problem: AllocationProblem, solver: str) -> AllocationResult:
    started = time.perf_counter()
    tables = plain_tables(problem)
    infeasible.check_groups(problem, tables)
    infeasible.check_budgets(problem, tables)
    answer = _answer(problem, tables, solver)
    return _checked(problem, tables, answer, time.perf_counter() - started)


def _answer(problem: AllocationProblem, tables: Tables, solver: str) -> Answer:
    if not problem.n_items:
        nothing, zeros = np.empty(0, dtype=np.int32), (0.0,) * len(problem.budgets)
        return Answer(choice=nothing, proof="bound", floor=0.0, dual_bound=0.0, multipliers=zeros, solver="core")
    if problem.pairwise is not None:
        return solve_pairwise(problem.pairwise, tables)
    if problem.constrained or solver not in ("auto", "core"):
        return solve_constrained(problem, tables, solver)
    solved = mckp.solve_table(tables.loss, tables.costs[0], tables.limits[0])
    met = solved.loss - solved.dual_bound <= mckp.ROUNDING * abs(solved.loss)
    return Answer(
        choice=solved.choice,
        proof="bound" if met else "search" if solved.proven else "none",
        floor=solved.floor,
        dual_bound=solved.dual_bound,
        multipliers=(solved.rate,),
        solver="core",
    )


def _checked(problem: AllocationProblem, tables: Tables, answer: Answer, seconds: float) -> AllocationResult:
    """Cost the choice again from the raw tables, check it and name what is proven.

    Raises:
        SolverError: The choice breaks a constraint; a solver's word is never taken.
    """
    choice = tables.expand(answer.choice)
    loss, costs = problem.evaluate(choice)
    over = [f"{b.name} = {cost} > {b.limit}" for b, cost in zip(problem.budgets, costs, strict=True) if cost > b.limit]
    broken = broken_rule(problem, choice) or ", ".join(over)
    if broken:
        raise SolverError(f"{answer.solver} returned a choice that does not hold: {broken}.")
    dual_bound = min(answer.dual_bound, loss)
    proven_here = answer.proof in ("bound", "search")
    bound = loss if proven_here else min(max(answer.floor, dual_bound), loss)
    unproven: Status = "feasible" if problem.pairwise is None else "heuristic"
    choice.flags.writeable = False
    return AllocationResult(
        status=unproven if answer.proof == "none" else "optimal",
        proof=answer.proof,
        choice=choice,
        loss=loss,
        costs={b.name: cost for b, cost in zip(problem.budgets, costs, strict=True)},
        lower_bound=bound,
        gap=0.0 if loss <= bound else (loss - bound) / abs(loss) if loss else np.inf,
        multipliers=answer.multipliers,
        dual_bound=dual_bound,
        solver=answer.solver,
        seconds=seconds,
    )


def _nothing_fits(problem: AllocationProblem, impossible: bool) -> Exception:
    """Why no choice was found: the smallest value of a budget under all other constraints, if it is above the limit."""
    smallest = {b.name: least for b in problem.budgets if (least := _smallest_under_others(problem, b)) > b.limit}
    if smallest or impossible:
        return infeasible.jointly(problem, smallest)
    return SolverError("no choice that meets all constraints was found in time; loosen a limit.")


def _smallest_under_others(problem: AllocationProblem, budget: CostBudget) -> int:
    """Smallest total of one budget when all other constraints hold; -1 where that is not proven."""
    others = tuple(b for b in problem.budgets if b.name != budget.name)
    unlimited = CostBudget(name="nothing", cost=np.zeros_like(budget.cost), limit=0)
    try:
        asked = replace(problem, loss=budget.cost.astype(np.float64), budgets=others or (unlimited,))
        least = _solve(asked, "auto")
    except (InfeasibleBudgetError, NothingFoundError):
        return -1
    total = int(budget.cost[np.arange(problem.n_items), least.choice].sum(dtype=np.int64))
    return total if least.status == "optimal" else -1
