"""Streaming passes over the tables: compiled where ``backend`` says so, otherwise in numpy, which is the reference.

Every function reads ``loss [n, k]`` (infinite where forbidden) and ``cost [n, k]`` block by block, so the memory
beside the tables is bounded however large n is. ``rate`` is always a Lagrange multiplier in loss per unit of cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.backend import kernels
from mpqsearch.allocate.problem import Floats, Integers

BLOCK_CELLS = 1 << 18
"""Cells per block: a few float64 temporaries of this size stay in the second-level cache."""

WIDE_CHOICES = 64
"""Choices from which sorting them pays."""

PAIRED_CELLS = 1 << 14
"""Pairs of choices of the same item up to which hulls are read off a table of all pairs."""

GOLDEN = (5**0.5 - 1) / 2
"""The fractional parts of its multiples fill the unit interval evenly at every length: a shuffle that needs no
generator."""


@dataclass(frozen=True, slots=True, eq=False)
class Bracketed:
    """The minimizers at a low and at a high rate.

    Attributes:
        choice: ``[n]`` minimizer of loss + high * cost.
        unsettled: Items whose minimizer differs between the two rates; all others keep it for every rate between.
        cost_low: Total cost of the minimizers at the low rate (the larger total).
        cost_high: Total cost of the minimizers at the high rate.
        settled_cost: Total cost of the settled items.
        settled_loss: Total loss of the settled items.
    """

    choice: NDArray[np.int32]
    unsettled: NDArray[np.int64]
    cost_low: int
    cost_high: int
    settled_cost: int
    settled_loss: float


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Departures from a base choice that cost little at a given rate.

    Attributes:
        item: ``[m]`` item of the move.
        choice: ``[m]`` choice that it takes.
        penalty: ``[m]`` increase of loss + rate * cost, >= 0.
        size: ``[m]`` increase of the cost, never 0.
    """

    item: NDArray[np.int64]
    choice: NDArray[np.int32]
    penalty: NDArray[np.float64]
    size: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class HullSteps:
    """Steps along the lower convex hulls of all items, steepest first.

    Attributes:
        base: ``[n]`` cheapest choice of every item (of equal costs the one with the least loss).
        item: ``[m]`` item that takes the step.
        to: ``[m]`` choice after the step.
        size: ``[m]`` increase of the cost, > 0.
        gain: ``[m]`` decrease of the loss, > 0.
        rate: ``[m]`` gain per unit of cost, never increasing.
    """

    base: NDArray[np.int32]
    item: NDArray[np.int64]
    to: NDArray[np.int32]
    size: NDArray[np.int64]
    gain: NDArray[np.float64]
    rate: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """Choices after all hull steps, steepest first, that fit a budget.

    Attributes:
        choice: ``[n]`` choice of every item.
        fits: Whether the base itself did.
        step: Item, choice after it, size and rate of the first step that did not fit; None when all did.
    """

    choice: NDArray[np.int32]
    fits: bool
    step: tuple[int, int, int, float] | None


