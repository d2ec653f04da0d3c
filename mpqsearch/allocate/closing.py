"""Closing the gap of a Lagrangian solution: dynamic programming over lists of undominated states.

Starting from a base choice that minimizes loss + rate * cost item by item, every solution has the value

    bound + sum of the penalties of its moves + rate * (budget left unused),

so the best one is a cheapest set of moves that fills the slack. Items are taken in the order of their penalty per
unit of cost. A state is dropped when another one is smaller and no worse, or when even the best move per unit among
the items still to come cannot bring it below the incumbent; once no state is left the incumbent is proven optimal
(Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995, in the form of penalties).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.backend import kernels
from mpqsearch.allocate.passes import GOLDEN, Moves

MAX_STATES = 2_000_000
"""States alive at a time; beyond it the worst are dropped and the proof with them (the bound stays valid)."""

MAX_HISTORY = 30_000_000
"""States ever made (16 bytes each) after which the search ends without a proof: memory stays near a gigabyte."""

GRADE = 1e-9
"""Efficiencies are ordered in steps of this share of the rate."""

TINY = float(np.finfo(np.float64).tiny)

TIE_BREAK = 0.01
"""Share of the incumbent's excess by which the distance from a full budget counts when states must be dropped."""

FEW_STATES = 64
"""States up to which plain Python takes a group faster than numpy."""

GROUPS_PER_WALK = 32
"""Groups that plain Python takes before it returns for a look at the clock (some milliseconds at most)."""

WORK_PER_LEAP = 20_000_000
"""States that the compiled loop makes before it returns for a look at the clock (a fraction of a second)."""


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """Moves grouped by item, items in order of their best penalty per unit of cost.

    Attributes:
        start: ``[g + 1]`` first move of every group.
        item: ``[m]`` item of every move.
        choice: ``[m]`` choice of every move.
        penalty: ``[m]`` penalties.
        size: ``[m]`` cost increases.
        up: ``[g + 1]`` least penalty per unit over all increases from group g on.
        down: ``[g + 1]`` the same over all decreases.
    """

    start: NDArray[np.int64]
    item: NDArray[np.int64]
    choice: NDArray[np.int32]
    penalty: NDArray[np.float64]
    size: NDArray[np.int64]
    up: NDArray[np.float64]
    down: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Closed:
    """Outcome of closing.

    Attributes:
        item: Items to change.
        choice: Their new choices.
        excess: Value of the best solution above the Lagrangian bound.
        floor: No solution made of the given moves has a smaller excess.
        proven: Whether the search was exhaustive: none improves ``excess`` by more than the tolerance.
        in_time: Whether it ended before the deadline.
    """

    item: NDArray[np.int64]
    choice: NDArray[np.int32]
    excess: float
    floor: float
    proven: bool
    in_time: bool


def build_core(moves: Moves, rate: float) -> tuple[Core, int]:
    """Order the items of ``moves``, which stand together item by item; also the common divisor of all sizes (0 without
    moves).

    Items of equal efficiency (up to rounding: a share of ``rate``) are shuffled: in their own order the first ones
    could all only shrink, and the states would wander away from a full budget.
    """
    grade = GRADE * max(abs(rate), TINY)
    if compiled := kernels(0):
        head, key, up, down, divisor = compiled.core_keys(moves.item, moves.penalty, moves.size, grade)
        start, *arrays, _ = compiled.core_order(
            head, np.argsort(key), moves.item, moves.choice, moves.penalty, moves.size, up, down
        )
        return Core(start, *arrays), int(divisor)
    efficiency = moves.penalty / np.abs(moves.size)
    heads = np.flatnonzero(np.diff(moves.item, prepend=-1))
    counts = np.diff(heads, append=moves.item.size)
    best = np.minimum.reduceat(efficiency, heads) if heads.size else efficiency
    group_order = np.argsort(np.round(best / grade) + np.arange(heads.size) * GOLDEN % 1.0)
    counts = counts[group_order]
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    within = np.arange(moves.item.size) + np.repeat(heads[group_order] - start[:-1], counts)
    size, ordered = moves.size[within], efficiency[within]
    core = Core(
        start,
        moves.item[within],
        moves.choice[within],
        moves.penalty[within],
        size,
        _suffix_minimum(np.where(size > 0, ordered, np.inf), start),
        _suffix_minimum(np.where(size < 0, ordered, np.inf), start),
    )
    return core, int(np.gcd.reduce(size)) if size.size else 0


