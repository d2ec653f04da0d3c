"""Reading a solved map: what the next unit of budget would buy, what holds every item, what overrides and ties cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.canonical import Tables, canonical_tables
from mpqsearch.allocate.dispatch import solve
from mpqsearch.allocate.problem import FREE, AllocationProblem, AllocationResult, Integers

MAX_PRICED = 32
"""Pins and tie groups that are priced by solving again without them: those that may cost most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemExplanation:
    """One item (or tie group) of a solved map.

    Attributes:
        items: Names of the items that move together.
        choice: Name or index of the choice.
        cost: Cost of the item in the main budget.
        loss: Its separable loss.
        next_choice: Choice with the best gain per cost above the present one, None at the top.
        gain: Loss that it would save.
        extra_cost: What it would cost more.
        rate_up: ``gain / extra_cost``: the marginal rate of the next bit; 0 at the top.
        rate_down: Least loss per unit of cost given back by a smaller choice; infinite at the bottom.
        holds: ``free``, ``fixed``, ``at largest`` or ``at smallest`` of what is allowed.
    """

    items: tuple[str, ...]
    choice: str
    cost: int
    loss: float
    next_choice: str | None
    gain: float
    extra_cost: int
    rate_up: float
    rate_down: float
    holds: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupExplanation:
    """All items (channels) of one group (layer) of a solved map.

    Attributes:
        name: Name of the group.
        items: Number of its items.
        loss: Their separable loss.
        cost: Their cost in the main budget.
        gain: Loss that the best next step of one of them would save.
        extra_cost: What that step would cost more.
        rate_up: Best gain per unit of cost of any of them; 0 when no step gains.
        rate_down: Least loss per unit of cost given back by any of them; infinite when all are at their smallest.
        at_largest: Items at the largest choice they may take.
        at_smallest: Items at the smallest choice they may take.
        fixed: Items that may take one choice only.
    """

    name: str
    items: int
    loss: float
    cost: int
    gain: float
    extra_cost: int
    rate_up: float
    rate_down: float
    at_largest: int
    at_smallest: int
    fixed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintPrice:
    """What one constraint costs: the loss that the optimum without it saves.

    Attributes:
        kind: ``fixed`` or ``tie``.
        items: Names of the items concerned.
        price: Loss saved without it; exact when ``proven``, otherwise an estimate from feasible maps.
        proven: Whether both optima are proven.
    """

    kind: str
    items: tuple[str, ...]
    price: float
    proven: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Explanation of a solved map.

    Attributes:
        shadow_price: Loss per unit of the main budget at the margin.
        shadow_prices: The same for every budget by name.
        slack: Main budget left unused.
        items: Every item or tie group, the best next step first.
        prices: What overrides and ties cost, dearest first; at most ``MAX_PRICED`` of them.
        unpriced: Pins and ties beyond these, which were not priced.
    """

    shadow_price: float
    shadow_prices: dict[str, float]
    slack: int
    items: tuple[ItemExplanation, ...]
    prices: tuple[ConstraintPrice, ...]
    unpriced: int

    def rows(self) -> list[dict[str, object]]:
        """One dictionary per item, for a table or a file."""
        return [asdict(item) | {"items": ", ".join(item.items)} for item in self.items]


def explain(problem: AllocationProblem, result: AllocationResult, *, price_constraints: bool = True) -> Explanation:
    """Explain ``result`` of ``problem``; losses of pairs are left out of the per-item numbers.

    Args:
        problem: The solved problem.
        result: Its result.
        price_constraints: Solve again without each pin and tie (at most ``MAX_PRICED`` of them).
    """
    tables = canonical_tables(problem)
    names = _row_names(problem, tables)
    chosen = np.empty(len(tables.loss), dtype=np.int64)
    chosen[tables.item_row] = result.choice
    items = _item_explanations(problem, tables, chosen, names)
    prices, unpriced = _prices(problem, result) if price_constraints else ([], 0)
    return Explanation(
        shadow_price=result.multiplier,
        shadow_prices={budget.name: rate for budget, rate in zip(problem.budgets, result.multipliers, strict=True)},
        slack=problem.limit - result.cost,
        items=tuple(sorted(items, key=lambda item: -item.rate_up)),
        prices=tuple(sorted(prices, key=lambda price: -price.price)),
        unpriced=unpriced,
    )


def explain_groups(
    problem: AllocationProblem, result: AllocationResult, group: Integers, names: Sequence[str]
) -> tuple[GroupExplanation, ...]:
    """Explain a map with many items by groups of them, such as channels by layers; the best next step first.

    Tied items step together: gains and extra costs of a step are those of all its items, wherever they stand.

    Args:
        problem: The solved problem.
        result: Its result.
        group: ``[n]`` group of every item, 0 .. len(names) - 1.
        names: Name of every group.
    """
    tables = canonical_tables(problem)
    row = tables.item_row
    chosen = np.empty(len(tables.loss), dtype=np.int64)
    chosen[row] = result.choice
    margins = _margins(tables, chosen).of(row)
    rows = np.arange(problem.n_items)
    count = len(names)

    def summed(values: NDArray[np.generic]) -> NDArray[np.float64]:
        return np.bincount(group, weights=values.astype(np.float64), minlength=count).astype(np.float64)

    best = np.zeros(count, dtype=np.int64)
    order = np.lexsort((margins.rate_up, group))  # the last of every group has its best rate
    best[group[order]] = order
    least = np.full(count, np.inf)
    np.minimum.at(least, group, margins.rate_down)
    sizes, losses = np.bincount(group, minlength=count), summed(problem.loss[rows, result.choice])
    costs = np.zeros(count, dtype=np.int64)
    np.add.at(costs, group, problem.cost[rows, result.choice].astype(np.int64))
    held = {what: summed(margins.holds == what).astype(np.int64) for what in ("at largest", "at smallest", "fixed")}
    found = (
        GroupExplanation(
            name=names[g],
            items=int(sizes[g]),
            loss=float(losses[g]),
            cost=int(costs[g]),
            gain=float(margins.gain[best[g]]),
            extra_cost=int(margins.extra_cost[best[g]]),
            rate_up=float(margins.rate_up[best[g]]),
            rate_down=float(least[g]),
            at_largest=int(held["at largest"][g]),
            at_smallest=int(held["at smallest"][g]),
            fixed=int(held["fixed"][g]),
        )
        for g in np.flatnonzero(sizes).tolist()
    )
    return tuple(sorted(found, key=lambda layer: -layer.rate_up))


def _row_names(problem: AllocationProblem, tables: Tables) -> list[tuple[str, ...]]:
    names: list[list[str]] = [[] for _ in range(len(tables.loss))]
    for item, row in enumerate(tables.item_row.tolist()):
        names[row].append(_plain(problem.item_name(item)))
    return [tuple(row) for row in names]


def _plain(name: str) -> str:
    return name.strip("'")


@dataclass(frozen=True, slots=True, eq=False)
class _Margins:
    """Per row of the tables: the best step up (-1: none gains), what it brings, the least loss of a step down, what
    holds it."""

    to: NDArray[np.int64]
    gain: NDArray[np.float64]
    extra_cost: NDArray[np.int64]
    rate_up: NDArray[np.float64]
    rate_down: NDArray[np.float64]
    holds: NDArray[np.str_]

    def of(self, row: NDArray[np.int64]) -> _Margins:
        """Per item, given the row of every item."""
        return _Margins(
            self.to[row], self.gain[row], self.extra_cost[row], self.rate_up[row], self.rate_down[row], self.holds[row]
        )


def _margins(tables: Tables, chosen: NDArray[np.int64]) -> _Margins:
    rows = np.arange(len(chosen))
    loss = tables.loss.astype(np.float64)
    growth = tables.cost.astype(np.int64) - tables.cost[rows, chosen].astype(np.int64)[:, None]
    permitted = np.isfinite(loss)
    gain = np.where(permitted, loss[rows, chosen][:, None] - loss, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(permitted & (growth != 0), gain / growth, np.nan)
    up = np.where(permitted & (growth > 0), rate, -np.inf)
    down = np.where(permitted & (growth < 0), rate, np.inf).min(axis=1)
    best = up.argmax(axis=1)
    gains = up[rows, best] > 0
    larger, smaller = (permitted & (growth > 0)).any(axis=1), (permitted & (growth < 0)).any(axis=1)
    holds = np.select([permitted.sum(axis=1) == 1, ~larger, ~smaller], ["fixed", "at largest", "at smallest"], "free")
    return _Margins(
        to=np.where(gains, best, -1),
        gain=np.where(gains, gain[rows, best], 0.0),
        extra_cost=np.where(gains, growth[rows, best], 0),
        rate_up=np.where(gains, up[rows, best], 0.0),
        rate_down=down,
        holds=holds,
    )


def _item_explanations(
    problem: AllocationProblem, tables: Tables, chosen: NDArray[np.int64], names: list[tuple[str, ...]]
) -> Iterator[ItemExplanation]:
    margins = _margins(tables, chosen)
    for row, choice in enumerate(chosen.tolist()):
        to = int(margins.to[row])
        yield ItemExplanation(
            items=names[row],
            choice=_plain(problem.choice_name(choice)),
            cost=int(tables.cost[row, choice]),
            loss=float(tables.loss[row, choice]),
            next_choice=_plain(problem.choice_name(to)) if to >= 0 else None,
            gain=float(margins.gain[row]),
            extra_cost=int(margins.extra_cost[row]),
            rate_up=float(margins.rate_up[row]),
            rate_down=float(margins.rate_down[row]),
            holds=str(margins.holds[row]),
        )


def _prices(problem: AllocationProblem, result: AllocationResult) -> tuple[list[ConstraintPrice], int]:
    """Solve again without each pin and each tie group that may cost most at the marginal rates; and how many were left
    out."""
    priced = problem.loss.astype(np.float64)
    for budget, rate in zip(problem.budgets, result.multipliers, strict=True):
        priced += rate * budget.cost
    permitted = np.ones(problem.loss.shape, dtype=bool) if problem.allowed is None else problem.allowed
    regret = priced[np.arange(problem.n_items), result.choice] - np.where(permitted, priced, np.inf).min(axis=1)
    cases: list[tuple[float, Callable[[], ConstraintPrice]]] = []
    if problem.fixed_choice is not None:
        overrides = np.flatnonzero(problem.fixed_choice != FREE).tolist()
        cases += [(float(regret[item]), partial(_without_pin, problem, result, item)) for item in overrides]
    if problem.tie_labels is not None:
        groups = np.unique(problem.tie_labels[problem.tie_labels != FREE]).tolist()
        tied = [np.flatnonzero(problem.tie_labels == group) for group in groups]
        cases += [(float(regret[members].sum()), partial(_without_tie, problem, result, members)) for members in tied]
    cases.sort(key=lambda case: -case[0])
    return [price() for _, price in cases[:MAX_PRICED]], max(len(cases) - MAX_PRICED, 0)


def _without_pin(problem: AllocationProblem, result: AllocationResult, item: int) -> ConstraintPrice:
    assert problem.fixed_choice is not None
    fixed = problem.fixed_choice.copy()
    fixed[item] = FREE
    return _price(replace(problem, fixed=fixed), result, "fixed", (_plain(problem.item_name(item)),))


def _without_tie(problem: AllocationProblem, result: AllocationResult, members: NDArray[np.int64]) -> ConstraintPrice:
    assert problem.tie_labels is not None
    labels = problem.tie_labels.copy()
    labels[members] = FREE
    names = tuple(_plain(problem.item_name(int(item))) for item in members)
    return _price(replace(problem, ties=labels), result, "tie", names)


def _price(without: AllocationProblem, result: AllocationResult, kind: str, items: tuple[str, ...]) -> ConstraintPrice:
    free = solve(without)
    proven = free.status == result.status == "optimal"
    return ConstraintPrice(kind=kind, items=items, price=result.loss - free.loss, proven=proven)
