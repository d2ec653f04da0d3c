"""Lower convex hulls of loss against cost: the only steps that a Lagrangian relaxation ever takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import Floats, Integers
from mpqsearch.allocate.tables import cheapest


@dataclass(frozen=True, slots=True, eq=False)
class HullSteps:
    """Steps along the lower convex hulls of all rows, steepest first.

    Attributes:
        base: ``[r]`` choice before the first step.
        item: ``[m]`` row that takes the step.
        to: ``[m]`` choice after the step.
        size: ``[m]`` increase of the cost, > 0.
        saved: ``[m]`` decrease of the loss, > 0.
        rate: ``[m]`` loss saved per unit of cost, never increasing.
    """

    base: NDArray[np.int32]
    item: NDArray[np.int64]
    to: NDArray[np.int32]
    size: NDArray[np.int64]
    saved: NDArray[np.float64]
    rate: NDArray[np.float64]

    def choice_after(self, count: int) -> NDArray[np.int32]:
        """``[r]`` choices after the first ``count`` steps."""
        choice = self.base.copy()
        choice[self.item[:count]] = self.to[:count]  # of repeated rows numpy keeps the last assignment
        return choice


def hull_steps(loss: Floats, cost: Integers, base: Integers | None = None, low: float = 0.0) -> HullSteps:
    """The steps that lower the loss with a rate of at least ``low``, found by gift wrapping.

    Every round takes every row one vertex further. Costs need not be sorted; dominated, duplicated and collinear
    choices are passed over. Starts from ``base``, a hull vertex of every row, or the cheapest choices.
    """
    start = cheapest(loss, cost) if base is None else base.astype(np.int32)
    table, sizes = loss.astype(np.float64), cost.astype(np.int64)
    item, at, last = np.arange(len(loss)), start.astype(np.int64), np.full(len(loss), np.inf)
    rounds: list[tuple[NDArray[Any], ...]] = [(item[:0], at[:0], item[:0], last[:0], last[:0])]
    while item.size:
        rows = np.arange(item.size)
        steepest, to, size, saved = _steepest(table, sizes, at)
        kept = np.flatnonzero((steepest >= low) & (steepest > 0))
        size, saved = size[rows, to][kept], saved[rows, to][kept]
        item, at, table, sizes = item[kept], to[kept], table[kept], sizes[kept]
        # Rounding may let a later slope exceed an earlier one by an ulp; the order of a row's steps must survive.
        last = np.minimum(last[kept], steepest[kept])
        rounds.append((item, at, size, saved, last))
    items, to, size, saved, rate = (np.concatenate(arrays) for arrays in zip(*rounds, strict=True))
    order = np.argsort(-rate, kind="stable")  # stable: of equal rates a row's earlier step stays first
    return HullSteps(start, items[order], to[order].astype(np.int32), size[order], saved[order], rate[order])


def _steepest(loss: Floats, cost: Integers, at: Integers) -> tuple[NDArray[Any], ...]:
    """Steepest slope ``[r]`` from the choices ``at`` to one of larger cost, the farthest choice on it, and the increase
    of the cost and decrease of the loss ``[r, k]`` to every choice."""
    rows = np.arange(len(loss))
    size = cost - cost[rows, at][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        saved = loss[rows, at][:, None] - loss
        slope = np.where(size > 0, saved / size, -np.inf)
    steepest = slope.max(axis=1)
    return steepest, np.argmax(np.where(slope == steepest[:, None], size, -1), axis=1), size, saved
