"""``solve``: pick the method for a problem, run it, cost the answer again and report what is proven."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import budgets, infeasible, layered, mckp, pairwise, passes
from mpqsearch.allocate.canonical import Tables, canonical_tables, merged_pairs
from mpqsearch.allocate.exhaustive import exhaustive_choice
from mpqsearch.allocate.greedy import greedy_choice
from mpqsearch.allocate.problem import AllocationProblem, AllocationResult, PairwiseTerms, Status, relative_gap
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, SolverError

INFINITY = float("inf")

USELESS_GAP = 1.0
"""A bound that leaves open whether the loss could be nothing at all is no bound: the answer is called heuristic."""

LINEARIZED_PRODUCTS = 10_000
"""Products of binaries up to which ``auto`` tries to prove a pairwise problem by an integer program."""

MODELLED_PRODUCTS = 500_000
"""Products above which no integer program is even built: it would take gigabytes, and end nowhere."""

QUICK_PRODUCTS = 1_000
"""Products up to which the integer program is faster than any other bound."""

PATIENCE_S = 30.0
"""Seconds that ``auto`` gives an integer program nobody asked for, when there is no time limit."""


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
        InfeasibleBudgetError: Nothing fits; the message states the smallest attainable cost and its causes.
        UnknownNameError: There is no such solver.
        ConfigError: The solver cannot take this kind of problem, or an argument is out of range.
        SolverError: A solver failed or found nothing in its time.
    """
    started = time.perf_counter()
    if time_limit_s is not None and not time_limit_s > 0:
        raise ConfigError(f"time_limit_s must be > 0, got {time_limit_s}.")
    if not 0 <= gap_tolerance < 1:
        raise ConfigError(f"gap_tolerance must be in [0, 1), got {gap_tolerance}.")
    method = METHODS.get(solver, _solve_pulp)
    tables = canonical_tables(problem)
    infeasible.check_ties(problem, tables)
    task = Task(
        problem=problem,
        tables=tables,
        solver=solver,
        gap_tolerance=gap_tolerance,
        started=started,
        deadline=INFINITY if time_limit_s is None else started + time_limit_s,
    )
    if problem.n_items == 0:
        return _empty(task)
    return method(task)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What a method is asked: the problem, its tables, who should solve it and until when."""

    problem: AllocationProblem
    tables: Tables
    solver: str
    gap_tolerance: float
    started: float
    deadline: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What a method found, per row of the tables.

    Attributes:
        choice: ``[r]`` choice of every row.
        proven: Whether the method proved it optimal.
        in_time: Whether the method ended before its deadline.
        floor: Best lower bound that the method proved.
        multipliers: One multiplier per budget.
        solver: Who found it.
        dual: What the multipliers prove by themselves, where the method knows it already.
    """

    choice: NDArray[np.int32]
    proven: bool
    in_time: bool
    floor: float
    multipliers: tuple[float, ...]
    solver: str
    dual: float | None = None


Method = Callable[[Task], AllocationResult]


def finish(task: Task, answer: Answer) -> AllocationResult:
    """Cost the choice again from the raw tables, check it and name what is proven.

    Raises:
        SolverError: The choice breaks a constraint; a solver's word is never taken.
    """
    problem = task.problem
    choice = task.tables.expand(answer.choice)
    loss, costs = problem.evaluate(choice)
    if not problem.permits(choice):
        raise SolverError(f"{answer.solver} returned a choice that breaks allowed, fixed, ties or layer rules.")
    spent = list(zip(problem.budgets, costs, strict=True))
    for budget, cost in spent:
        if cost > budget.limit:
            raise SolverError(f"{answer.solver} returned {budget.name} = {cost}, above the limit {budget.limit}.")
    dual = min(_dual_bound(task, answer), loss)
    bound = loss if answer.proven else min(max(answer.floor, dual), loss)
    gap = relative_gap(loss, bound)
    choice.flags.writeable = False
    return AllocationResult(
        status=_status(answer, gap),
        choice=choice,
        loss=loss,
        cost=costs[0],
        costs={budget.name: cost for budget, cost in spent},
        lower_bound=bound,
        gap=gap,
        multipliers=answer.multipliers,
        dual_bound=dual,
        solver=answer.solver,
        seconds=time.perf_counter() - task.started,
    )


