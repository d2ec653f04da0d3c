"""Losses of pairs of items: a heuristic without a useful bound, by iterated linearization.

The separable problem whose losses are the averages of those that the choices so far would see is solved again and again
(Frank and Wolfe's idea on integers), and the best choice met is kept. With probed interactions, half of which is
believed, its loss is 0.6 of that of the choice without pairs (20 to 120 layers), and within 0.1 % of the best in the
mean (7 layers). Exchanges after it would save 3 % more, less than the noise of the probes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import mckp
from mpqsearch.allocate.problem import Floats, Integers, PairwiseTerms
from mpqsearch.allocate.result import Answer
from mpqsearch.allocate.tables import Tables

ROUNDS = 60
"""Linearizations; the best choice seen rarely improves after a dozen."""


def solve_pairwise(pairs: PairwiseTerms, tables: Tables) -> Answer:
    """A good choice within one budget."""
    couplings, cost, limit = Couplings(tables.loss, pairs, tables.row), tables.costs[0], tables.limits[0]
    best = mckp.solve_table(tables.loss, cost, limit)  # so the answer is no worse than without the pairs
    least, mean = couplings.total(best.choice), couplings.field(best.choice)
    allowed = np.isfinite(tables.loss)  # what is not allowed stays infinite: the mean of infinities is no number
    seen = {best.choice.tobytes()}
    for number in range(1, ROUNDS):
        solved = mckp.solve_table(mean, cost, limit)
        total = couplings.total(solved.choice)
        if total < least:
            best, least = solved, total
        if solved.choice.tobytes() in seen and number > ROUNDS // 4:
            break
        seen.add(solved.choice.tobytes())
        mean[allowed] += (couplings.field(solved.choice)[allowed] - mean[allowed]) / (number + 1)
    return Answer(
        choice=best.choice,
        proof="none",
        floor=-np.inf,
        dual_bound=-np.inf,
        multipliers=(best.rate,),
        solver="linearization",
    )


class Couplings:
    """Loss of a choice and of every single change; pairs inside one row are losses of that row."""

    def __init__(self, loss: Floats, pairs: PairwiseTerms, row: Integers) -> None:
        first, second, value = row[pairs.first], row[pairs.second], pairs.value.astype(np.float64)
        inside = first == second
        self.loss = loss.astype(np.float64)
        np.add.at(self.loss, first[inside], np.diagonal(value[inside], axis1=1, axis2=2))
        self.first, self.second, self.value = first[~inside], second[~inside], value[~inside]

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