def _suffix_minimum(values: NDArray[np.float64], start: NDArray[np.int64]) -> NDArray[np.float64]:
    """Least value from every group's first move to the end; infinite after the last."""
    suffix = np.append(np.minimum.accumulate(values[::-1])[::-1], np.inf)
    least: NDArray[np.float64] = suffix[start]
    return least


def close(
    moves: Moves,
    slack: int,
    rate: float,
    *,
    excess: float,
    tolerance: float,
    exact_fill: bool = False,
    deadline: float = float("inf"),
    max_states: int = MAX_STATES,
) -> Closed:
    """Best set of moves within ``slack``.

    Args:
        moves: Departures from the base choice, item by item.
        slack: Budget that the base choice leaves.
        rate: Multiplier at which the penalties were taken.
        excess: Value above the Lagrangian bound of the best solution known so far.
        tolerance: Improvements below this are not looked for.
        exact_fill: The slack must be used up exactly (then ``rate`` may be negative and slack too).
        deadline: ``time.perf_counter()`` value at which to stop.
        max_states: States alive at a time.
    """
    core, grain = build_core(moves, rate)
    if grain == 0:
        return _nothing(excess, slack, rate, exact_fill)
    left_over = slack % grain
    if exact_fill and left_over:
        return Closed(moves.item[:0], moves.choice[:0], excess, excess, proven=True, in_time=True)
    search = _Search(core, slack - left_over, rate, exact_fill, rate * left_over, excess, tolerance)
    return search.run(deadline, max_states, kernels(0))


def _nothing(excess: float, slack: int, rate: float, exact_fill: bool) -> Closed:
    stay = np.inf if exact_fill and slack else (0.0 if exact_fill else rate * slack)
    value = min(excess, stay)
    empty = np.empty(0, dtype=np.int64)
    return Closed(empty, empty.astype(np.int32), value, value, proven=True, in_time=True)


