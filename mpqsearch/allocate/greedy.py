"""Greedy allocation: the steepest affordable hull step first. Fast, feasible, never optimal by promise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import passes
from mpqsearch.allocate.problem import Floats, Integers


def greedy_choice(loss: Floats, cost: Integers, limit: int) -> NDArray[np.int32]:
    """Take hull steps in the order of their gain per cost; an item that cannot pay its next step stops there."""
    steps = passes.hull_steps(loss, cost)
    choice = steps.base.copy()
    slack = limit - int(cost[np.arange(len(cost)), choice].sum(dtype=np.int64))
    used = np.cumsum(steps.size)
    taken = int(np.searchsorted(used, slack, side="right"))
    choice[steps.item[:taken]] = steps.to[:taken]
    slack -= int(used[taken - 1]) if taken else 0
    stopped: set[int] = set()
    smallest_later = np.minimum.accumulate(steps.size[::-1])[::-1]
    for index in range(taken, len(used)):
        if slack < smallest_later[index]:
            break
        item = int(steps.item[index])
        if item in stopped or steps.size[index] > slack:
            stopped.add(item)
            continue
        choice[item] = steps.to[index]
        slack -= int(steps.size[index])
    return choice