def blocks(loss: Floats) -> Iterator[slice]:
    """Slices of items that cover the table."""
    step = max(1, BLOCK_CELLS // loss.shape[1])
    return (slice(start, min(start + step, len(loss))) for start in range(0, len(loss), step))


def bracket(loss: Floats, cost: Integers, low: float, high: float) -> Bracketed:
    """Minimizers at both ends of a bracket of rates, in one pass."""
    if compiled := kernels(loss.size):
        choice, rest, *costs, settled_loss = compiled.bracket(loss, cost, float(low), float(high))
        cost_low, cost_high, settled_cost = (int(total) for total in costs)
        return Bracketed(choice, rest, cost_low, cost_high, settled_cost, float(settled_loss))
    choice = np.empty(len(loss), dtype=np.int32)
    unsettled: list[NDArray[np.int64]] = []
    cost_low = cost_high = settled_cost = 0
    settled_loss = 0.0
    for part in blocks(loss):
        loss_part, cost_part = loss[part].astype(np.float64), cost[part]
        at_low = np.argmin(loss_part + low * cost_part, axis=1)
        at_high = np.argmin(loss_part + high * cost_part, axis=1)
        rows = np.arange(len(at_low))
        sizes_high = cost_part[rows, at_high]
        settled = at_low == at_high
        cost_low += int(cost_part[rows, at_low].sum(dtype=np.int64))
        cost_high += int(sizes_high.sum(dtype=np.int64))
        settled_cost += int(sizes_high[settled].sum(dtype=np.int64))
        settled_loss += float(loss_part[rows, at_high][settled].sum())
        choice[part] = at_high
        unsettled.append(np.flatnonzero(~settled) + part.start)
    joined = np.concatenate(unsettled) if unsettled else np.empty(0, dtype=np.int64)
    return Bracketed(choice, joined, cost_low, cost_high, settled_cost, settled_loss)


def collect_moves(loss: Floats, cost: Integers, base: Integers, rate: float, threshold: float) -> Moves:
    """All departures from ``base`` whose penalty at ``rate`` is at most ``threshold``."""
    if compiled := kernels(loss.size):
        return Moves(*compiled.moves(loss, cost, base, float(rate), float(threshold)))
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]] = []
    for part in blocks(loss):
        loss_part, cost_part, base_part = loss[part].astype(np.float64), cost[part].astype(np.int64), base[part]
        rows = np.arange(len(base_part))
        value = loss_part + rate * cost_part
        size = cost_part - cost_part[rows, base_part][:, None]
        penalty = np.maximum(value - value[rows, base_part][:, None], 0.0)  # the base is a minimizer up to rounding
        item, choice = np.nonzero((penalty <= threshold) & (size != 0))
        found.append((item + part.start, choice, penalty[item, choice], size[item, choice]))
    joined = [np.concatenate(arrays) for arrays in zip(*found, strict=True)] if found else [np.empty(0)] * 4
    return Moves(
        joined[0].astype(np.int64),
        joined[1].astype(np.int32),
        joined[2].astype(np.float64),
        joined[3].astype(np.int64),
    )


def near_moves(
    loss: Floats, cost: Integers, items: Integers, base: Integers, rate: float, slack: int, excess: float, most: int
) -> Moves:
    """Of some items the ``most`` departures from ``base`` that cost least per unit and could be part of a solution
    within ``slack`` that exceeds the Lagrangian bound by less than ``excess``.
    """
    if compiled := kernels(loss.size):
        values, sizes = by_choice(loss, cost, items)
        item, to, penalty, size = compiled.near_moves(
            values, sizes, base[items], float(rate), int(slack), float(excess), most
        )
        return Moves(np.asarray(items, dtype=np.int64)[item], to, penalty, size)
    near_loss, near_cost = gather(loss, cost, items)
    moves = collect_moves(near_loss, near_cost, base[items], rate, excess)
    if moves.item.size > most:
        moves = subset(moves, np.sort(np.argpartition(moves.penalty / np.abs(moves.size), most)[:most]))
    return Moves(np.asarray(items, dtype=np.int64)[moves.item], moves.choice, moves.penalty, moves.size)


def subset(moves: Moves, kept: Integers) -> Moves:
    """Some of the moves."""
    return Moves(moves.item[kept], moves.choice[kept], moves.penalty[kept], moves.size[kept])


def cheapest(loss: Floats, cost: Integers) -> NDArray[np.int32]:
    """Cheapest permitted choice of every item; of equal costs the one with the least loss."""
    if compiled := kernels(loss.size):
        cheapest_choice: NDArray[np.int32] = compiled.cheapest(loss, cost)
        return cheapest_choice
    choice = np.empty(len(loss), dtype=np.int32)
    for part in blocks(loss):
        permitted = np.isfinite(loss[part])
        sizes = np.where(permitted, cost[part].astype(np.int64, copy=False), np.iinfo(np.int64).max)
        least = sizes == sizes.min(axis=1, keepdims=True)
        choice[part] = np.argmin(np.where(least & permitted, loss[part], np.inf), axis=1)
    return choice


def totals(loss: Floats, cost: Integers, choice: Integers) -> tuple[float, int]:
    """Total loss in float64 and exact total cost of ``choice``."""
    if compiled := kernels(loss.size):
        total, used = compiled.totals(loss, cost, choice)
        return float(total), int(used)
    rows = np.arange(len(loss))
    return float(loss[rows, choice].sum(dtype=np.float64)), int(cost[rows, choice].sum(dtype=np.int64))


def gather(loss: Floats, cost: Integers, rows: Integers) -> tuple[Floats, Integers]:
    """Rows of both tables in the layout of the fast path: Fortran order, read-only like the problem's own tables."""
    picked_loss, picked_cost = np.take(loss.T, rows, axis=1).T, np.take(cost.T, rows, axis=1).T
    picked_loss.flags.writeable = picked_cost.flags.writeable = False
    return picked_loss, picked_cost


