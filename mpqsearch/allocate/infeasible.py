"""Why nothing fits: the smallest attainable value of a budget, and the overrides, ties and masks that raise it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.canonical import Tables, canonical_tables, masked_loss, tie_rows
from mpqsearch.allocate.problem import FREE, AllocationProblem, CostBudget
from mpqsearch.errors import InfeasibleBudgetError

LISTED = 5
"""Causes of one kind that a message names."""


def check_ties(problem: AllocationProblem, tables: Tables) -> None:
    """Refuse tied items that have no choice in common, whatever the budget.

    Raises:
        InfeasibleBudgetError: With the items of the first such group and what each of them may take.
    """
    if tables.row is None:
        return
    empty = np.flatnonzero(~np.isfinite(tables.loss).any(axis=1))
    if not empty.size:
        return
    permitted = np.isfinite(masked_loss(problem))
    members = np.flatnonzero(tables.row == empty[0])
    listed = "; ".join(
        f"{problem.item_name(item)}: "
        f"{', '.join(problem.choice_name(c) for c in np.flatnonzero(permitted[item]).tolist())}"
        for item in members[:LISTED].tolist()
    )
    raise InfeasibleBudgetError(
        f"tied items have no allowed choice in common, whatever the budget ({listed}). Untie them or allow more."
    )


def too_small(problem: AllocationProblem, budget: CostBudget, smallest: int) -> InfeasibleBudgetError:
    """Error for a limit below the smallest attainable value, with the causes in order of what they cost."""
    causes = [*_masks(problem, budget), *_pins(problem, budget), *_ties(problem, budget)]
    message = (
        f"no choice fits: the limit on {budget.name} is {budget.limit}, the smallest attainable value is {smallest} "
        f"({smallest - budget.limit} more)."
    )
    if problem.layers is not None:
        message += " The layer rules are counted."
    return InfeasibleBudgetError(message + "".join(f" {cause}" for cause in causes))


def jointly(problem: AllocationProblem, others_met: dict[str, int]) -> InfeasibleBudgetError:
    """Error for budgets that can be met one by one but not together."""
    limits = ", ".join(f"{budget.name} <= {budget.limit}" for budget in problem.budgets)
    floors = "; ".join(f"the smallest {name} within the other limits is {value}" for name, value in others_met.items())
    return InfeasibleBudgetError(
        f"no choice meets all budgets together ({limits})" + (f": {floors}." if floors else ".")
    )


def smallest_attainable(problem: AllocationProblem, number: int) -> int:
    """Smallest total of a budget over all choices that masks, overrides and ties admit."""
    tables = canonical_tables(problem)
    sizes = np.where(
        np.isfinite(tables.loss), tables.costs[number].astype(np.int64, copy=False), np.iinfo(np.int64).max
    )
    return int(sizes.min(axis=1).sum()) if len(sizes) else 0


def _least(problem: AllocationProblem, budget: CostBudget) -> NDArray[np.int64]:
    """Smallest cost of every item under its mask alone."""
    sizes = budget.cost.astype(np.int64)
    if problem.allowed is not None:
        sizes = np.where(problem.allowed, sizes, np.iinfo(np.int64).max)
    least: NDArray[np.int64] = sizes.min(axis=1)
    return least


def _masks(problem: AllocationProblem, budget: CostBudget) -> list[str]:
    if problem.allowed is None:
        return []
    extra = _least(problem, budget) - budget.cost.min(axis=1)
    return _sentence(problem, "Choices that are not allowed", extra)


def _pins(problem: AllocationProblem, budget: CostBudget) -> list[str]:
    if problem.fixed_choice is None:
        return []
    overrides = problem.fixed_choice != FREE
    chosen = budget.cost[np.arange(problem.n_items), np.where(overrides, problem.fixed_choice, 0)].astype(np.int64)
    return _sentence(problem, "Fixed items", np.where(overrides, chosen - _least(problem, budget), 0))


def _ties(problem: AllocationProblem, budget: CostBudget) -> list[str]:
    row = tie_rows(problem.tie_labels)
    if row is None:
        return []
    tables = canonical_tables(problem)
    number = [other.name for other in problem.budgets].index(budget.name)
    together = np.where(np.isfinite(tables.loss), tables.costs[number], np.iinfo(np.int64).max).min(axis=1)
    apart = np.zeros(len(together), dtype=np.int64)
    own = np.where(
        np.isfinite(masked_loss(problem)), budget.cost.astype(np.int64, copy=False), np.iinfo(np.int64).max
    ).min(axis=1)
    np.add.at(apart, row, own)
    extra = np.zeros(problem.n_items, dtype=np.int64)
    _, first = np.unique(row, return_index=True)
    extra[first] = together - apart
    return _sentence(problem, "Ties (named by their first item)", extra)


def _sentence(problem: AllocationProblem, what: str, extra: NDArray[np.int64]) -> list[str]:
    order = np.argsort(-extra, kind="stable")
    order = order[extra[order] > 0]
    if not order.size:
        return []
    named = ", ".join(f"{problem.item_name(int(item))} +{int(extra[item])}" for item in order[:LISTED])
    more = f" and {order.size - LISTED} more" if order.size > LISTED else ""
    return [f"{what} raise it by {int(extra[order].sum())}: {named}{more}."]
