"""Reading a solved map: what the next unit of budget would buy, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpqsearch.allocate.problem import AllocationProblem, Integers
from mpqsearch.allocate.tables import plain_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStep:
    """The best next step inside a set of items: one item, a group, or the output channels of a layer.

    Attributes:
        name: Name of the set.
        cost: Cost of its items in the main budget.
        loss: Their separable loss.
        next_choice: Choice that the best step leads to, None when no step lowers the loss.
        saved: Loss that the step would save.
        extra_cost: What it would cost more.
        rate: ``saved / extra_cost``; 0 without a step.
    """

    name: str
    cost: int
    loss: float
    next_choice: str | None
    saved: float
    extra_cost: int
    rate: float


def explain(
    problem: AllocationProblem, choice: Integers, sets: Integers | None = None, names: Sequence[str] | None = None
) -> tuple[NextStep, ...]:
    """The best next step of every set of items under a map, the best rate first; losses of pairs are left out.

    Items of a group step together: what a step saves and costs is that of the whole group.

    Args:
        problem: The solved problem.
        choice: ``[n]`` choice of every item.
        sets: ``[n]`` set of every item, 0 .. s - 1, such as the layer of an output channel. By default every free item
            and every group is a set of its own.
        names: ``[s]`` names of the sets; by default the names of their items.
    """
    tables = plain_tables(problem)
    chosen, rows = np.empty(len(tables.loss), dtype=np.int64), np.arange(len(tables.loss))
    chosen[tables.row] = choice
    loss, cost = tables.loss.astype(np.float64), tables.costs[0].astype(np.int64)
    growth = cost - cost[rows, chosen][:, None]
    rate = np.where(growth > 0, loss[rows, chosen][:, None] - loss, -np.inf) / np.maximum(growth, 1)
    members = tables.row if sets is None else np.asarray(sets)
    order, steps = np.argsort(members, kind="stable"), []
    for items in np.split(order, np.flatnonzero(np.diff(members[order])) + 1):
        own = np.unique(tables.row[items])
        best, to = (int(at) for at in np.unravel_index(int(rate[own].argmax()), rate[own].shape))
        best, lowers = int(own[best]), bool(rate[own].max() > 0)
        steps.append(
            NextStep(
                name=_label(problem, items) if sets is None or names is None else names[int(sets[items[0]])],
                cost=int(problem.budgets[0].cost[items, choice[items]].sum(dtype=np.int64)),
                loss=float(problem.loss[items, choice[items]].sum(dtype=np.float64)),
                next_choice=problem.choice_name(to).strip("'") if lowers else None,
                saved=float(loss[best, chosen[best]] - loss[best, to]) if lowers else 0.0,
                extra_cost=int(growth[best, to]) if lowers else 0,
                rate=float(rate[best, to]) if lowers else 0.0,
            )
        )
    return tuple(sorted(steps, key=lambda step: -step.rate))


def _label(problem: AllocationProblem, items: Integers) -> str:
    return ", ".join(problem.item_name(item).strip("'") for item in items.tolist())
