"""The exact core for one budget: a multiple-choice knapsack solved by its Lagrangian relaxation and closed by a search.

1. The range of rates is halved, and a row whose minimizer is the same at both ends is settled, until the rest are few
   enough for hulls and a sort, which give the rate and the break solution exactly.
2. The break solution is improved over the rows near the break.
3. One pass collects every move that could still be part of a better solution.
4. Dynamic programming over these moves finds the optimum and proves it (``closing``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.closing import MAX_STATES, Closed, Moves, close, collect_moves
from mpqsearch.allocate.hull import hull_steps
from mpqsearch.allocate.problem import Floats, Integers
from mpqsearch.allocate.tables import cheapest, smallest_cost, total_cost, total_loss

DIRECT_ROWS = 16_384
"""Up to so many rows their hulls are cheaper than another halving of the rates."""

NEAR_MOVES = 400
"""Moves nearest to the break that the first improvement looks at."""

NEAR_STATES = 20_000
"""States that the first improvement keeps."""

ROUNDING = 4 * float(np.finfo(np.float64).eps)
"""Differences of the total below this share of it cannot be told from rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """Solution of the linear relaxation.

    Attributes:
        rate: Critical multiplier; 0 when the budget does not bind.
        choice: ``[r]`` break solution: a minimizer of loss + rate * cost that fits.
        loss: Its total loss.
        slack: Budget that it leaves; negative when nothing fits.
        near: Rows whose minimizer changes closest to the rate.
    """

    rate: float
    choice: NDArray[np.int32]
    loss: float
    slack: int
    near: NDArray[np.int64]

    @property
    def bound(self) -> float:
        """Lagrangian lower bound at ``rate``."""
        return self.loss - self.rate * self.slack


@dataclass(frozen=True, slots=True, eq=False)
class CoreSolution:
    """What the core found.

    Attributes:
        choice: ``[r]`` choice of every row.
        rate: Multiplier of the certificate.
        dual_bound: Lagrangian lower bound at ``rate``.
        floor: Proven lower bound, at least ``dual_bound``.
        loss: Loss of ``choice``.
        proven: Whether ``choice`` is proven optimal.
    """

    choice: NDArray[np.int32]
    rate: float
    dual_bound: float
    floor: float
    loss: float
    proven: bool

    def settled(self) -> CoreSolution:
        """The same, called proven when it meets its bound up to rounding."""
        if self.loss - self.floor > ROUNDING * abs(self.loss):
            return self
        return replace(self, floor=self.loss, proven=True)


class BudgetTooSmallError(ValueError):
    """Even the cheapest choices exceed the limit; ``smallest`` is what they cost."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the smallest attainable cost is {smallest}")
        self.smallest = smallest


def solve_table(loss: Floats, cost: Integers, limit: int) -> CoreSolution:
    """Minimize the total loss within ``limit``.

    Args:
        loss: ``[r, k]``, infinite where forbidden, at least one finite loss per row.
        cost: ``[r, k]`` integers.
        limit: Budget.

    Raises:
        BudgetTooSmallError: Nothing fits.
    """
    relaxed = relax(loss, cost, limit)
    if relaxed.slack < 0:
        raise BudgetTooSmallError(smallest_cost(loss, cost))
    bound = relaxed.bound
    start = CoreSolution(relaxed.choice, relaxed.rate, bound, bound, relaxed.loss, proven=False).settled()
    if start.proven:
        return start
    near = _near_moves(loss, cost, relaxed)
    best = _search(loss, relaxed, start, near, NEAR_STATES)[0].settled()
    if best.proven:
        return best
    # Dearer moves than the gap improve nothing.
    moves = collect_moves(loss, cost, relaxed.choice, relaxed.rate, best.loss - best.dual_bound - _tolerance(best))
    answer, closed = _search(loss, relaxed, best, moves)
    floor = answer.loss if closed.proven else min(max(best.floor, best.dual_bound + closed.floor), answer.loss)
    return replace(answer, floor=floor, proven=closed.proven).settled()


def relax(loss: Floats, cost: Integers, limit: int) -> Relaxed:
    """Linear relaxation: the range of rates is halved until the rows whose minimizer still depends on it are few."""
    choice = cheapest(loss, cost)
    near, room, losses, costs = np.arange(len(loss)), limit, loss, cost
    low, at_low, high, at_high = 0.0, np.argmin(loss, axis=1), np.inf, choice
    while len(near) > DIRECT_ROWS:
        middle = float(np.median(_slopes(losses, costs, at_low, at_high)))
        if not low < middle < high:  # many rows have one slope
            break
        at = np.argmin(losses + middle * costs, axis=1)
        if total_cost(costs, at) > room:
            low, at_low = middle, at
        else:
            high, at_high = middle, at
        differ = np.flatnonzero(at_low != at_high)
        choice[near] = at_high
        room -= total_cost(costs, at_high) - total_cost(costs[differ], at_high[differ])
        near, losses, costs = near[differ], losses[differ], costs[differ]
        at_low, at_high = at_low[differ], at_high[differ]
    steps = hull_steps(losses, costs, at_high, low)
    taken = int(np.searchsorted(np.cumsum(steps.size), room - total_cost(costs, at_high), side="right"))
    choice[near] = steps.choice_after(taken)
    rate = float(steps.rate[taken]) if taken < len(steps.size) else low
    return Relaxed(rate, choice, total_loss(loss, choice), limit - total_cost(cost, choice), near)


def _slopes(loss: Floats, cost: Integers, large: Integers, small: Integers) -> Floats:
    """``[r]``: loss per unit of cost between two choices of every row, the rate at which they are worth the same."""
    rows = np.arange(len(loss))
    saved = loss[rows, small].astype(np.float64) - loss[rows, large]
    slopes: Floats = saved / np.maximum(cost[rows, large].astype(np.int64) - cost[rows, small], 1)
    return slopes


def _tolerance(solution: CoreSolution) -> float:
    """Improvements of the loss that are not worth a search."""
    return ROUNDING * abs(solution.loss)


def _near_moves(loss: Floats, cost: Integers, relaxed: Relaxed) -> Moves:
    """The moves of the rows near the break that cost least per unit."""
    near, excess = relaxed.near, relaxed.rate * relaxed.slack
    moves = collect_moves(loss[near], cost[near], relaxed.choice[near], relaxed.rate, excess).nearest(NEAR_MOVES)
    return replace(moves, item=near[moves.item])


def _search(
    loss: Floats,
    relaxed: Relaxed,
    best: CoreSolution,
    moves: Moves,
    max_states: int = MAX_STATES,
) -> tuple[CoreSolution, Closed]:
    """The best solution after a search over some moves, and what the search proved."""
    excess = max(best.loss - best.dual_bound, 0.0)
    closed = close(
        moves,
        relaxed.slack,
        relaxed.rate,
        excess=excess,
        tolerance=_tolerance(best),
        max_states=max_states,
    )
    if not closed.item.size:
        return best, closed
    change = loss[closed.item, closed.choice].astype(np.float64) - loss[closed.item, relaxed.choice[closed.item]]
    total = relaxed.loss + math.fsum(change)
    if total >= best.loss:
        return best, closed
    choice = relaxed.choice.copy()
    choice[closed.item] = closed.choice
    return replace(best, choice=choice, loss=total), closed
