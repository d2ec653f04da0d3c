"""The whole Pareto path of one budget: every vertex of the lower convex hull of loss against cost, in one pass."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.hull import HullSteps, hull_steps
from mpqsearch.allocate.infeasible import check_groups
from mpqsearch.allocate.problem import AllocationProblem
from mpqsearch.allocate.result import AllocationResult, relative_gap
from mpqsearch.allocate.tables import Tables, plain_tables, total_cost, total_loss
from mpqsearch.errors import ConfigError, InfeasibleBudgetError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParetoPath:
    """Solutions of all budgets at once.

    Vertex 0 is the cheapest map; step j leads from vertex j to vertex j + 1. Every vertex is optimal for its own cost;
    between two vertices the straight line is a lower bound and the cheaper vertex a solution.

    Attributes:
        problem: The problem whose limit is left open.
        budgets: ``[m + 1]`` total cost of every vertex, increasing.
        losses: ``[m + 1]`` total loss of every vertex, decreasing.
        rates: ``[m]`` loss saved per unit of cost by every step, never increasing.
        tables: The tables, one row per group or free item.
        steps: The steps: which row takes which choice.
    """

    problem: AllocationProblem
    budgets: NDArray[np.int64]
    losses: NDArray[np.float64]
    rates: NDArray[np.float64]
    tables: Tables
    steps: HullSteps

    def __repr__(self) -> str:
        ends = f"{self.problem.budget_name} {self.budgets[0]} to {self.budgets[-1]}"
        return f"ParetoPath({len(self.budgets)} vertices, {ends})"

    def vertex(self, limit: int) -> int:
        """Dearest vertex that costs at most ``limit``.

        Raises:
            InfeasibleBudgetError: Even the cheapest map costs more.
        """
        if limit < self.budgets[0]:
            raise InfeasibleBudgetError(
                f"no choice fits: the limit on {self.problem.budget_name} is {limit}, "
                f"the smallest attainable value is {self.budgets[0]}."
            )
        return int(np.searchsorted(self.budgets, limit, side="right")) - 1

    def lower_bound(self, limit: int) -> float:
        """No map within ``limit`` has a smaller loss (linear relaxation)."""
        at = self.vertex(limit)
        rate = float(self.rates[at]) if at < len(self.rates) else 0.0
        return float(self.losses[at]) - rate * int(limit - self.budgets[at])

    def choice(self, vertex: int) -> NDArray[np.int32]:
        """``[n]`` choice of every item at a vertex."""
        return self.tables.expand(self.steps.choice_after(vertex))

    def at(self, limit: int) -> AllocationResult:
        """The hull's answer for one budget, without solving again: feasible, with a certified gap."""
        started = time.perf_counter()
        vertex = self.vertex(limit)
        choice = self.choice(vertex)
        loss, costs = self.problem.evaluate(choice)
        bound = min(self.lower_bound(limit), loss)
        choice.flags.writeable = False
        return AllocationResult(
            status="optimal" if bound == loss else "feasible",
            proof="bound" if bound == loss else "none",
            choice=choice,
            loss=loss,
            cost=costs[0],
            costs={self.problem.budget_name: costs[0]},
            lower_bound=bound,
            gap=relative_gap(loss, bound),
            multipliers=(float(self.rates[vertex]) if vertex < len(self.rates) else 0.0,),
            dual_bound=bound,
            solver="path",
            seconds=time.perf_counter() - started,
        )


def solve_path(problem: AllocationProblem) -> ParetoPath:
    """All budgets of ``problem`` at once; ``problem.limit`` is not looked at.

    Raises:
        ConfigError: The problem has several budgets, limits on formats or losses of pairs.
        InfeasibleBudgetError: The items of a group have no choice in common.
    """
    if problem.more_budgets or problem.limits_formats or problem.pairwise is not None:
        raise ConfigError("a path takes one budget, no limit on formats and no losses of pairs.")
    tables = plain_tables(problem)
    check_groups(problem, tables)
    steps = hull_steps(tables.loss, tables.cost)
    first = total_cost(tables.cost, steps.base)
    least = total_loss(tables.loss, steps.choice_after(len(steps.item)))
    # Summed from the far end: subtracting gains from the largest loss would cancel away the small ones.
    tail = np.cumsum(steps.gain[::-1])[::-1]
    return ParetoPath(
        problem=problem,
        budgets=np.concatenate([[first], first + np.cumsum(steps.size)]).astype(np.int64),
        losses=np.append(tail, 0.0) + least,
        rates=steps.rate,
        tables=tables,
        steps=steps,
    )
