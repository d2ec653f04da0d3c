"""Reading a solved map: what the next unit of budget would buy, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import AllocationProblem, Floats, Integers
from mpqsearch.allocate.tables import plain_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStep:
    """The best next step inside a set of items: one item, a group, or the output channels of a layer.

    Attributes:
        name: Name of the set.
        items: Number of its items.
        cost: Their cost in the main budget.
        loss: Their separable loss.
        choice: The choice that all of them have, None when they differ.
        next_choice: Choice that the best step leads to, None when no step gains.
        gain: Loss that the step would save.
        extra_cost: What it would cost more.
        rate_up: ``gain / extra_cost``; 0 when no step gains.
        rate_down: Least loss per unit of cost given back by a smaller choice; infinite at the smallest.
        holds: ``free``, ``fixed``, ``at largest`` or ``at smallest`` of what is allowed, or how many items are so.
    """

    name: str
    items: int
    cost: int
    loss: float
    choice: str | None
    next_choice: str | None
    gain: float
    extra_cost: int
    rate_up: float
    rate_down: float
    holds: str


def explain(
    problem: AllocationProblem,
    choice: Integers,
    sets: Integers | None = None,
    names: Sequence[str] | None = None,
) -> tuple[NextStep, ...]:
    """The best next step of every set of items under a map, the best rate first; losses of pairs are left out.

    Items of a group step together: gain and extra cost of a step are those of the whole group.

    Args:
        problem: The solved problem.
        choice: ``[n]`` choice of every item.
        sets: ``[n]`` set of every item, 0 .. s - 1, such as the layer of an output channel. By default every free item
            and every group is a set of its own.
        names: ``[s]`` names of the sets; by default the names of their items.
    """
    tables = plain_tables(problem)
    sets = tables.row if sets is None else np.asarray(sets)
    chosen = np.empty(len(tables.loss), dtype=np.int64)
    chosen[tables.row] = choice
    margins = _margins(tables.loss, tables.cost, chosen)
    order = np.argsort(sets, kind="stable")
    cuts = np.flatnonzero(np.diff(sets[order], prepend=-1))
    members = np.split(order, cuts[1:]) if len(order) else []
    steps = [_next_step(problem, choice, margins, tables.row, items, sets, names) for items in members]
    return tuple(sorted(steps, key=lambda step: -step.rate_up))


@dataclass(frozen=True, slots=True, eq=False)
class _Margins:
    """Per row: the best step up (-1: none gains), what it brings, the least loss of a step down, what holds the row."""

    to: NDArray[np.int64]
    gain: NDArray[np.float64]
    extra_cost: NDArray[np.int64]
    rate_up: NDArray[np.float64]
    rate_down: NDArray[np.float64]
    holds: NDArray[np.str_]


def _margins(loss: Floats, cost: Integers, chosen: NDArray[np.int64]) -> _Margins:
    rows = np.arange(len(chosen))
    growth = cost.astype(np.int64) - cost[rows, chosen].astype(np.int64)[:, None]
    permitted = np.isfinite(loss)
    gain = np.where(permitted, loss[rows, chosen].astype(np.float64)[:, None] - loss, -np.inf)
    larger, smaller = permitted & (growth > 0), permitted & (growth < 0)
    rate = gain / np.where(growth == 0, 1, growth)
    up = np.where(larger, rate, -np.inf)
    best = up.argmax(axis=1)
    gains = up[rows, best] > 0
    held = [permitted.sum(axis=1) == 1, ~larger.any(axis=1), ~smaller.any(axis=1)]
    return _Margins(
        to=np.where(gains, best, -1),
        gain=np.where(gains, gain[rows, best], 0.0),
        extra_cost=np.where(gains, growth[rows, best], 0),
        rate_up=np.where(gains, up[rows, best], 0.0),
        rate_down=np.where(smaller, rate, np.inf).min(axis=1),
        holds=np.select(held, ["fixed", "at largest", "at smallest"], "free"),
    )


def _next_step(
    problem: AllocationProblem,
    choice: Integers,
    margins: _Margins,
    row: Integers,
    items: Integers,
    sets: Integers,
    names: Sequence[str] | None,
) -> NextStep:
    """The best next step among ``items``, all of one set."""
    picked, rows = choice[items], row[items]
    best = int(rows[np.argmax(margins.rate_up[rows])])
    to = int(margins.to[best])
    default = ", ".join(problem.item_name(int(i)).strip("'") for i in items)
    return NextStep(
        name=default if names is None else names[int(sets[items[0]])],
        items=len(items),
        cost=int(problem.cost[items, picked].sum(dtype=np.int64)),
        loss=float(problem.loss[items, picked].sum(dtype=np.float64)),
        choice=_choice_name(problem, int(picked[0])) if bool((picked == picked[0]).all()) else None,
        next_choice=_choice_name(problem, to) if to >= 0 else None,
        gain=float(margins.gain[best]),
        extra_cost=int(margins.extra_cost[best]),
        rate_up=float(margins.rate_up[best]),
        rate_down=float(margins.rate_down[rows].min()),
        holds=_held(margins.holds[rows].tolist()),
    )


def _choice_name(problem: AllocationProblem, choice: int) -> str:
    return problem.choice_name(choice).strip("'")


def _held(holds: list[str]) -> str:
    """What holds the items: one word when all agree, else how many are at an end."""
    if len(set(holds)) == 1:
        return holds[0]
    counts = [(holds.count(what), what) for what in ("fixed", "at largest", "at smallest")]
    return ", ".join(f"{count} {what}" for count, what in counts if count)