def _status(answer: Answer, gap: float) -> Status:
    if answer.proven:
        return "optimal"
    if not answer.in_time:
        return "time_limit"
    return "feasible" if gap < USELESS_GAP else "heuristic"


def _dual_bound(task: Task, answer: Answer) -> float:
    """What the multipliers prove by themselves; layer rules only restrict, pairs add at least their least value."""
    if answer.dual is not None:
        return answer.dual
    problem, tables = task.problem, task.tables
    dual = budgets.evaluate_dual(tables.loss, tables.costs, tables.limits, np.array(answer.multipliers)).value
    if problem.pairwise is not None and len(problem.pairwise.first):
        dual += float(problem.pairwise.value.min(axis=(1, 2)).sum())
    return dual


def _empty(task: Task) -> AllocationResult:
    """No items: the empty choice is optimal if the limits admit it."""
    for budget in task.problem.budgets:
        if budget.limit < 0:
            raise infeasible.too_small(task.problem, budget, 0)
    nothing = np.empty(0, dtype=np.int32)
    zero = tuple(0.0 for _ in task.problem.budgets)
    return finish(
        task, Answer(choice=nothing, proven=True, in_time=True, floor=0.0, multipliers=zero, solver=task.solver)
    )


def check_feasible(problem: AllocationProblem, tables: Tables) -> None:
    """Refuse budgets that even the cheapest choices exceed.

    Raises:
        InfeasibleBudgetError: With the smallest attainable value and what raises it.
    """
    for budget, cost in zip(problem.budgets, tables.costs, strict=True):
        smallest = mckp.smallest_cost(tables.loss, cost)
        if smallest > budget.limit:
            raise infeasible.too_small(problem, budget, smallest)


def _solve_auto(task: Task) -> AllocationResult:
    """The method that fits the problem."""
    problem = task.problem
    if problem.pairwise is not None and len(problem.pairwise.first):
        return _solve_pairwise(task) if problem.layers is None else _solve_model(task)
    if problem.layers is not None:
        return _solve_layers(task)
    return _solve_budgets(task) if problem.more_budgets else _solve_core(task)


def _solve_core(task: Task) -> AllocationResult:
    if task.problem.layers is not None and task.solver == "core":
        return _solve_layers(task)
    _require_plain(task)
    tables = task.tables
    try:
        found = mckp.solve_table(
            tables.loss, tables.cost, tables.limit, gap_tolerance=task.gap_tolerance, deadline=task.deadline
        )
    except mckp.BudgetTooSmallError:
        check_feasible(task.problem, tables)
        raise
    return finish(
        task,
        Answer(
            choice=found.choice,
            proven=found.proven,
            in_time=found.in_time,
            floor=found.floor,
            multipliers=(found.rate,),
            solver="core",
            dual=found.dual_bound,
        ),
    )


def _solve_greedy(task: Task) -> AllocationResult:
    _require_plain(task)
    tables = task.tables
    check_feasible(task.problem, tables)
    relaxed = mckp.relax(tables.loss, tables.cost, tables.limit)
    choice = greedy_choice(tables.loss, tables.cost, tables.limit)
    return finish(
        task,
        Answer(
            choice=choice,
            proven=False,
            in_time=True,
            floor=relaxed.bound,
            multipliers=(relaxed.rate,),
            solver="greedy",
        ),
    )


def _solve_exhaustive(task: Task) -> AllocationResult:
    choice = exhaustive_choice(task.problem)
    if choice is None:
        check_feasible(task.problem, task.tables)
        raise InfeasibleBudgetError("no choice meets all budgets and rules together.")
    per_item = replace(task, tables=replace(task.tables, row=None)) if task.tables.row is not None else task
    zero = tuple(0.0 for _ in task.problem.budgets)
    return finish(
        per_item,
        Answer(choice=choice, proven=True, in_time=True, floor=-INFINITY, multipliers=zero, solver="exhaustive"),
    )


