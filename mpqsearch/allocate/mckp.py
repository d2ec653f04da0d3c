"""The exact engine for one budget: a multiple-choice knapsack solved by its Lagrangian relaxation and closed by a core.

1. A sample of the items brackets the critical rate; one pass settles every item whose minimizer is the same at both
   ends of the bracket; the rest are few enough for hulls and a sort, which give the rate and the break solution exactly.
2. The break solution is improved over the items near the break.
3. One pass collects every move that could still be part of a better solution, and the lower bound.
4. Dynamic programming over these moves finds the optimum and proves it (``closing``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import closing, passes
from mpqsearch.allocate.problem import Floats, Integers

DIRECT_ITEMS = 16_384
"""Up to so many items the hulls of all of them are cheaper than bracketing."""

SAMPLE_ITEMS = 8_192
"""Sampled items; the width of the bracket falls with the root of this."""

NEAR_MOVES = 4_000
"""Moves nearest to the break that the first improvement looks at."""

ROUNDING = 4 * np.finfo(np.float64).eps
"""Differences of the total below this share of it cannot be told from rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """Solution of the linear relaxation.

    Attributes:
        rate: Critical multiplier; 0 when the budget does not bind.
        choice: ``[n]`` break solution: a minimizer of loss + rate * cost that fits.
        slack: Budget that the break solution leaves.
        near: Items whose minimizer changes closest to the rate, or None for all items.
    """

    rate: float
    choice: NDArray[np.int32]
    slack: int
    near: NDArray[np.int64] | None


@dataclass(frozen=True, slots=True, eq=False)
class CoreSolution:
    """What the engine found.

    Attributes:
        choice: ``[n]`` choice of every item.
        rate: Multiplier of the certificate.
        dual_bound: Lagrangian lower bound at ``rate``.
        floor: Proven lower bound, at least ``dual_bound``.
        loss: Loss of ``choice``.
        proven: Whether ``choice`` is proven optimal.
        in_time: Whether the search ended before the deadline.
    """

    choice: NDArray[np.int32]
    rate: float
    dual_bound: float
    floor: float
    loss: float
    proven: bool
    in_time: bool


def smallest_cost(loss: Floats, cost: Integers) -> int:
    """Smallest attainable total cost."""
    return chosen_cost(cost, passes.cheapest(loss, cost))


def chosen_cost(cost: Integers, choice: Integers) -> int:
    """Total cost of ``choice``."""
    return int(cost[np.arange(len(cost)), choice].sum(dtype=np.int64))


def chosen_loss(loss: Floats, choice: Integers) -> float:
    """Total loss of ``choice`` in float64 (numpy sums pairwise)."""
    return float(loss[np.arange(len(loss)), choice].sum(dtype=np.float64))


def solve_table(
    loss: Floats, cost: Integers, limit: int, *, gap_tolerance: float = 0.0, deadline: float = float("inf")
) -> CoreSolution:
    """Minimize the total loss within ``limit``.

    Args:
        loss: ``[n, k]``, infinite where forbidden, at least one finite loss per item.
        cost: ``[n, k]`` integers.
        limit: Budget; must be at least ``smallest_cost``.
        gap_tolerance: Stop as soon as the relative gap is certified to be at most this; 0 asks for a proof.
        deadline: ``time.perf_counter()`` value at which to return the best found.
    """
    relaxed = relax(loss, cost, limit)
    base_loss = chosen_loss(loss, relaxed.choice)
    if relaxed.rate == 0.0 or relaxed.slack == 0:
        return CoreSolution(relaxed.choice, relaxed.rate, base_loss, base_loss, base_loss, proven=True, in_time=True)
    bound = base_loss - relaxed.rate * relaxed.slack
    start = CoreSolution(
        relaxed.choice, relaxed.rate, bound, bound, base_loss, proven=False, in_time=time.perf_counter() <= deadline
    )
    improved = _settled(_improve_near_break(loss, cost, relaxed, start, deadline))
    if _within(improved, gap_tolerance) or not improved.in_time:
        return improved
    return _close(loss, cost, limit, relaxed, improved, deadline)


def relax(loss: Floats, cost: Integers, limit: int) -> Relaxed:
    """Linear relaxation by bracketing, sampling and hulls."""
    if len(loss) <= DIRECT_ITEMS:
        return _relax_by_hulls(loss, cost, limit)
    low, high = _sampled_bracket(loss, cost, limit)
    found = _settle(loss, cost, limit, low, high)
    if found is None:
        return _relax_by_hulls(loss, cost, limit)
    rest = found.unsettled
    inner = relax(loss[rest], cost[rest], limit - found.settled_cost)
    choice = found.choice
    choice[rest] = inner.choice
    return Relaxed(inner.rate, choice, inner.slack, rest if inner.near is None else rest[inner.near])


def _relax_by_hulls(loss: Floats, cost: Integers, limit: int) -> Relaxed:
    steps = passes.hull_steps(loss, cost)
    slack = limit - chosen_cost(cost, steps.base)
    used = np.cumsum(steps.size)
    taken = int(np.searchsorted(used, slack, side="right"))
    choice = steps.base.copy()
    choice[steps.item[:taken]] = steps.to[:taken]  # of repeated items numpy keeps the last assignment
    rate = float(steps.rate[taken]) if taken < len(used) else 0.0
    return Relaxed(rate, choice, slack - (int(used[taken - 1]) if taken else 0), None)


