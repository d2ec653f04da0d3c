"""The exact core for one budget: a multiple-choice knapsack solved by its Lagrangian relaxation and closed by a search.

1. A sample of the rows brackets the critical rate; one pass settles every row whose minimizer is the same at both ends
   of the bracket; the rest are few enough for hulls and a sort, which give the rate and the break solution exactly.
2. The break solution is improved over the rows near the break.
3. One pass collects every move that could still be part of a better solution.
4. Dynamic programming over these moves finds the optimum and proves it (``closing``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.closing import GOLDEN, Closed, Moves, close, collect_moves
from mpqsearch.allocate.hull import hull_steps
from mpqsearch.allocate.problem import Floats, Integers
from mpqsearch.allocate.tables import blocks, smallest_cost, total_cost, total_loss

DIRECT_ROWS = 16_384
"""Up to so many rows the hulls of all of them are cheaper than bracketing."""

SAMPLE_ROWS = 8_192
"""Rows of the sample; the width of the bracket falls with the root of this."""

SPREADS = 1.5
"""Half width of the bracket in standard deviations of the sampled cost; a miss costs one more pass."""

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

    def within(self, gap_tolerance: float) -> bool:
        """Whether the relative gap is small enough."""
        return self.proven or self.loss - self.floor <= gap_tolerance * abs(self.loss)


class BudgetTooSmallError(ValueError):
    """Even the cheapest choices exceed the limit; ``smallest`` is what they cost."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the smallest attainable cost is {smallest}")
        self.smallest = smallest


def solve_table(loss: Floats, cost: Integers, limit: int, *, gap_tolerance: float = 0.0) -> CoreSolution:
    """Minimize the total loss within ``limit``.

    Args:
        loss: ``[r, k]``, infinite where forbidden, at least one finite loss per row.
        cost: ``[r, k]`` integers.
        limit: Budget.
        gap_tolerance: Stop as soon as the relative gap is certified to be at most this; 0 asks for a proof.

    Raises:
        BudgetTooSmallError: Nothing fits.
    """
    relaxed = relax(loss, cost, limit)
    if relaxed.slack < 0:
        raise BudgetTooSmallError(smallest_cost(loss, cost))
    bound = relaxed.bound
    start = CoreSolution(relaxed.choice, relaxed.rate, bound, bound, relaxed.loss, proven=False).settled()
    if start.within(gap_tolerance):
        return start
    near = _near_moves(loss, cost, relaxed)
    best, _ = _search(loss, relaxed, start, near, gap_tolerance, NEAR_STATES)
    best = best.settled()
    if best.within(gap_tolerance):
        return best
    # Dearer moves than the gap improve nothing.
    worth = best.loss - best.dual_bound - _tolerance(best, gap_tolerance)
    moves = collect_moves(loss, cost, relaxed.choice, relaxed.rate, worth)
    answer, closed = _search(loss, relaxed, best, moves, gap_tolerance)
    proven = closed.proven and gap_tolerance == 0
    floor = answer.loss if proven else min(max(best.floor, best.dual_bound + closed.floor), answer.loss)
    return replace(answer, floor=floor, proven=proven).settled()


def relax(
    loss: Floats, cost: Integers, limit: int, low: float = 0.0, high: float = float("inf"), base: Integers | None = None
) -> Relaxed:
    """Linear relaxation, given that the critical rate is between ``low`` and ``high``; ``base`` minimizes at
    ``high``."""
    if len(loss) <= DIRECT_ROWS:
        return _relax_by_hulls(loss, cost, limit, low, base)
    bracket = _settle(loss, cost, limit, *_sampled_rates(loss, cost, limit, low, high))
    if bracket is None:
        return _relax_by_hulls(loss, cost, limit, low, base)
    rest, choice = bracket.unsettled, bracket.choice
    settled = np.ones(len(loss), dtype=bool)
    settled[rest] = False
    kept = np.flatnonzero(settled)
    room = limit - total_cost(cost[kept], choice[kept])
    inner = relax(loss[rest], cost[rest], room, bracket.low, bracket.high, choice[rest])
    choice[rest] = inner.choice
    return Relaxed(inner.rate, choice, total_loss(loss, choice), inner.slack, rest[inner.near])


