"""The exact engine for one budget: a multiple-choice knapsack solved by its Lagrangian relaxation and closed by a core.

1. A sample of the items brackets the critical rate; one pass settles every item whose minimizer is the same at both
   ends of the bracket; the rest are few enough for hulls and a sort, which give the rate and the break solution
   exactly.
2. The break solution is improved over the items near the break.
3. One pass collects every move that could still be part of a better solution, and the lower bound.
4. Dynamic programming over these moves finds the optimum and proves it (``closing``).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import closing, passes
from mpqsearch.allocate.backend import kernels
from mpqsearch.allocate.problem import Floats, Integers

DIRECT_ITEMS = 4_096
"""Up to so many items the hulls of all of them are cheaper than bracketing."""

QUICK_DIRECT = 1_000
"""The same for the compiled engine, whose bracket costs less."""

SAMPLE_ITEMS = 8_192
"""Most sampled items; the width of the bracket falls with the root of this."""

SAMPLE_POWER = 0.7
"""A sample takes n to this power: its own time and that of the items which its bracket leaves unsettled balance."""

SPREADS = 1.5
"""Half width of the bracket in standard deviations of the sampled cost; a miss costs one more pass."""

NEAR_MOVES = 80
"""Moves nearest to the break that the first improvement looks at."""

QUICK_ITEMS = 250_000
"""Items up to which the compiled engine goes from the table to the answer in one call."""

QUICK_STATES = 50_000
"""States alive at a time in that call; where these do not do, the search starts again in leaps that look at the
clock."""

NEAR_WORK = 50_000
"""States made in the first search of that call."""

QUICK_WORK = 2_000_000
"""States made in each search of that call (some milliseconds)."""

NEAR_STATES = 20_000
"""States that the first improvement keeps."""

ROUNDING = 4 * float(np.finfo(np.float64).eps)
"""Differences of the total below this share of it cannot be told from rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """Solution of the linear relaxation.

    Attributes:
        rate: Critical multiplier; 0 when the budget does not bind.
        choice: ``[n]`` break solution: a minimizer of loss + rate * cost that fits.
        loss: Its total loss.
        slack: Budget that it leaves; negative when nothing fits.
        near: Items whose minimizer changes closest to the rate.
        step: The hull step that does not fit whole (item, choice after it, share of it that fits), or None. The
            relaxation's own solution is ``choice`` with this share of the step.
    """

    rate: float
    choice: NDArray[np.int32]
    loss: float
    slack: int
    near: NDArray[np.int64]
    step: tuple[int, int, float] | None

    @property
    def bound(self) -> float:
        """Lagrangian lower bound at ``rate``."""
        return self.loss - self.rate * self.slack


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