def by_choice(
    loss: Floats, cost: Integers, rows: Integers | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Both tables, or some rows of them, as new ``[k, m]`` arrays: one layout, for which loops are compiled once."""
    losses, costs = (table.T if rows is None else np.take(table.T, rows, axis=1) for table in (loss, cost))
    return np.array(losses, dtype=np.float64, order="C"), np.array(costs, dtype=np.int64, order="C")


def fill(loss: Floats, cost: Integers, limit: int, base: Integers | None = None, low: float = 0.0) -> Filled:
    """Take the hull steps of all items from ``base`` (see ``hull_steps``) until one exceeds ``limit``."""
    base = cheapest(loss, cost) if base is None else np.ascontiguousarray(base, dtype=np.int32)
    slack = limit - totals(loss, cost, base)[1]
    compiled = kernels(loss.size)
    if compiled and loss.shape[1] <= WIDE_CHOICES:
        choice, missed, item, to, size, rate = compiled.fill(*by_choice(loss, cost), base, float(low), slack)
        return Filled(choice, slack >= 0, None if missed < 0 else (int(item), int(to), int(size), float(rate)))
    steps = hull_steps(loss, cost, base, low)
    used = np.cumsum(steps.size)
    taken = int(np.searchsorted(used, slack, side="right")) if slack >= 0 else 0
    choice = steps.base.copy()
    choice[steps.item[:taken]] = steps.to[:taken]  # of repeated items numpy keeps the last assignment
    step = None
    if taken < len(used):
        step = (int(steps.item[taken]), int(steps.to[taken]), int(steps.size[taken]), float(steps.rate[taken]))
    return Filled(choice, slack >= 0, step)


def column_major(table: NDArray[Any]) -> NDArray[Any]:
    """The table with each choice's column contiguous, read-only: the layout that the compiled loops are fast on."""
    ordered = np.asfortranarray(table).view()
    ordered.flags.writeable = False
    return ordered


def hull_steps(loss: Floats, cost: Integers, base: Integers | None = None, low: float = 0.0) -> HullSteps:
    """Lower hulls of all items by gift wrapping: the steps with a rate of at least ``low``.

    With ``low`` = 0 these are the steps that lower the loss; with minus infinity the whole hull, rising part included.
    Starts from ``base`` (a hull vertex of every item) or the cheapest choices. Needs no sorted costs, ignores dominated
    and duplicated choices, and skips collinear vertices.
    """
    base = cheapest(loss, cost) if base is None else np.ascontiguousarray(base, dtype=np.int32)
    compiled = kernels(loss.size)
    if loss.shape[1] > WIDE_CHOICES:
        walk = compiled.wide_hulls if compiled else wide_hulls
        item, to, size, gain, rate = walk(loss, cost, _by_cost(loss, cost), base, float(low))
    elif compiled:
        item, to, size, gain, rate = compiled.hulls(loss, cost, base, float(low))
    else:
        wrap = _wrapped_at_once if loss.size * loss.shape[1] <= PAIRED_CELLS else _gift_wrapping
        item, to, size, gain, rate = wrap(loss, cost, base, low)
    order = np.argsort(-rate, kind="stable")  # stable: of equal rates an item's earlier step stays first
    return HullSteps(base, item[order], to[order], size[order], gain[order], rate[order])


def _by_cost(loss: Floats, cost: Integers) -> NDArray[np.int64]:
    """Choices of every item by cost, of equal costs the one with the least loss first."""
    by_loss = np.argsort(loss, axis=1, kind="stable")
    then_cost = np.argsort(np.take_along_axis(cost, by_loss, axis=1), axis=1, kind="stable")
    return np.take_along_axis(by_loss, then_cost, axis=1)


def wide_hulls(loss: Any, cost: Any, order: Any, base: Any, low: float) -> Any:
    """Hull steps of items with hundreds of choices: one walk over the choices sorted by cost (a monotone chain).

    Plain loops, which ``kernels`` compiles; the same result as gift wrapping, whose time is quadratic in the choices.
    """
    n, k = loss.shape
    room = n * (k - 1)
    item, to = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int32)
    size, gain, rate = np.empty(room, dtype=np.int64), np.empty(room), np.empty(room)
    stack = np.empty(k, dtype=np.int64)
    count = 0
    for row in range(n):
        first = base[row]
        stack[0], top = first, 1
        for position in range(k):
            j = order[row, position]
            last = stack[top - 1]
            if loss[row, j] == np.inf or cost[row, j] <= cost[row, last]:
                continue
            while top > 1:
                last, before = stack[top - 1], stack[top - 2]
                rise = (loss[row, before] - loss[row, last]) / (cost[row, last] - cost[row, before])
                if rise > (loss[row, last] - loss[row, j]) / (cost[row, j] - cost[row, last]):
                    break
                top -= 1
            stack[top] = j
            top += 1
        steepest = np.inf
        for position in range(1, top):
            j, last = stack[position], stack[position - 1]
            wider = np.int64(cost[row, j]) - np.int64(cost[row, last])
            better = float(loss[row, last]) - float(loss[row, j])
            steepest = min(steepest, better / wider)
            if steepest < low or steepest <= 0.0 <= low:
                break
            item[count], to[count], size[count], gain[count], rate[count] = row, j, wider, better, steepest
            count += 1
    return item[:count], to[:count], size[:count], gain[:count], rate[:count]