def _solve_budgets(task: Task) -> AllocationResult:
    tables = task.tables
    check_feasible(task.problem, tables)
    found = budgets.solve_budgets(
        tables.loss, tables.costs, tables.limits, gap_tolerance=task.gap_tolerance, deadline=task.deadline
    )
    if found.infeasible:
        raise infeasible.jointly(task.problem, _floors_within_others(task))
    if found.choice is None:
        raise SolverError(
            "no choice that meets all budgets was found in the time given; allow more, or loosen a limit."
        )
    return finish(
        task,
        Answer(
            choice=found.choice,
            proven=found.proven,
            in_time=found.in_time,
            floor=found.floor,
            multipliers=found.rates,
            solver="core+highs",
        ),
    )


def _floors_within_others(task: Task) -> dict[str, int]:
    """For two budgets: the smallest value of each while the other holds."""
    if len(task.problem.budgets) != 2:
        return {}
    floors = {}
    for number, other in ((0, 1), (1, 0)):
        tables = task.tables
        as_loss = np.where(np.isfinite(tables.loss), tables.costs[number], np.inf).astype(np.float64)
        found = mckp.solve_table(as_loss, tables.costs[other], tables.limits[other], deadline=task.deadline)
        floors[task.problem.budgets[number].name] = passes.totals(as_loss, tables.costs[number], found.choice)[1]
    return floors


def _solve_layers(task: Task) -> AllocationResult:
    """Two levels where the costs have the form; an integer program for the rest."""
    problem, tables = task.problem, task.tables
    assert problem.layers is not None
    if tables.row is not None:
        return _solve_model(task)
    try:
        found = layered.solve_layers(
            tables.loss,
            tables.costs,
            tables.limits,
            problem.layers,
            gap_tolerance=task.gap_tolerance,
            deadline=task.deadline,
        )
    except layered.NotTwoLevelError:
        return _solve_model(task)
    except layered.NoLayerOptionError as error:
        raise InfeasibleBudgetError(
            f"no choice obeys the rules of layer {error.layer}, whatever the budget."
        ) from error
    except layered.LayerBudgetError as error:
        raise infeasible.too_small(problem, problem.budgets[error.number], error.smallest) from error
    if found.infeasible:
        raise infeasible.jointly(problem, {})
    if found.choice is None:
        raise SolverError(
            "no choice that meets all budgets and layer rules was found in the time given; allow more, or loosen a "
            "limit."
        )
    return finish(
        task,
        Answer(
            choice=found.choice,
            proven=found.proven,
            in_time=found.in_time,
            floor=found.floor,
            multipliers=found.rates,
            solver="core" if len(tables.costs) == 1 else "core+highs",
        ),
    )


def _solve_pairwise(task: Task) -> AllocationResult:
    """Linearization, exchange and bound; an integer program tries to prove small ones."""
    problem, tables = task.problem, task.tables
    check_feasible(problem, tables)
    pairs, loss = _row_pairs(task)
    small = pairs.value.size <= LINEARIZED_PRODUCTS
    found = pairwise.solve_pairwise(
        loss,
        tables.costs,
        tables.limits,
        pairs,
        convex=pairs.value.size > QUICK_PRODUCTS,
        gap_tolerance=max(task.gap_tolerance, 1e-6),
        deadline=task.deadline,
    )
    if found is None:
        if small:
            return _solve_model(task)
        raise SolverError(
            "no choice that meets all budgets was found in the time given; allow more, or loosen a limit."
        )
    gap = relative_gap(found.loss, found.bound)
    answer = Answer(
        choice=found.choice,
        proven=gap <= mckp.ROUNDING,
        in_time=time.perf_counter() < task.deadline,
        floor=found.bound,
        multipliers=_multipliers(task, loss),
        solver="linearization+exchange",
    )
    if gap > task.gap_tolerance and small and answer.in_time:
        answer = _improved_by_model(replace(task, solver="highs"), answer, time.perf_counter() + PATIENCE_S)
    return finish(task, answer)


def _row_pairs(task: Task) -> tuple[PairwiseTerms, NDArray[np.floating]]:
    assert task.problem.pairwise is not None
    return merged_pairs(task.problem.pairwise, task.tables.item_row, task.tables.loss)


def _solve_pulp(task: Task) -> AllocationResult:
    """An integer program of the whole problem, by the solver the caller named."""
    from mpqsearch.allocate import ilp

    ilp.make_solver(task.solver, None)  # an unknown name is refused before any work
    return _solve_model(task)


