"""The oracle of the allocation tests: every choice is tried, and costed by these lines alone."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any


def admissible(problem: Any, choice: tuple[int, ...]) -> bool:
    """Whether a choice obeys everything that ``problem`` says, in plain Python."""
    items = range(len(choice))
    if problem.allowed is not None and not all(problem.allowed[i, choice[i]] for i in items):
        return False
    if problem.groups is not None:
        for a, b in itertools.combinations(items, 2):
            if problem.groups[a] == problem.groups[b] >= 0 and choice[a] != choice[b]:
                return False
    if problem.max_formats is not None and len(set(choice)) > problem.max_formats:
        return False
    if problem.max_formats_per_layer is not None:
        for layer in set(problem.layer.tolist()):
            if len({choice[i] for i in items if problem.layer[i] == layer}) > problem.max_formats_per_layer:
                return False
    return all(sum(int(b.cost[i, choice[i]]) for i in items) <= b.limit for b in problem.budgets)


def total(problem: Any, choice: tuple[int, ...]) -> float:
    """Loss of a choice, pairs included."""
    terms = [float(problem.loss[i, c]) for i, c in enumerate(choice)]
    if problem.pairwise is not None:
        pairs = problem.pairwise
        terms += [
            float(value[choice[a], choice[b]])
            for a, b, value in zip(pairs.first, pairs.second, pairs.value, strict=True)
        ]
    return math.fsum(terms)


def least(problem: Any) -> float | None:
    """The least loss of any admissible choice, None when there is none."""
    n, k = problem.loss.shape
    losses = [total(problem, c) for c in itertools.product(range(k), repeat=n) if admissible(problem, c)]
    return min(losses, default=None)


def smallest(problem: Any, name: str) -> int | None:
    """The smallest total of one budget when everything else holds, None when nothing else can hold."""
    n, k = problem.loss.shape
    budgets = {b.name: b for b in problem.budgets}
    asked = budgets.pop(name)
    rules = ("allowed", "groups", "max_formats", "max_formats_per_layer", "layer")
    without = SimpleNamespace(budgets=list(budgets.values()), **{rule: getattr(problem, rule) for rule in rules})
    totals = [
        sum(int(asked.cost[i, c]) for i, c in enumerate(choice))
        for choice in itertools.product(range(k), repeat=n)
        if admissible(without, choice)
    ]
    return min(totals, default=None)
