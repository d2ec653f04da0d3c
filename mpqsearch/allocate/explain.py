"""Reading a solved map: what the next unit of budget would buy, what holds every item, what pins and ties cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.canonical import Tables, canonical_tables
from mpqsearch.allocate.dispatch import solve
from mpqsearch.allocate.problem import FREE, AllocationProblem, AllocationResult

MAX_PRICED = 32
"""Pins and tie groups that are priced by solving again without them."""


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
        slack: Main budget left unused.
        items: Every item or tie group, the best next step first.
        prices: What pins and ties cost, dearest first; at most ``MAX_PRICED`` of them.
    """

    shadow_price: float
    slack: int
    items: tuple[ItemExplanation, ...]
    prices: tuple[ConstraintPrice, ...]

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
    prices = sorted(_prices(problem, result), key=lambda price: -price.price) if price_constraints else []
    return Explanation(
        shadow_price=result.multiplier,
        slack=problem.limit - result.cost,
        items=tuple(sorted(items, key=lambda item: -item.rate_up)),
        prices=tuple(prices),
    )


def _row_names(problem: AllocationProblem, tables: Tables) -> list[tuple[str, ...]]:
    names: list[list[str]] = [[] for _ in range(len(tables.loss))]
    for item, row in enumerate(tables.item_row.tolist()):
        names[row].append(_plain(problem.item_name(item)))
    return [tuple(row) for row in names]


def _plain(name: str) -> str:
    return name.strip("'")


def _item_explanations(
    problem: AllocationProblem, tables: Tables, chosen: NDArray[np.int64], names: list[tuple[str, ...]]
) -> Iterator[ItemExplanation]:
    rows = np.arange(len(chosen))
    loss = tables.loss.astype(np.float64)
    growth = tables.cost.astype(np.int64) - tables.cost[rows, chosen].astype(np.int64)[:, None]
    gain = loss[rows, chosen][:, None] - loss
    permitted = np.isfinite(loss)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(permitted & (growth != 0), gain / growth, np.nan)
    up = np.where(growth > 0, rate, -np.inf)
    down = np.where(permitted & (growth < 0), rate, np.inf)
    best = up.argmax(axis=1)
    for row in rows:
        to = int(best[row])
        rises = bool(permitted[row, to]) and up[row, to] > 0
        yield ItemExplanation(
            items=names[row],
            choice=_plain(problem.choice_name(int(chosen[row]))),
            cost=int(tables.cost[row, chosen[row]]),
            loss=float(loss[row, chosen[row]]),
            next_choice=_plain(problem.choice_name(to)) if rises else None,
            gain=float(gain[row, to]) if rises else 0.0,
            extra_cost=int(growth[row, to]) if rises else 0,
            rate_up=float(up[row, to]) if rises else 0.0,
            rate_down=float(down[row].min()),
            holds=_holds(permitted[row], growth[row]),
        )


def _holds(permitted: NDArray[np.bool_], growth: NDArray[np.int64]) -> str:
    if permitted.sum() == 1:
        return "fixed"
    if not (permitted & (growth > 0)).any():
        return "at largest"
    return "free" if (permitted & (growth < 0)).any() else "at smallest"


def _prices(problem: AllocationProblem, result: AllocationResult) -> Iterator[ConstraintPrice]:
    """Solve again without each pin and each tie group."""
    left = MAX_PRICED
    if problem.fixed_choice is not None:
        for item in np.flatnonzero(problem.fixed_choice != FREE)[:left].tolist():
            fixed = problem.fixed_choice.copy()
            fixed[item] = FREE
            left -= 1
            yield _price(replace(problem, fixed=fixed), result, "fixed", (_plain(problem.item_name(item)),))
    if problem.tie_labels is not None:
        groups = np.unique(problem.tie_labels[problem.tie_labels != FREE])
        for group in groups[:left].tolist():
            members = np.flatnonzero(problem.tie_labels == group)
            labels = problem.tie_labels.copy()
            labels[members] = FREE
            names = tuple(_plain(problem.item_name(int(item))) for item in members)
            yield _price(replace(problem, ties=labels), result, "tie", names)


def _price(without: AllocationProblem, result: AllocationResult, kind: str, items: tuple[str, ...]) -> ConstraintPrice:
    free = solve(without)
    proven = free.status == result.status == "optimal"
    return ConstraintPrice(kind=kind, items=items, price=result.loss - free.loss, proven=proven)