def _sampled_bracket(loss: Floats, cost: Integers, limit: int) -> tuple[float, float]:
    """Rates that enclose the critical one with high probability, from one random item in each of many strata."""
    n = len(loss)
    edges = np.linspace(0, n, SAMPLE_ITEMS + 1).astype(np.int64)
    picked = edges[:-1] + (np.random.default_rng(0).random(SAMPLE_ITEMS) * np.diff(edges)).astype(np.int64)
    sample_loss, sample_cost = loss[picked], cost[picked]
    steps = passes.hull_steps(sample_loss, sample_cost)
    if not steps.rate.size:
        return 0.0, 1.0
    reached = chosen_cost(sample_cost, steps.base) + np.cumsum(steps.size)
    target = limit * (SAMPLE_ITEMS / n)
    at = int(np.searchsorted(reached, target))
    taken = steps.base.copy()
    taken[steps.item[:at]] = steps.to[:at]
    sizes = sample_cost[np.arange(SAMPLE_ITEMS), taken].astype(np.float64)
    # Neighbours resemble each other (channels of one layer): their differences show what the strata leave unexplained.
    spread = 2.5 * float(np.sqrt(np.mean(np.diff(sizes) ** 2) / 2 * SAMPLE_ITEMS))
    first = int(np.searchsorted(reached, target - spread))
    last = int(np.searchsorted(reached, target + spread)) + 1
    high = float(steps.rate[first - 1]) if first > 0 else float(steps.rate[0]) * 2
    low = float(steps.rate[last]) if last < len(reached) else 0.0
    return low, high


def _settle(loss: Floats, cost: Integers, limit: int, low: float, high: float) -> passes.Bracketed | None:
    """Widen the bracket until it encloses the critical rate; None if it never shrinks the problem."""
    for _ in range(64):
        found = passes.bracket(loss, cost, low, high)
        if found.cost_high > limit:
            low, high = high, high * 4
        elif found.cost_low <= limit and low > 0:
            high, low = low, (low / 4 if low > 1e-300 else 0.0)
        else:
            return found if found.unsettled.size < 0.9 * len(loss) else None
    return None


def _settled(solution: CoreSolution) -> CoreSolution:
    """A solution that meets its bound up to rounding is optimal."""
    if solution.loss - solution.floor > ROUNDING * abs(solution.loss):
        return solution
    return replace(solution, floor=solution.loss, proven=True)


def _within(solution: CoreSolution, gap_tolerance: float) -> bool:
    return solution.proven or solution.loss - solution.floor <= gap_tolerance * abs(solution.loss)


def _improve_near_break(loss: Floats, cost: Integers, relaxed: Relaxed, start: CoreSolution, deadline: float) -> CoreSolution:
    """Improve the break solution by the moves that cost least per unit, without proof."""
    near = np.arange(len(loss)) if relaxed.near is None else relaxed.near
    excess = relaxed.rate * relaxed.slack
    moves = passes.collect_moves(loss[near], cost[near], relaxed.choice[near], relaxed.rate, 0, excess)
    if moves.item.size > NEAR_MOVES:
        best = np.argpartition(moves.penalty / np.abs(moves.size), NEAR_MOVES)[:NEAR_MOVES]
        moves = _subset(moves, best)
    tolerance = ROUNDING * abs(start.loss)
    closed = closing.close(
        moves, relaxed.slack, relaxed.rate, excess=excess, tolerance=tolerance, deadline=deadline, max_states=100_000
    )
    improved = replace(start, in_time=closed.in_time)
    return _apply(loss, improved, near[closed.item], closed.choice)


def _subset(moves: passes.Moves, kept: NDArray[np.int64]) -> passes.Moves:
    return replace(moves, item=moves.item[kept], choice=moves.choice[kept], penalty=moves.penalty[kept], size=moves.size[kept])


def _apply(loss: Floats, solution: CoreSolution, item: Integers, to: Integers) -> CoreSolution:
    if not item.size:
        return solution
    choice = solution.choice.copy()
    choice[item] = to
    return replace(solution, choice=choice, loss=chosen_loss(loss, choice))


def _close(loss: Floats, cost: Integers, limit: int, relaxed: Relaxed, best: CoreSolution, deadline: float) -> CoreSolution:
    excess = max(best.loss - best.dual_bound, 0.0)
    moves = passes.collect_moves(loss, cost, relaxed.choice, relaxed.rate, limit, excess)
    tolerance = ROUNDING * abs(best.loss)
    closed = closing.close(moves, relaxed.slack, relaxed.rate, excess=excess, tolerance=tolerance, deadline=deadline)
    base = replace(best, choice=relaxed.choice, dual_bound=min(moves.bound, best.loss))
    answer = _apply(loss, base, closed.item, closed.choice) if closed.item.size else replace(best, dual_bound=base.dual_bound)
    if answer.loss > best.loss:  # a gain within rounding: keep the better one
        answer = replace(best, dual_bound=base.dual_bound)
    floor = answer.loss if closed.proven else max(base.dual_bound, min(best.dual_bound + closed.floor, answer.loss))
    return replace(answer, floor=floor, proven=closed.proven, in_time=closed.in_time)
