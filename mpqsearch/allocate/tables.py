"""From a problem to plain tables: forbidden choices become infinite losses, the items of a group become one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import FREE, AllocationProblem, Floats, Integers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tables:
    """What the solvers see.

    Attributes:
        loss: ``[r, k]``; infinite where a choice is forbidden.
        costs: One ``[r, k]`` integer table per budget.
        limits: One limit per budget.
        row: ``[n]`` row of every item.
        layer: ``[r]`` layer of every row, zeros when no rule needs it. A group over several layers counts in the first.
    """

    loss: Floats
    costs: tuple[Integers, ...]
    limits: tuple[int, ...]
    row: NDArray[np.int64]
    layer: NDArray[np.int64]

    def expand(self, choice: Integers) -> NDArray[np.int32]:
        """Choice per item from choice per row."""
        return np.ascontiguousarray(choice[self.row], dtype=np.int32)

    def spent(self, choice: Integers) -> tuple[int, ...]:
        """Total of every budget under a choice per row."""
        return tuple(total_cost(cost, choice) for cost in self.costs)

    def fits(self, choice: Integers) -> bool:
        """Whether a choice per row is within every budget."""
        return all(used <= limit for used, limit in zip(self.spent(choice), self.limits, strict=True))


def plain_tables(problem: AllocationProblem) -> Tables:
    """Tables of ``problem`` without masks and groups; nothing is copied when there are none."""
    loss, costs, row = problem.loss, tuple(b.cost for b in problem.budgets), np.arange(problem.n_items)
    if problem.allowed is not None:
        loss = np.where(problem.allowed, loss, loss.dtype.type(np.inf))
    if problem.groups is not None:
        free = int(problem.groups.max(initial=FREE)) + 1 + row
        row = np.unique(np.where(problem.groups == FREE, free, problem.groups), return_inverse=True)[1]
        loss = _sum_rows(loss.astype(np.float64), row)
        costs = tuple(_sum_rows(cost.astype(np.int64), row) for cost in costs)
    layer = np.zeros(len(loss), dtype=np.int64)
    if problem.max_formats_per_layer is not None and problem.layer is not None:
        number = np.unique(problem.layer, return_inverse=True)[1]
        layer[row[::-1]] = number[::-1]  # of repeated rows numpy keeps the last: the first item's layer
    return Tables(loss=loss, costs=costs, limits=tuple(b.limit for b in problem.budgets), row=row, layer=layer)


def _sum_rows(table: NDArray[Any], row: NDArray[np.int64]) -> NDArray[Any]:
    summed = np.zeros((int(row.max(initial=-1)) + 1, table.shape[1]), dtype=table.dtype)
    np.add.at(summed, row, table)
    return summed


def cheapest(loss: Floats, cost: Integers) -> NDArray[np.int32]:
    """Cheapest permitted choice of every row; of equal costs the one with the least loss."""
    sizes = np.where(np.isfinite(loss), cost.astype(np.int64, copy=False), np.iinfo(np.int64).max)
    least = sizes == sizes.min(axis=1, keepdims=True)
    choice: NDArray[np.int32] = np.argmin(np.where(least, loss, np.inf), axis=1).astype(np.int32)
    return choice


def total_loss(loss: Floats, choice: Integers) -> float:
    """Total loss in float64."""
    return float(loss[np.arange(len(loss)), choice].sum(dtype=np.float64))


def total_cost(cost: Integers, choice: Integers) -> int:
    """Exact total cost."""
    return int(cost[np.arange(len(cost)), choice].sum(dtype=np.int64))


def smallest_cost(loss: Floats, cost: Integers) -> int:
    """Smallest attainable total cost."""
    return total_cost(cost, cheapest(loss, cost))