def _relax_by_hulls(loss: Floats, cost: Integers, limit: int, low: float, base: Integers | None) -> Relaxed:
    """Relaxation from the hull steps of every row; steps outside the bracket are not looked at."""
    steps = hull_steps(loss, cost, base, low)
    slack = limit - total_cost(cost, steps.base)
    taken = int(np.searchsorted(np.cumsum(steps.size), slack, side="right"))
    if base is not None and (slack < 0 or taken == len(steps.size)):  # rounding at an end of the bracket
        return _relax_by_hulls(loss, cost, limit, 0.0, None)
    choice = steps.choice_after(taken)
    rate = float(steps.rate[taken]) if taken < len(steps.size) else 0.0
    slack = limit - total_cost(cost, choice)
    return Relaxed(rate, choice, total_loss(loss, choice), slack, np.arange(len(loss)))


def _sampled_rates(loss: Floats, cost: Integers, limit: int, least: float, most: float) -> tuple[float, float]:
    """Rates that enclose the critical one with high probability, from one row in each of many strata."""
    n, count = len(loss), SAMPLE_ROWS
    edges = np.arange(count + 1) * n // count
    picked = edges[:-1] + (np.arange(count) * GOLDEN % 1.0 * (edges[1:] - edges[:-1])).astype(np.int64)
    sample = cost[picked]
    steps = hull_steps(loss[picked], sample)
    if not steps.rate.size:
        return least, min(most, 1.0)
    target = limit * (count / n)
    reached = total_cost(sample, steps.base) + np.cumsum(steps.size)
    at = int(np.searchsorted(reached, target))
    sizes = sample[np.arange(count), steps.choice_after(at)].astype(np.float64)
    # Neighbours resemble each other (channels of one layer): their differences show what the strata leave unexplained.
    spread = SPREADS * float(np.sqrt(np.mean(np.diff(sizes) ** 2) / 2 * count))
    first = int(np.searchsorted(reached, target - spread))
    last = int(np.searchsorted(reached, target + spread)) + 1
    high = float(steps.rate[first - 1]) if first > 0 else float(steps.rate[0]) * 2
    low = float(steps.rate[last]) if last < len(reached) else 0.0
    return max(low, least), min(high, most)


@dataclass(frozen=True, slots=True, eq=False)
class _Bracket:
    """The minimizers at two rates.

    Attributes:
        low, high: The rates.
        choice: ``[r]`` minimizer of loss + high * cost.
        unsettled: Rows whose minimizer differs between the two; all others keep it for every rate between.
        cost_low, cost_high: Total cost of the minimizers at each rate.
    """

    low: float
    high: float
    choice: NDArray[np.int32]
    unsettled: NDArray[np.int64]
    cost_low: int
    cost_high: int


def _bracketed(loss: Floats, cost: Integers, low: float, high: float) -> _Bracket:
    at_low, at_high = (np.empty(len(loss), dtype=np.int32) for _ in range(2))
    for part in blocks(loss):
        losses, costs = loss[part].astype(np.float64, copy=False), cost[part]
        at_low[part] = np.argmin(losses + low * costs, axis=1)
        at_high[part] = np.argmin(losses + high * costs, axis=1)
    unsettled = np.flatnonzero(at_low != at_high)
    return _Bracket(low, high, at_high, unsettled, total_cost(cost, at_low), total_cost(cost, at_high))


def _settle(loss: Floats, cost: Integers, limit: int, low: float, high: float) -> _Bracket | None:
    """Move the bracket until it encloses the critical rate; None if it does not shrink the problem."""
    for attempt in range(64):
        bracket = _bracketed(loss, cost, low, high)
        if bracket.cost_high > limit:
            if attempt > 0 and smallest_cost(loss, cost) > limit:
                return None
            low, high = high, high * 2.0 ** (attempt + 1)
        elif bracket.cost_low <= limit and low > 0:
            high, low = low, (low / 2.0 ** (attempt + 1) if low > 1e-290 else 0.0)
        else:
            return bracket if bracket.unsettled.size < 0.9 * len(loss) else None
    return None


def _tolerance(solution: CoreSolution, gap_tolerance: float) -> float:
    """Improvements of the loss that are not worth a search."""
    return max(ROUNDING, gap_tolerance / 2) * abs(solution.loss)


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
    gap_tolerance: float,
    max_states: int = 1_000_000,
) -> tuple[CoreSolution, Closed]:
    """The best solution after a search over some moves, and what the search proved."""
    excess = max(best.loss - best.dual_bound, 0.0)
    closed = close(
        moves,
        relaxed.slack,
        relaxed.rate,
        excess=excess,
        tolerance=_tolerance(best, gap_tolerance),
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
