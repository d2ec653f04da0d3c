"""Losses of pairs of items: iterated linearization, then exchange moves. A heuristic without a useful bound.

The separable problem whose losses are the averages of those that the choices so far would see is solved again and again
(Frank and Wolfe's idea on integers); the best choice met descends by single changes and pairs of changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import mckp
from mpqsearch.allocate.problem import Floats, Integers, PairwiseTerms
from mpqsearch.allocate.tables import total_cost
from mpqsearch.allocate.task import Answer, Task

ROUNDS = 60
"""Linearizations; the best choice seen rarely improves after a dozen."""

SWAP_CANDIDATES = 160
"""Single changes whose pairs are tried together."""

MAX_MOVES = 2_000
"""Exchange moves."""

LINEAR_GAP = 1e-4
"""Relative gap at which a linearization is solved well enough."""


def solve_pairwise(task: Task) -> Answer:
    """A good choice, and the bound that takes every pair at its least value, which is rarely met."""
    assert task.problem.pairwise is not None
    tables = task.tables
    couplings = Couplings(tables.loss, task.problem.pairwise, tables.row)
    start = _linearized(couplings, tables.cost, tables.limit)
    choice = _exchanged(couplings, tables.cost, tables.limit, start)
    relaxed, value = mckp.relax(tables.loss, tables.cost, tables.limit), task.problem.pairwise.value
    bound = relaxed.bound + float(value.min(axis=(1, 2)).sum(dtype=np.float64))
    terms = abs(relaxed.loss) + float(np.abs(value).max(axis=(1, 2)).sum(dtype=np.float64))
    met = couplings.total(choice) - bound <= mckp.ROUNDING * terms
    return Answer(
        choice=choice,
        proof="bound" if met else "none",
        floor=bound,
        dual_bound=bound,
        multipliers=(relaxed.rate,),
        solver="linearization+exchange",
    )


class Couplings:
    """Loss of a choice and of every single change, with the pairs between the same two rows joined."""

    def __init__(self, loss: Floats, pairs: PairwiseTerms, row: Integers) -> None:
        first, second, value = row[pairs.first], row[pairs.second], pairs.value.astype(np.float64)
        inside = first == second
        self.loss = loss.astype(np.float64)
        np.add.at(self.loss, first[inside], np.diagonal(value[inside], axis1=1, axis2=2))
        first, second, value = first[~inside], second[~inside], value[~inside]
        swapped = first > second
        value[swapped] = value[swapped].transpose(0, 2, 1)
        n = np.int64(len(loss))
        self.keys, pair = np.unique(np.minimum(first, second) * n + np.maximum(first, second), return_inverse=True)
        self.value = np.zeros((self.keys.size, loss.shape[1], loss.shape[1]))
        np.add.at(self.value, pair, value)
        self.first, self.second = self.keys // n, self.keys % n

    def total(self, choice: Integers) -> float:
        """Loss of ``choice``."""
        terms = self.value[np.arange(len(self.first)), choice[self.first], choice[self.second]]
        return float(self.loss[np.arange(len(self.loss)), choice].sum() + terms.sum())

    def field(self, choice: Integers) -> NDArray[np.float64]:
        """``[r, k]``: loss of every choice of a row while all others stay; exact for single changes."""
        pairs, field = np.arange(len(self.first)), self.loss.copy()
        np.add.at(field, self.first, self.value[pairs, :, choice[self.second]])
        np.add.at(field, self.second, self.value[pairs, choice[self.first], :])
        return field

    def corrections(self, choice: Integers, rows: Integers, tos: Integers) -> NDArray[np.float64]:
        """``[m, m]``: what every two of the changes ``rows`` -> ``tos`` cost together beyond their sum."""
        joint = np.zeros((len(rows), len(rows)))
        low, high = np.nonzero(rows[:, None] < rows[None, :])
        key = rows[low] * np.int64(len(self.loss)) + rows[high]
        pair = np.searchsorted(self.keys, key).clip(0, max(len(self.keys) - 1, 0))
        paired = np.flatnonzero(self.keys[pair] == key) if len(self.keys) else np.empty(0, dtype=np.int64)
        low, high, pair = low[paired], high[paired], pair[paired]
        value, x, y = self.value, tos[low], tos[high]
        at_x, at_y = choice[rows[low]], choice[rows[high]]
        joint[low, high] = value[pair, x, y] - value[pair, x, at_y] - value[pair, at_x, y] + value[pair, at_x, at_y]
        return joint + joint.T


def _linearized(couplings: Couplings, cost: Integers, limit: int) -> NDArray[np.int32]:
    """The best choice met while the losses of the separable problem follow the choices so far."""
    best = mckp.solve_table(couplings.loss, cost, limit).choice
    least, mean = couplings.total(best), couplings.field(best)
    allowed = np.isfinite(couplings.loss)  # what is not allowed stays infinite: the mean of infinities is no number
    seen = {best.tobytes()}
    for number in range(1, ROUNDS):
        choice = mckp.solve_table(mean, cost, limit, gap_tolerance=LINEAR_GAP).choice
        total = couplings.total(choice)
        if total < least:
            best, least = choice, total
        if choice.tobytes() in seen and number > ROUNDS // 4:
            break
        seen.add(choice.tobytes())
        mean[allowed] += (couplings.field(choice)[allowed] - mean[allowed]) / (number + 1)
    return best


def _exchanged(couplings: Couplings, cost: Integers, limit: int, start: Integers) -> NDArray[np.int32]:
    """Descend by single changes and pairs of changes until none helps."""
    choice, rows = start.astype(np.int32), np.arange(len(start))
    for _ in range(MAX_MOVES):
        field = couplings.field(choice)
        gain = field - field[rows, choice][:, None]
        growth = cost.astype(np.int64) - cost[rows, choice].astype(np.int64)[:, None]
        slack = limit - total_cost(cost, choice)
        least = -1e-13 * float(np.abs(gain[np.isfinite(gain)]).max(initial=0.0))  # less is rounding
        value, move = min(_moves(couplings, choice, gain, growth, slack), key=lambda m: m[0], default=(0.0, ()))
        if not value < least:
            break
        for row, to in move:
            choice[row] = to
    return choice


Change = tuple[int, int]


def _moves(
    couplings: Couplings, choice: Integers, gain: NDArray[np.float64], growth: NDArray[np.int64], slack: int
) -> Iterator[tuple[float, tuple[Change, ...]]]:
    """The best affordable single change, and the best pair among the changes that are cheapest at the marginal rate."""
    single = np.where(growth <= slack, gain, np.inf)
    row, to = np.unravel_index(int(np.argmin(single)), single.shape)
    yield float(single[row, to]), ((int(row), int(to)),)
    rate = _marginal_rate(gain, growth)
    price = np.where(np.isfinite(gain), gain + rate * growth, np.inf)
    price[np.arange(len(choice)), choice] = np.inf
    flat = np.argsort(price, axis=None)[:SWAP_CANDIDATES]
    rows, tos = np.divmod(flat[np.isfinite(price.ravel()[flat])], gain.shape[1])
    if not rows.size:
        return
    value = gain[rows, tos][:, None] + gain[rows, tos][None, :] + couplings.corrections(choice, rows, tos)
    fits = (growth[rows, tos][:, None] + growth[rows, tos][None, :] <= slack) & (rows[:, None] != rows[None, :])
    value = np.where(fits, value, np.inf)
    a, b = np.unravel_index(int(np.argmin(value)), value.shape)
    yield float(value[a, b]), ((int(rows[a]), int(tos[a])), (int(rows[b]), int(tos[b])))


def _marginal_rate(gain: NDArray[np.float64], growth: NDArray[np.int64]) -> float:
    """Least loss per unit of cost at which some row can be made smaller."""
    smaller = (growth < 0) & np.isfinite(gain)
    return float(max((gain[smaller] / -growth[smaller]).min(), 0.0)) if smaller.any() else 0.0