def _gift_wrapping(loss: Floats, cost: Integers, base: Integers, low: float) -> tuple[NDArray[Any], ...]:
    """Item, choice, size, gain and rate of all hull steps; each round takes every item one vertex further."""
    rounds: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    rates: list[NDArray[np.float64]] = []
    item = np.arange(len(loss))
    at = base.astype(np.int64)
    last = np.full(len(loss), np.inf)
    table, sizes = loss.astype(np.float64), cost.astype(np.int64)
    while item.size:
        rows = np.arange(item.size)
        steepest, to, size, gain = _steepest(table, sizes, table[rows, at], sizes[rows, at])
        going = (steepest >= low) & (steepest > (0.0 if low >= 0 else -np.inf))
        kept = np.flatnonzero(going)
        item, at, table, sizes = item[kept], to[kept], table[kept], sizes[kept]
        # Rounding may let a later slope exceed an earlier one by an ulp; the order of an item's steps must survive.
        last = np.minimum(last[kept], steepest[kept])
        rounds.append((item, at, size[kept, at], gain[kept, at]))
        rates.append(last)
    if not rounds:
        return tuple(np.empty(0, dtype=kind) for kind in (np.int64, np.int32, np.int64, np.float64, np.float64))
    items, to_all, size_all, gain_all = (np.concatenate(arrays) for arrays in zip(*rounds, strict=True))
    return items, to_all.astype(np.int32), size_all, gain_all, np.concatenate(rates)


def _wrapped_at_once(loss: Floats, cost: Integers, base: Integers, low: float) -> tuple[NDArray[Any], ...]:
    """`_gift_wrapping` of a small table, where the time is that of numpy's calls and not of the arithmetic: the steps
    from every choice at once, so that a round only looks them up.
    """
    n, k = loss.shape
    table, sizes = loss.astype(np.float64), cost.astype(np.int64)
    steepest, to, size, gain = _steepest(table[:, None], sizes[:, None], table, sizes)
    start = np.arange(0, n * k, k)
    slope, following = (
        steepest.ravel(),
        (start[:, None] + to).ravel(),
    )  # by the choice before; choices are counted over all items
    going = (slope >= low) & (slope > (0.0 if low >= 0 else -np.inf))
    at, last = start + base, np.full(n, np.inf)
    left, rates = [at[:0]], [last[:0]]
    while at.size:
        kept = going[at]
        at = at[kept]
        last = np.minimum(last[kept], slope[at])
        left.append(at)
        rates.append(last)
        at = following[at]
    before = np.concatenate(left)
    item, choice = np.divmod(following[before], k)
    pair = before * k + choice
    return item, choice.astype(np.int32), size.ravel()[pair], gain.ravel()[pair], np.concatenate(rates)


def _steepest(loss: Floats, cost: Integers, from_loss: Floats, from_cost: Integers) -> tuple[NDArray[Any], ...]:
    """Steepest slope ``[...]`` from some loss and cost ``[...]`` to the choices ``[..., k]`` of larger cost, the
    farthest choice on it, and increase of the cost and decrease of the loss to every choice.
    """
    size = cost - from_cost[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = from_loss[..., None] - loss
        slope = np.where(size > 0, gain / size, -np.inf)
        steepest = slope.max(axis=-1)
    return steepest, np.argmax(np.where(slope == steepest[..., None], size, -1), axis=-1), size, gain
