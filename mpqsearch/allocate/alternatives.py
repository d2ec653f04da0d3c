"""Near-optimal maps that differ, for an outer search to measure: the surrogate's second best may be the real best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpqsearch.allocate.dispatch import solve
from mpqsearch.allocate.problem import AllocationProblem, CostBudget
from mpqsearch.allocate.result import AllocationResult
from mpqsearch.errors import ConfigError, InfeasibleBudgetError


def solve_alternatives(
    problem: AllocationProblem,
    count: int,
    *,
    min_distance: int = 1,
    gap_tolerance: float = 0.0,
) -> list[AllocationResult]:
    """The best map, then the best that differs from all before in at least ``min_distance`` items, and so on.

    Every map before is one more budget: of the items that keep its choice at most n - ``min_distance`` may remain. So
    each answer carries its own certified gap, and large problems work as small ones do.

    Args:
        problem: What to solve.
        count: Maps asked for; fewer come back when no further one exists.
        min_distance: Items in which every two maps differ at least; 1 forbids repetition only.
        gap_tolerance: Relative gap at which each solve may stop.

    Raises:
        ConfigError: ``count`` or ``min_distance`` is not positive.
        InfeasibleBudgetError: Not even one map fits.
    """
    if count < 1 or min_distance < 1:
        raise ConfigError(f"count and min_distance must be >= 1, got {count} and {min_distance}.")
    maps = [solve(problem, gap_tolerance=gap_tolerance)]
    cuts: list[CostBudget] = []
    while len(maps) < count:
        cuts.append(_cut(problem, maps[-1], len(maps), min_distance))
        narrowed = replace(problem, more_budgets=(*problem.more_budgets, *cuts))
        try:
            answer = solve(narrowed, gap_tolerance=gap_tolerance)
        except InfeasibleBudgetError:
            break
        maps.append(_as_answer_to(problem, answer))
    return maps


def _cut(problem: AllocationProblem, earlier: AllocationResult, number: int, min_distance: int) -> CostBudget:
    """Budget on the items that keep an earlier map's choice."""
    same = np.zeros(problem.loss.shape, dtype=np.int32)
    same[np.arange(problem.n_items), earlier.choice] = 1
    return CostBudget(name=f"items as in map {number}", cost=same, limit=problem.n_items - min_distance)


def _as_answer_to(problem: AllocationProblem, result: AllocationResult) -> AllocationResult:
    """Report only the budgets that the caller knows. The bound holds for maps that differ, so it is none of theirs."""
    costs = {budget.name: result.costs[budget.name] for budget in problem.budgets}
    return replace(result, costs=costs, multipliers=result.multipliers[: len(costs)], dual_bound=-float("inf"))