def _solve_model(task: Task) -> AllocationResult:
    """An integer program, which competes with the greedy solution where there is one."""
    problem, tables = task.problem, task.tables
    check_feasible(problem, tables)
    if problem.pairwise is not None and problem.pairwise.value.size > MODELLED_PRODUCTS:
        raise ConfigError(
            f"{problem.pairwise.value.size} products of pairwise terms are too many for an integer program (at most "
            f"{MODELLED_PRODUCTS}), "
            "which layer rules and solvers asked for by name need. Drop the rules, or keep the pairs that matter."
        )
    known: NDArray[np.int32] | None = None
    if problem.layers is None and not problem.more_budgets:
        known = greedy_choice(tables.loss, tables.cost, tables.limit)
    start = Answer(
        choice=np.empty(0, dtype=np.int32) if known is None else known,
        proven=False,
        in_time=True,
        floor=-INFINITY,
        multipliers=_multipliers(task),
        solver=_pulp_name(task),
    )
    return finish(task, _improved_by_model(task, start, task.deadline))


def _multipliers(task: Task, loss: NDArray[np.floating] | None = None) -> tuple[float, ...]:
    """Multipliers of the separable relaxation, with losses of its own on request."""
    tables = task.tables
    loss = tables.loss if loss is None else loss
    if len(tables.costs) == 1:
        return (mckp.relax(loss, tables.cost, tables.limit).rate,)
    rates, _ = budgets.maximize_dual(loss, tables.costs, tables.limits, deadline=task.deadline)
    return tuple(float(rate) for rate in rates)


def _improved_by_model(task: Task, start: Answer, until: float) -> Answer:
    """The better of a start (possibly empty) and the integer program's answer, re-costed in integers.

    Raises:
        InfeasibleBudgetError: The integer program proves that nothing is admissible.
        SolverError: Neither has an admissible choice.
    """
    from mpqsearch.allocate import ilp

    problem, tables = task.problem, task.tables
    loss: NDArray[np.floating] = tables.loss
    pairs = None
    if problem.pairwise is not None:
        pairs, loss = _row_pairs(task)
    known_loss = problem.evaluate(tables.expand(start.choice))[0] if start.choice.size else INFINITY
    answer = ilp.solve_ilp(
        loss,
        tables.costs,
        tables.limits,
        reference=known_loss if start.choice.size else None,
        side=ilp.SideRules(row=tables.item_row, layers=problem.layers, pairs=pairs),
        solver=_pulp_name(task),
        gap=task.gap_tolerance * (0.0 if known_loss == INFINITY else abs(known_loss)),
        time_limit_s=ilp.remaining(min(until, task.deadline)),
    )
    if answer.choice is not None and _admissible(task, answer.choice):
        found_loss = problem.evaluate(tables.expand(answer.choice))[0]
        if found_loss <= known_loss * (1 + mckp.ROUNDING):
            proven = answer.proven and task.gap_tolerance == 0
            return replace(start, choice=answer.choice, proven=proven, in_time=answer.proven, solver=_pulp_name(task))
    if start.choice.size:
        return replace(start, in_time=answer.proven or time.perf_counter() < task.deadline)
    if answer.infeasible:
        raise infeasible.jointly(problem, {})
    raise SolverError(f"{_pulp_name(task)} found no admissible choice in the time given; allow more.")


def _pulp_name(task: Task) -> str:
    return "highs" if task.solver in METHODS else task.solver


def _admissible(task: Task, rows: NDArray[np.int32]) -> bool:
    choice = task.tables.expand(rows)
    _, costs = task.problem.evaluate(choice)
    within = all(cost <= budget.limit for cost, budget in zip(costs, task.problem.budgets, strict=True))
    return within and task.problem.permits(choice)


def _require_plain(task: Task) -> None:
    """Refuse what a single-budget separable solver cannot take."""
    problem = task.problem
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
        raise ConfigError(
            f"solver {task.solver!r} takes one budget and separable losses; this problem has {', '.join(extra)}. Use "
            "solver='auto'."
        )


METHODS: dict[str, Method] = {
    "auto": _solve_auto,
    "core": _solve_core,
    "greedy": _solve_greedy,
    "exhaustive": _solve_exhaustive,
}
