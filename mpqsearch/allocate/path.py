"""The whole Pareto path of one budget: every vertex of the lower convex hull of loss against cost, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.hull import HullSteps, hull_steps
from mpqsearch.allocate.infeasible import check_groups
from mpqsearch.allocate.problem import AllocationProblem
from mpqsearch.allocate.tables import Tables, plain_tables, total_cost, total_loss
from mpqsearch.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParetoPath:
    """Solutions of all budgets at once.

    Vertex 0 is the cheapest map; step j leads from vertex j to vertex j + 1. Every vertex is optimal for its own cost;
    between two vertices the straight line is a lower bound and the cheaper vertex a solution.

    Attributes:
        budgets: ``[m + 1]`` total cost of every vertex, increasing.
        losses: ``[m + 1]`` total loss of every vertex, decreasing.
        rates: ``[m + 1]`` loss saved per unit of cost by the step from every vertex, never increasing; 0 at the last.
        tables: The tables, one row per group or free item.
        steps: The steps: which row takes which choice.
    """

    budgets: NDArray[np.int64]
    losses: NDArray[np.float64]
    rates: NDArray[np.float64]
    tables: Tables
    steps: HullSteps

    def __repr__(self) -> str:
        return f"ParetoPath({len(self.budgets)} vertices, cost {self.budgets[0]} to {self.budgets[-1]})"

    def vertex(self, limit: int) -> int:
        """Dearest vertex that costs at most ``limit``; -1 when even the cheapest map costs more."""
        return int(np.searchsorted(self.budgets, limit, side="right")) - 1

    def lower_bound(self, limit: int) -> float:
        """No map within ``limit``, which at least one vertex meets, has a smaller loss (linear relaxation)."""
        at = self.vertex(limit)
        return float(self.losses[at]) - float(self.rates[at]) * int(limit - self.budgets[at])

    def choice(self, vertex: int) -> NDArray[np.int32]:
        """``[n]`` choice of every item at a vertex."""
        return self.tables.expand(self.steps.choice_after(vertex))


def solve_path(problem: AllocationProblem) -> ParetoPath:
    """All budgets of ``problem`` at once; the limit of its budget is not looked at.

    Raises:
        ConfigError: The problem has several budgets, limits on formats or losses of pairs.
        InfeasibleBudgetError: The items of a group have no choice in common.
    """
    if problem.constrained or problem.pairwise is not None:
        raise ConfigError("a path takes one budget, no limit on formats and no losses of pairs.")
    tables = plain_tables(problem)
    check_groups(problem, tables)
    steps = hull_steps(tables.loss, tables.costs[0])
    first = total_cost(tables.costs[0], steps.base)
    least = total_loss(tables.loss, steps.choice_after(len(steps.item)))
    # Summed from the far end: subtracting from the largest loss would cancel away the small differences.
    tail = np.cumsum(steps.saved[::-1])[::-1]
    return ParetoPath(
        budgets=np.concatenate([[first], first + np.cumsum(steps.size)]).astype(np.int64),
        losses=np.append(tail, 0.0) + least,
        rates=np.append(steps.rate, 0.0),
        tables=tables,
        steps=steps,
    )
