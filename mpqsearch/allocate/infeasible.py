"""Why nothing fits: the constraint that cannot hold, and the smallest value of it that can be attained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import dual
from mpqsearch.allocate.problem import AllocationProblem, CostBudget
from mpqsearch.allocate.tables import Tables, smallest_cost
from mpqsearch.errors import InfeasibleBudgetError


def check_groups(problem: AllocationProblem, tables: Tables) -> None:
    """Refuse groups whose items have no choice in common, whatever the budget.

    Raises:
        InfeasibleBudgetError: With the items of the first such group.
    """
    empty = np.flatnonzero(~np.isfinite(tables.loss).any(axis=1))
    if empty.size:
        items = ", ".join(problem.item_name(i) for i in np.flatnonzero(tables.row == empty[0]).tolist())
        raise InfeasibleBudgetError(
            f"the items of a group have no allowed choice in common, whatever the budget ({items}). Take them apart or "
            "allow more."
        )


def check_budgets(problem: AllocationProblem, tables: Tables) -> None:
    """Refuse budgets that even the cheapest choices exceed.

    Raises:
        InfeasibleBudgetError: With the smallest attainable value.
    """
    for budget, cost in zip(problem.budgets, tables.costs, strict=True):
        smallest = smallest_cost(tables.loss, cost)
        if smallest > budget.limit:
            raise InfeasibleBudgetError(_too_small(budget, smallest))


def check_formats(problem: AllocationProblem, tables: Tables, few: dual.FormatLimits) -> None:
    """Refuse limits on formats that no choice obeys, or that raise a budget's smallest value above its limit.

    Raises:
        InfeasibleBudgetError: With the smallest attainable number of formats or value of the budget.
    """
    if not np.isfinite(_least_sum(tables, np.where(np.isfinite(tables.loss), 0.0, np.inf), few)):
        raise InfeasibleBudgetError(_too_few_formats(problem, tables))
    for budget, cost in zip(problem.budgets, tables.costs, strict=True):
        smallest = int(_least_sum(tables, np.where(np.isfinite(tables.loss), cost.astype(np.float64), np.inf), few))
        if smallest > budget.limit:
            raise InfeasibleBudgetError(f"{_too_small(budget, smallest)} This counts {_rules(problem)}.")


def _least_sum(tables: Tables, values: NDArray[np.float64], few: dual.FormatLimits) -> float:
    """Least total of ``values [r, k]`` with so few formats."""
    free = replace(tables, loss=values, costs=(), limits=())
    return dual.evaluate(free, np.empty(0), few).value


def _too_few_formats(problem: AllocationProblem, tables: Tables) -> str:
    """The smallest limits that would do, each with the other one kept."""
    k, zeros, needs = problem.n_choices, np.where(np.isfinite(tables.loss), 0.0, np.inf), []
    asked = {"max_formats": problem.max_formats, "max_formats_per_layer": problem.max_formats_per_layer}
    for name, limit in asked.items():
        for most in range((limit or k) + 1, k + 1):
            few = dual.format_limits(k, *(asked | {name: most}).values())
            if few is None or np.isfinite(_least_sum(tables, zeros, few)):
                needs.append(f"the smallest attainable {name} is {most}")
                break
    return f"no choice obeys {_rules(problem)} with what the items may take: {'; or '.join(needs)}."


def _rules(problem: AllocationProblem) -> str:
    limits = {name: getattr(problem, name) for name in ("max_formats", "max_formats_per_layer")}
    return " and ".join(f"{name} = {most}" for name, most in limits.items() if most is not None)


def jointly(problem: AllocationProblem, smallest: dict[str, int]) -> InfeasibleBudgetError:
    """Error for constraints that can be met one by one but not together."""
    limits = ", ".join(f"{b.name} <= {b.limit}" for b in problem.budgets)
    rules = f", {_rules(problem)}" if problem.limits_formats else ""
    floors = "; ".join(
        f"the smallest {name} under the other constraints is {least}" for name, least in smallest.items()
    )
    return InfeasibleBudgetError(
        f"no choice meets all constraints together ({limits}{rules})" + (f": {floors}." if floors else ".")
    )


def _too_small(budget: CostBudget, smallest: int) -> str:
    return (
        f"no choice fits: the limit on {budget.name} is {budget.limit}, the smallest attainable value is {smallest} "
        f"({smallest - budget.limit} more)."
    )
