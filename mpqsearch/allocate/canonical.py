"""From a problem to plain tables: forbidden choices become infinite losses, tied items become one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import FREE, AllocationProblem, Floats, Integers, Mask, PairwiseTerms


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tables:
    """What the solvers see.

    Attributes:
        loss: ``[r, k]``; infinite where a choice is forbidden.
        costs: One ``[r, k]`` integer table per budget.
        limits: One limit per budget.
        row: ``[n]`` row of every item, or None when items are rows.
    """

    loss: Floats
    costs: tuple[Integers, ...]
    limits: tuple[int, ...]
    row: NDArray[np.int64] | None

    @property
    def cost(self) -> Integers:
        """Cost table of the main budget."""
        return self.costs[0]

    @property
    def limit(self) -> int:
        """Limit of the main budget."""
        return self.limits[0]

    @property
    def item_row(self) -> NDArray[np.int64]:
        """``[n]`` row of every item."""
        return np.arange(len(self.loss)) if self.row is None else self.row

    def expand(self, choice: Integers) -> NDArray[np.int32]:
        """Choice per item from choice per row."""
        chosen = choice if self.row is None else choice[self.row]
        return np.ascontiguousarray(chosen, dtype=np.int32)


def canonical_tables(problem: AllocationProblem) -> Tables:
    """Tables of ``problem`` without overrides, masks and ties; nothing is copied when there are none."""
    loss = masked_loss(problem)
    budgets = problem.budgets
    costs = tuple(budget.cost for budget in budgets)
    limits = tuple(budget.limit for budget in budgets)
    row = tie_rows(problem.tie_labels)
    if row is not None:
        loss = _sum_rows(loss.astype(np.float64), row)
        costs = tuple(_sum_rows(cost.astype(np.int64), row) for cost in costs)
    return Tables(loss=loss, costs=costs, limits=limits, row=row)


def masked_loss(problem: AllocationProblem) -> Floats:
    """The loss table with infinity in every cell that overrides or masks forbid."""
    mask = _permitted(problem)
    return problem.loss if mask is None else np.where(mask, problem.loss, problem.loss.dtype.type(np.inf))


def _permitted(problem: AllocationProblem) -> Mask | None:
    mask, fixed = problem.allowed, problem.fixed_choice
    if fixed is None or not bool((fixed != FREE).any()):
        return mask
    mask = np.ones(problem.loss.shape, dtype=bool) if mask is None else mask.copy()
    rows = np.flatnonzero(fixed != FREE)
    mask[rows] = False
    mask[rows, fixed[rows]] = True
    return mask


def tie_rows(labels: Integers | None) -> NDArray[np.int64] | None:
    """Row of every item when tied items share one row; None when nothing is tied."""
    if labels is None or not bool((labels != FREE).any()):
        return None
    free = labels == FREE
    unique = np.where(free, int(labels.max()) + 1 + np.arange(labels.size), labels)
    _, first, row = np.unique(unique, return_index=True, return_inverse=True)
    order = np.empty(first.size, dtype=np.int64)  # rows in the order in which their first items appear
    order[np.argsort(first, kind="stable")] = np.arange(first.size)
    return order[row]


def _sum_rows(table: NDArray[Any], row: NDArray[np.int64]) -> NDArray[Any]:
    order = np.argsort(row, kind="stable")
    starts = np.flatnonzero(np.diff(row[order], prepend=-1))
    summed: NDArray[Any] = np.add.reduceat(table[order], starts, axis=0)
    return summed


def merged_pairs(pairs: PairwiseTerms, row: Integers, loss: Floats) -> tuple[PairwiseTerms, Floats]:
    """Pairwise terms between rows, one per pair of rows, and the loss table with the terms inside a row added."""
    first, second, value = row[pairs.first], row[pairs.second], pairs.value.astype(np.float64)
    inside = first == second
    loss = loss.astype(np.float64)
    np.add.at(loss, first[inside], np.diagonal(value[inside], axis1=1, axis2=2))
    first, second, value = first[~inside], second[~inside], value[~inside]
    swapped = first > second
    value[swapped] = value[swapped].transpose(0, 2, 1)
    low, high = np.minimum(first, second), np.maximum(first, second)
    keys, group = np.unique(low * np.int64(len(loss)) + high, return_inverse=True)
    summed = np.zeros((keys.size, *value.shape[1:]))
    np.add.at(summed, group, value)
    return PairwiseTerms(first=keys // len(loss), second=keys % len(loss), value=summed), loss
