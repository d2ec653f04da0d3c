"""Closing the gap of a Lagrangian solution: dynamic programming over lists of undominated states.

Starting from a base choice that minimizes loss + rate * cost row by row, every solution has the value

    bound + sum of the penalties of its moves + rate * (budget left unused),

so the best one is a cheapest set of moves that fills the slack. Rows are taken in the order of their penalty per unit
of cost. A state is dropped when another one is smaller and no worse, or when even the best move per unit among the rows
still to come cannot bring it below the incumbent; once no state is left the incumbent is proven optimal (Pisinger, "A
minimal algorithm for the multiple-choice knapsack problem", 1995, in the form of penalties).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import Floats, Integers

MAX_STATES = 1_000_000
"""States alive at a time; beyond it the worst are dropped and the proof with them (the bound stays valid)."""

MAX_HISTORY = 30_000_000
"""States ever made (16 bytes each) after which the search ends without a proof: memory stays near a gigabyte."""

GRADE = 1e-9
"""Efficiencies are ordered in steps of this share of the rate."""

GOLDEN = (5**0.5 - 1) / 2
"""The fractional parts of its multiples fill the unit interval evenly: a shuffle that needs no generator."""

TINY = float(np.finfo(np.float64).tiny)

TIE_BREAK = 0.01
"""Share of the incumbent's excess by which the distance from a full budget counts when states must be dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Departures from a base choice that cost little at a given rate.

    Attributes:
        item: ``[m]`` row of the move, never decreasing.
        choice: ``[m]`` choice that it takes.
        penalty: ``[m]`` increase of loss + rate * cost, >= 0.
        size: ``[m]`` increase of the cost, never 0.
    """

    item: NDArray[np.int64]
    choice: NDArray[np.int32]
    penalty: NDArray[np.float64]
    size: NDArray[np.int64]

    def nearest(self, most: int) -> Moves:
        """At most so many moves: those with the least penalty per unit of cost."""
        if self.item.size <= most:
            return self
        kept = np.sort(np.argpartition(self.penalty / np.abs(self.size), most)[:most])
        return Moves(self.item[kept], self.choice[kept], self.penalty[kept], self.size[kept])


def collect_moves(loss: Floats, cost: Integers, base: Integers, rate: float, threshold: float) -> Moves:
    """All departures from ``base`` whose penalty at ``rate`` is at most ``threshold``."""
    rows, sizes = np.arange(len(loss)), cost.astype(np.int64, copy=False)
    value = loss + rate * sizes
    size = sizes - sizes[rows, base][:, None]
    penalty = np.maximum(value - value[rows, base][:, None], 0.0)  # the base is least up to rounding
    item, choice = np.nonzero((penalty <= threshold) & (size != 0))
    return Moves(item, choice.astype(np.int32), penalty[item, choice], size[item, choice])


@dataclass(frozen=True, slots=True, eq=False)
class Closed:
    """Outcome of closing.

    Attributes:
        item: Rows to change.
        choice: Their new choices.
        excess: Value of the best solution above the Lagrangian bound.
        floor: No solution made of the given moves has a smaller excess.
        proven: Whether the search was exhaustive: none improves ``excess`` by more than the tolerance.
    """

    item: NDArray[np.int64]
    choice: NDArray[np.int32]
    excess: float
    floor: float
    proven: bool


def close(
    moves: Moves, slack: int, rate: float, *, excess: float, tolerance: float, max_states: int = MAX_STATES
) -> Closed:
    """Best set of moves within ``slack``.

    Args:
        moves: Departures from the base choice.
        slack: Budget that the base choice leaves, >= 0.
        rate: Multiplier at which the penalties were taken.
        excess: Value above the Lagrangian bound of the best solution known so far.
        tolerance: Improvements below this are not looked for.
        max_states: States alive at a time.
    """
    if not moves.item.size:
        value = min(excess, rate * slack)
        return Closed(moves.item, moves.choice, value, value, proven=True)
    return _Search(build_core(moves, rate), slack, rate, excess, tolerance).run(max_states)


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """Moves grouped by row, rows in order of their best penalty per unit of cost.

    Attributes:
        start: ``[g + 1]`` first move of every group.
        moves: The moves in this order.
        up: ``[g + 1]`` least penalty per unit over all increases from group g on.
        down: ``[g + 1]`` the same over all decreases.
    """

    start: NDArray[np.int64]
    moves: Moves
    up: NDArray[np.float64]
    down: NDArray[np.float64]


def build_core(moves: Moves, rate: float) -> Core:
    """Order the rows of ``moves``.

    Rows of equal efficiency (up to rounding: a share of ``rate``) are shuffled: in their own order the first ones could
    all only shrink, and the states would wander away from a full budget.
    """
    efficiency = moves.penalty / np.abs(moves.size)
    heads = np.flatnonzero(np.diff(moves.item, prepend=-1))
    counts = np.diff(heads, append=moves.item.size)
    grades = np.minimum.reduceat(efficiency, heads) / (GRADE * max(rate, TINY))
    order = np.argsort(np.round(grades) + np.arange(heads.size) * GOLDEN % 1.0)
    counts = counts[order]
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    within = np.arange(moves.item.size) + np.repeat(heads[order] - start[:-1], counts)
    ordered = Moves(moves.item[within], moves.choice[within], moves.penalty[within], moves.size[within])
    grows = ordered.size > 0
    up, down = (np.where(side, efficiency[within], np.inf) for side in (grows, ~grows))
    return Core(start, ordered, _suffix_minimum(up, start), _suffix_minimum(down, start))


def _suffix_minimum(values: NDArray[np.float64], start: NDArray[np.int64]) -> NDArray[np.float64]:
    """Least value from every group's first move to the end; infinite after the last."""
    suffix = np.append(np.minimum.accumulate(values[::-1])[::-1], np.inf)
    least: NDArray[np.float64] = suffix[start]
    return least