class BudgetTooSmallError(ValueError):
    """Even the cheapest choices exceed the limit; ``smallest`` is what they cost."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the smallest attainable cost is {smallest}")
        self.smallest = smallest


def smallest_cost(loss: Floats, cost: Integers) -> int:
    """Smallest attainable total cost."""
    return passes.totals(loss, cost, passes.cheapest(loss, cost))[1]


def solve_table(
    loss: Floats, cost: Integers, limit: int, *, gap_tolerance: float = 0.0, deadline: float = float("inf")
) -> CoreSolution:
    """Minimize the total loss within ``limit``.

    Args:
        loss: ``[n, k]``, infinite where forbidden, at least one finite loss per item.
        cost: ``[n, k]`` integers.
        limit: Budget.
        gap_tolerance: Stop as soon as the relative gap is certified to be at most this; 0 asks for a proof.
        deadline: ``time.perf_counter()`` value at which to return the best found.

    Raises:
        BudgetTooSmallError: Nothing fits.
    """
    if len(loss) <= DIRECT_ITEMS:  # small tables take one layout, so that they need no compilation of their own
        loss, cost = loss.astype(np.float64, copy=False), cost.astype(np.int64, copy=False)
    loss, cost = passes.column_major(loss), passes.column_major(cost)
    quick = _in_one_call(loss, cost, limit, gap_tolerance) if deadline == float("inf") else None
    if quick is not None:
        relaxed, improved, ended = quick
        return improved if ended else _close(loss, cost, relaxed, improved, gap_tolerance, deadline)
    relaxed = relax(loss, cost, limit)
    if relaxed.slack < 0:
        raise BudgetTooSmallError(smallest_cost(loss, cost))
    start = _settled(_break_solution(relaxed))
    if _within(start, gap_tolerance) or time.perf_counter() > deadline:
        return replace(start, in_time=start.proven or time.perf_counter() <= deadline)
    improved, exhausted = _improve_near_break(loss, cost, relaxed, start, gap_tolerance, deadline)
    improved = (
        replace(improved, floor=improved.loss, proven=True) if exhausted and gap_tolerance == 0 else _settled(improved)
    )
    if _within(improved, gap_tolerance) or not improved.in_time:
        return improved
    return _close(loss, cost, relaxed, improved, gap_tolerance, deadline)


def _in_one_call(
    loss: Floats, cost: Integers, limit: int, gap_tolerance: float
) -> tuple[Relaxed, CoreSolution, bool] | None:
    """Relaxation, best solution and whether it is final, from the compiled engine; None where it does not apply."""
    n, k = loss.shape
    compiled = kernels(loss.size) if n <= QUICK_ITEMS and k <= passes.WIDE_CHOICES else None
    if compiled is None or QUICK_WORK == 0:
        return None
    sample = max(2, min(SAMPLE_ITEMS, int(n**SAMPLE_POWER)))
    code, choice, rate, total, slack, near, best, best_loss, floor, proven = compiled.solve(
        loss,
        cost,
        limit,
        float(gap_tolerance),
        ROUNDING,
        closing.GRADE,
        QUICK_DIRECT,
        4 * DIRECT_ITEMS,
        sample,
        SPREADS,
        NEAR_MOVES,
        NEAR_WORK,
        QUICK_STATES,
        QUICK_WORK,
    )
    if code == 0:
        return None
    relaxed = Relaxed(rate, choice, total, slack, near, None)
    return relaxed, CoreSolution(best, rate, relaxed.bound, floor, best_loss, proven, in_time=True), code == 1


def relax(
    loss: Floats, cost: Integers, limit: int, low: float = 0.0, high: float = float("inf"), base: Integers | None = None
) -> Relaxed:
    """Linear relaxation, given that the critical rate lies between ``low`` and ``high``; ``base`` minimizes at
    ``high``."""
    if len(loss) <= DIRECT_ITEMS:
        return _relax_by_hulls(loss, cost, limit, low, base)
    found = _settle(loss, cost, limit, *_sampled_bracket(loss, cost, limit, low, high))
    if found is None:
        return _relax_by_hulls(loss, cost, limit, low, base)
    passed, low, high = found
    rest = passed.unsettled
    inner_loss, inner_cost = passes.gather(loss, cost, rest)
    inner = relax(inner_loss, inner_cost, limit - passed.settled_cost, low, high, passed.choice[rest])
    choice = passed.choice
    choice[rest] = inner.choice
    step = None if inner.step is None else (int(rest[inner.step[0]]), *inner.step[1:])
    return Relaxed(inner.rate, choice, passed.settled_loss + inner.loss, inner.slack, rest[inner.near], step)


def _relax_by_hulls(loss: Floats, cost: Integers, limit: int, low: float, base: Integers | None) -> Relaxed:
    """Relaxation from the hull steps of every item; steps outside the bracket are not even looked at."""
    filled = passes.fill(loss, cost, limit, base, low)
    if base is not None and (
        filled.step is None or not filled.fits
    ):  # rounding at an end of the bracket: do without it
        return _relax_by_hulls(loss, cost, limit, 0.0, None)
    total, spent = passes.totals(loss, cost, filled.choice)
    everyone = np.arange(len(loss))
    if filled.step is None:
        return Relaxed(0.0, filled.choice, total, limit - spent, everyone, None)
    item, to, size, rate = filled.step
    return Relaxed(rate, filled.choice, total, limit - spent, everyone, (item, to, (limit - spent) / size))


def _sampled_bracket(loss: Floats, cost: Integers, limit: int, least: float, most: float) -> tuple[float, float]:
    """Rates that enclose the critical one with high probability, from one item in each of many strata."""
    n = len(loss)
    count = max(2, min(SAMPLE_ITEMS, int(n**SAMPLE_POWER)))
    edges = np.arange(count + 1) * n // count
    picked = edges[:-1] + (np.arange(count) * passes.GOLDEN % 1.0 * (edges[1:] - edges[:-1])).astype(np.int64)
    target = limit * (count / n)
    if compiled := kernels(loss.size):
        low, high = compiled.sampled_rates(*passes.by_choice(loss, cost, picked), float(target), SPREADS, least, most)
    else:
        low, high = _rates_by_hulls(*passes.gather(loss, cost, picked), target)
    low, high = max(float(low), least), min(float(high), most)
    return low, high if np.isfinite(high) else 1.0


def _rates_by_hulls(loss: Floats, cost: Integers, target: float) -> tuple[float, float]:
    """The same rates as ``kernels.sampled_rates`` up to its tolerances, from the sorted hull steps of the sample."""
    count = len(loss)
    steps = passes.hull_steps(loss, cost)
    if not steps.rate.size:
        return 0.0, float("inf")
    reached = passes.totals(loss, cost, steps.base)[1] + np.cumsum(steps.size)
    at = int(np.searchsorted(reached, target))
    taken = steps.base.copy()
    taken[steps.item[:at]] = steps.to[:at]
    sizes = cost[np.arange(count), taken].astype(np.float64)
    # Neighbours resemble each other (channels of one layer): their differences show what the strata leave unexplained.
    spread = SPREADS * float(np.sqrt(np.mean(np.diff(sizes) ** 2) / 2 * count))
    first = int(np.searchsorted(reached, target - spread))
    last = int(np.searchsorted(reached, target + spread)) + 1
    high = float(steps.rate[first - 1]) if first > 0 else float(steps.rate[0]) * 2
    return float(steps.rate[last]) if last < len(reached) else 0.0, high


def _settle(
    loss: Floats, cost: Integers, limit: int, low: float, high: float
) -> tuple[passes.Bracketed, float, float] | None:
    """Move the bracket until it encloses the critical rate; None if it does not shrink the problem."""
    for attempt in range(64):
        found = passes.bracket(loss, cost, low, high)
        if found.cost_high > limit:
            if attempt > 0 and smallest_cost(loss, cost) > limit:
                return None
            low, high = high, high * 2.0 ** (attempt + 1)
        elif found.cost_low <= limit and low > 0:
            high, low = low, (low / 2.0 ** (attempt + 1) if low > 1e-290 else 0.0)
        else:
            return (found, low, high) if found.unsettled.size < 0.9 * len(loss) else None
    return None


def _break_solution(relaxed: Relaxed) -> CoreSolution:
    return CoreSolution(
        relaxed.choice, relaxed.rate, relaxed.bound, relaxed.bound, relaxed.loss, proven=False, in_time=True
    )


def _settled(solution: CoreSolution) -> CoreSolution:
    """A solution that meets its bound up to rounding is optimal."""
    if solution.loss - solution.floor > ROUNDING * abs(solution.loss):
        return solution
    return replace(solution, floor=solution.loss, proven=True)


def _within(solution: CoreSolution, gap_tolerance: float) -> bool:
    return solution.proven or solution.loss - solution.floor <= gap_tolerance * abs(solution.loss)


def _improve_near_break(
    loss: Floats, cost: Integers, relaxed: Relaxed, start: CoreSolution, gap_tolerance: float, deadline: float
) -> tuple[CoreSolution, bool]:
    """Improve the break solution by the moves that cost least per unit; True when these were all that a better solution
    could contain, and all of it was searched."""
    excess = relaxed.rate * relaxed.slack
    moves = passes.near_moves(loss, cost, relaxed.near, relaxed.choice, relaxed.rate, relaxed.slack, excess, NEAR_MOVES)
    closed = closing.close(
        moves,
        relaxed.slack,
        relaxed.rate,
        excess=excess,
        tolerance=max(ROUNDING, gap_tolerance / 2) * abs(start.loss),
        deadline=deadline,
        max_states=NEAR_STATES,
    )
    improved = replace(start, in_time=closed.in_time)
    exhausted = closed.proven and len(relaxed.near) == len(loss) and moves.item.size < NEAR_MOVES
    return _apply(loss, improved, relaxed, closed.item, closed.choice), exhausted


def _apply(loss: Floats, solution: CoreSolution, relaxed: Relaxed, item: Integers, to: Integers) -> CoreSolution:
    """The break solution with some items changed, unless the known solution is better."""
    if not item.size:
        return solution
    change = loss[item, to].astype(np.float64) - loss[item, relaxed.choice[item]]
    total = relaxed.loss + math.fsum(change)
    if total >= solution.loss:
        return solution
    choice = relaxed.choice.copy()
    choice[item] = to
    return replace(solution, choice=choice, loss=total)


def _close(
    loss: Floats,
    cost: Integers,
    relaxed: Relaxed,
    best: CoreSolution,
    gap_tolerance: float,
    deadline: float,
) -> CoreSolution:
    """Search every move that a better solution could contain; exhausting them proves the best one optimal."""
    excess = max(best.loss - best.dual_bound, 0.0)
    tolerance = max(ROUNDING, gap_tolerance / 2) * abs(best.loss)
    moves = passes.collect_moves(
        loss, cost, relaxed.choice, relaxed.rate, excess - tolerance
    )  # dearer ones improve too little
    closed = closing.close(
        moves,
        relaxed.slack,
        relaxed.rate,
        excess=excess,
        tolerance=tolerance,
        deadline=deadline,
    )
    answer = _apply(loss, best, relaxed, closed.item, closed.choice)
    floor = min(max(best.dual_bound, best.dual_bound + closed.floor), answer.loss)
    proven = closed.proven and gap_tolerance == 0
    return _settled(replace(answer, floor=answer.loss if proven else floor, proven=proven, in_time=closed.in_time))