class _Search:
    """The state list and its history.

    A state is (size, value) with value = penalty - rate * size, the change of the plain loss up to a constant: of two
    states the one that is no larger in both dominates.
    """

    def __init__(
        self,
        core: Core,
        slack: int,
        rate: float,
        exact_fill: bool,
        offset: float,
        excess: float,
        tolerance: float,
    ) -> None:
        self.core, self.slack, self.rate, self.exact_fill, self.offset = core, slack, rate, exact_fill, offset
        self.size = np.zeros(1, dtype=np.int64)
        self.penalty = np.zeros(1)
        self.state = np.zeros(1, dtype=np.int64)  # index into the history, where a row is (parent, move)
        self.parents: list[NDArray[np.int64]] = [np.array([-1], dtype=np.int64)]
        self.moved: list[NDArray[np.int64]] = [np.array([-1], dtype=np.int64)]
        self.n_history = 1
        self.excess, self.tolerance = excess, tolerance
        self.best_state = -1
        self.dropped = np.inf

    def run(self, deadline: float, max_states: int, compiled: ModuleType | None) -> Closed:
        """Take group after group until no state is left, and say what that proves."""
        self._update_incumbent()
        group, n_groups = 0, len(self.core.start) - 1
        while group < n_groups and self.size.size:
            late = time.perf_counter() > deadline
            if late or self.n_history > MAX_HISTORY:
                self.dropped = min(self.dropped, float(self._bounds(group).min()))
                return self._outcome(in_time=not late)
            if compiled is not None:
                group = self._leap(group, max_states, compiled)
            elif self.size.size <= FEW_STATES:
                group = self._walk(group, min(FEW_STATES, max_states))
            else:
                group = self._step(group)
            if self.size.size > max_states:
                self._truncate(group, max_states)
        return self._outcome(in_time=True)

    def _step(self, group: int) -> int:
        """One group in numpy."""
        self._prune(group)
        if self.size.size:
            self._expand(group)
            self._update_incumbent()
        return group + 1

    def _walk(self, group: int, most: int) -> int:
        """Groups in plain Python while there are at most ``most`` states: to the bit what `_step` makes of them one by
        one.

        Small problems never have more, and a step calls numpy thirty times, which takes longer than all of its
        arithmetic.
        """
        core, slack, exact_fill, rate, offset = (
            self.core,
            self.slack,
            self.exact_fill,
            float(self.rate),
            float(self.offset),
        )
        price = 0.0 if exact_fill else rate
        states = list(zip(self.size.tolist(), self.penalty.tolist(), self.state.tolist(), strict=True))
        parents: list[int] = []
        moved: list[int] = []
        end = min(group + GROUPS_PER_WALK, len(core.start) - 1)
        while group < end and 0 < len(states) <= most:
            first, last = core.start[group : group + 2].tolist()
            up, down, wanted = float(core.up[group]), float(core.down[group]), self.excess - self.tolerance
            fill = up if exact_fill else min(rate, up)
            alive = []
            for size, penalty, state in states:
                free = slack - size
                rest = free * fill if free > 0 else -free * down if free < 0 else 0.0
                if penalty + rest + offset < wanted:
                    alive.append((size, penalty, state))
            moves = [(0, 0.0), *zip(core.size[first:last].tolist(), core.penalty[first:last].tolist(), strict=True)]
            made = sorted(
                (size + more, penalty + extra - rate * (size + more), move, parent)
                for move, (more, extra) in enumerate(moves)
                for parent, (size, penalty, _) in enumerate(alive)
            )
            states, least = [], np.inf
            for size, value, move, parent in made:
                if states and (size == states[-1][0] if exact_fill else value >= least):
                    continue  # dominated
                least = value
                _, penalty, state = alive[parent]
                if move > 0:
                    parents.append(state)
                    moved.append(first + move - 1)
                    penalty, state, self.n_history = penalty + moves[move][1], self.n_history, self.n_history + 1
                states.append((size, penalty, state))
                free = slack - size
                total = penalty + price * free + offset
                if total < self.excess and (free == 0 or (free > 0 and not exact_fill)):
                    self.excess, self.best_state = total, state
            group += 1
        self.parents.append(np.array(parents, dtype=np.int64))
        self.moved.append(np.array(moved, dtype=np.int64))
        sizes, penalties, numbers = zip(*states, strict=True) if states else ((), (), ())
        self.size, self.penalty = np.array(sizes, dtype=np.int64), np.array(penalties, dtype=np.float64)
        self.state = np.array(numbers, dtype=np.int64)
        return group

    def _leap(self, group: int, max_states: int, compiled: ModuleType) -> int:
        """As many groups as the compiled loop does before it hands back for a look at the clock."""
        core = self.core
        parents, moved = np.concatenate(self.parents), np.concatenate(self.moved)
        group, self.size, self.penalty, self.state, parents, moved, n_history, self.excess, best = compiled.advance(
            core.start,
            core.penalty,
            core.size,
            core.up,
            core.down,
            group,
            self.size,
            self.penalty,
            self.state,
            parents,
            moved,
            self.n_history,
            self.slack,
            float(self.rate),
            self.exact_fill,
            float(self.offset),
            float(self.excess),
            float(self.tolerance),
            self.best_state,
            max_states,
            WORK_PER_LEAP,
        )
        self.n_history, self.best_state = int(n_history), int(best)
        self.parents, self.moved = [parents[: self.n_history]], [moved[: self.n_history]]
        return int(group)

    def _bounds(self, group: int) -> NDArray[np.float64]:
        """Least excess that a state can still reach with the groups from ``group`` on."""
        free = self.slack - self.size
        up = self.core.up[group]
        fill = up if self.exact_fill else min(self.rate, up)
        per_unit = np.where(free >= 0, fill, self.core.down[group])
        with np.errstate(invalid="ignore"):
            rest = np.where(free == 0, 0.0, np.abs(free) * per_unit)
        return self.penalty + rest + self.offset

    def _prune(self, group: int) -> None:
        keep = self._bounds(group) < self.excess - self.tolerance
        if not keep.all():
            self._select(np.flatnonzero(keep))

    def _select(self, kept: NDArray[np.int64]) -> None:
        self.size, self.penalty, self.state = self.size[kept], self.penalty[kept], self.state[kept]

    def _expand(self, group: int) -> None:
        first, last = int(self.core.start[group]), int(self.core.start[group + 1])
        count = self.size.size
        size = np.concatenate([self.size, (self.size + self.core.size[first:last, None]).ravel()])
        penalty = np.concatenate([self.penalty, (self.penalty + self.core.penalty[first:last, None]).ravel()])
        kept = _undominated(size, penalty - self.rate * size, strict_size=self.exact_fill)
        origin, parent = kept // count - 1, kept % count
        born = origin >= 0
        state = self.state[parent]
        state[born] = self.n_history + np.arange(int(born.sum()))
        self.parents.append(self.state[parent[born]])
        self.moved.append(origin[born] + first)
        self.n_history += int(born.sum())
        self.size, self.penalty, self.state = size[kept], penalty[kept], state

    def _update_incumbent(self) -> None:
        free = self.slack - self.size
        possible = free == 0 if self.exact_fill else free >= 0
        value = np.where(possible, self.penalty + (0.0 if self.exact_fill else self.rate) * free, np.inf) + self.offset
        best = int(np.argmin(value))
        if value[best] < self.excess:
            self.excess, self.best_state = float(value[best]), int(self.state[best])

    def _truncate(self, group: int, max_states: int) -> None:
        bounds = self._bounds(group)
        # Where all moves cost the same per unit all bounds are equal: then the states nearest to a full budget matter.
        distance = np.abs(self.slack - self.size)
        weight = TIE_BREAK * (self.excess if np.isfinite(self.excess) else 0.0) / max(int(distance.max()), 1)
        order = np.argpartition(bounds + weight * distance, max_states)
        self.dropped = min(self.dropped, float(bounds[order[max_states:]].min()))
        self._select(np.sort(order[:max_states]))

    def _outcome(self, in_time: bool) -> Closed:
        moves = self._history()
        floor = min(self.excess - self.tolerance, self.dropped)
        proven = self.dropped >= self.excess - self.tolerance
        return Closed(self.core.item[moves], self.core.choice[moves], self.excess, floor, proven, in_time)

    def _history(self) -> NDArray[np.int64]:
        if self.best_state < 0:
            return np.empty(0, dtype=np.int64)
        parents, moved = np.concatenate(self.parents), np.concatenate(self.moved)
        found, state = [], self.best_state
        while parents[state] >= 0:
            found.append(int(moved[state]))
            state = int(parents[state])
        return np.array(found, dtype=np.int64)


def _undominated(size: NDArray[np.int64], value: NDArray[np.float64], *, strict_size: bool) -> NDArray[np.int64]:
    """Indices of the states that no other state beats, by size; with ``strict_size`` only equal sizes compete."""
    order = np.lexsort((value, size))
    ordered = size[order]
    if strict_size:
        return order[np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))]
    least = np.minimum.accumulate(value[order])
    keep = np.ones(order.size, dtype=bool)
    keep[1:] = least[1:] < least[:-1]
    return order[keep]
