"""Allocation problems of one budget in one line, and changes of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpqsearch.allocate import AllocationProblem, CostBudget


def problem_of(loss: Any, cost: Any, limit: Any, more: Sequence[CostBudget] = (), **rest: Any) -> AllocationProblem:
    """A problem whose main budget is called ``cost``; ``more`` are further ones."""
    return AllocationProblem(loss=loss, budgets=(CostBudget(name="cost", cost=cost, limit=limit), *more), **rest)


def changed(
    problem: AllocationProblem, *, limit: Any = None, more: Sequence[CostBudget] | None = None, **rest: Any
) -> AllocationProblem:
    """The problem with another limit of its main budget, other further budgets, or other fields."""
    first, *others = problem.budgets
    first = first if limit is None else replace(first, limit=limit)
    return replace(problem, budgets=(first, *(others if more is None else more)), **rest)


def grouped(n: int, *groups: Sequence[int]) -> Any:
    """Labels ``[n]`` of groups of items, -1 for the free ones."""
    labels = np.full(n, -1)
    for number, group in enumerate(groups):
        labels[list(group)] = number
    return labels