class _Search:
    """The state list and its history.

    A state is a size and a penalty; penalty - rate * size is the change of the plain loss up to a constant. Of two
    states the one that is no larger in size and in this change dominates.
    """

    def __init__(self, core: Core, slack: int, rate: float, excess: float, tolerance: float) -> None:
        grain = int(np.gcd.reduce(core.moves.size))
        self.core, self.rate, self.excess, self.tolerance = core, rate, excess, tolerance
        self.slack = slack - slack % grain  # no set of moves can use the rest
        self.offset = rate * (slack % grain)
        self.size, self.penalty = np.zeros(1, dtype=np.int64), np.zeros(1)
        self.state = np.zeros(1, dtype=np.int64)  # index into the history, where a row is (parent, move)
        self.parents: list[NDArray[np.int64]] = [np.array([-1], dtype=np.int64)]
        self.moved: list[NDArray[np.int64]] = [np.array([-1], dtype=np.int64)]
        self.n_history = 1
        self.best_state = -1
        self.dropped = np.inf

    def run(self, max_states: int) -> Closed:
        """Take group after group until no state is left, and say what that proves."""
        self._update_incumbent()
        for group in range(len(self.core.start) - 1):
            self._select(self._bounds(group) < self.excess - self.tolerance)
            if not self.size.size:
                break
            if self.n_history > MAX_HISTORY:
                self.dropped = min(self.dropped, float(self._bounds(group).min()))
                break
            self._expand(group)
            self._update_incumbent()
            if self.size.size > max_states:
                self._truncate(group + 1, max_states)
        return self._outcome()

    def _bounds(self, group: int) -> NDArray[np.float64]:
        """Least excess that a state can still reach with the groups from ``group`` on."""
        free = self.slack - self.size
        per_unit = np.where(free >= 0, min(self.rate, self.core.up[group]), self.core.down[group])
        with np.errstate(invalid="ignore"):
            rest = np.where(free == 0, 0.0, np.abs(free) * per_unit)
        return self.penalty + rest + self.offset

    def _select(self, kept: NDArray[Any]) -> None:
        self.size, self.penalty, self.state = self.size[kept], self.penalty[kept], self.state[kept]

    def _expand(self, group: int) -> None:
        first, last = int(self.core.start[group]), int(self.core.start[group + 1])
        count, moves = self.size.size, self.core.moves
        size = np.concatenate([self.size, (self.size + moves.size[first:last, None]).ravel()])
        penalty = np.concatenate([self.penalty, (self.penalty + moves.penalty[first:last, None]).ravel()])
        kept = _undominated(size, penalty - self.rate * size)
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
        value = np.where(free >= 0, self.penalty + self.rate * free, np.inf) + self.offset
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

    def _outcome(self) -> Closed:
        moves = self._history()
        floor = min(self.excess - self.tolerance, self.dropped)
        proven = self.dropped >= self.excess - self.tolerance
        return Closed(self.core.moves.item[moves], self.core.moves.choice[moves], self.excess, floor, proven)

    def _history(self) -> NDArray[np.int64]:
        if self.best_state < 0:
            return np.empty(0, dtype=np.int64)
        parents, moved = np.concatenate(self.parents), np.concatenate(self.moved)
        taken, state = [], self.best_state
        while parents[state] >= 0:
            taken.append(int(moved[state]))
            state = int(parents[state])
        return np.array(taken, dtype=np.int64)


def _undominated(size: NDArray[np.int64], value: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the states that no other state beats, by size."""
    order = np.lexsort((value, size))
    least = np.minimum.accumulate(value[order])
    keep = np.ones(order.size, dtype=bool)
    keep[1:] = least[1:] < least[:-1]
    return order[keep]
