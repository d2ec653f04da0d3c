"""Brute force: the oracle of the tests, usable for a dozen items."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import AllocationProblem
from mpqsearch.errors import ConfigError

MAX_COMBINATIONS = 2_000_000


def exhaustive_choice(problem: AllocationProblem) -> NDArray[np.int32] | None:
    """Best admissible choice by trying every one; None when there is none.

    Raises:
        ConfigError: There are more than ``MAX_COMBINATIONS`` combinations.
    """
    if problem.n_choices**problem.n_items > MAX_COMBINATIONS:
        raise ConfigError(
            f"the exhaustive solver tries {problem.n_choices}**{problem.n_items} combinations; "
            f"it accepts at most {MAX_COMBINATIONS}. Use solver='core'."
        )
    best: NDArray[np.int32] | None = None
    best_loss = np.inf
    for combination in itertools.product(range(problem.n_choices), repeat=problem.n_items):
        choice = np.array(combination, dtype=np.int32)
        if not problem.permits(choice):
            continue
        loss, costs = problem.evaluate(choice)
        within = all(cost <= budget.limit for cost, budget in zip(costs, problem.budgets, strict=True))
        if within and loss < best_loss:
            best, best_loss = choice, loss
    return best
