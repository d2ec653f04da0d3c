"""Pairwise terms: iterated linearization and exchange moves, with a certified bound from a convex relaxation.

With x the one-hot vector of all choices the loss is c.x + x'Hx / 2, H zero inside an item's block. Blocks may be filled
freely: off their diagonal nothing is ever read (an item takes one choice), and what is put on the diagonal is taken
from c (x squared is x). A fill that makes H positive semidefinite makes the relaxation over the convex hull of all
affordable choices a convex program, whose Frank-Wolfe steps are separable allocation problems and give a lower bound.

Several budgets hold in the choices; the bound takes one budget that they imply, their sum weighted by the multipliers
of the last linearization.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import budgets, mckp, passes
from mpqsearch.allocate.problem import MAX_TOTAL, Floats, Integers, PairwiseTerms

ROUNDS = 60
"""Linearizations; the best choice seen rarely improves after a dozen."""

SWAP_CANDIDATES = 160
"""Single changes whose pairs are tried together."""

MAX_MOVES = 2_000
"""Exchange moves after a start."""

STARTS = 12
"""Vertices of the convex relaxation from which the exchange starts again."""

BOUND_STEPS = 2_000
"""Frank-Wolfe steps."""

COMPLETION_ROUNDS = 300
"""Rounds of the fill of the blocks."""

COMPLETION_RANK = 32
"""Rank of the couplings that the fill assumes; a higher true rank costs tightness, not validity."""

COMPLETION_TOLERANCE = 1e-6
"""Change of the (scaled) blocks at which the fill ends."""

DENSE_CELLS = 6_000
"""Up to so many cells (items times choices) the coupling matrix is held densely."""


SEPARABLE_GAP = 1e-4
"""Relative gap at which a linearization is solved well enough."""

SEPARABLE_GAP_OF_SEVERAL = 2e-3
"""The same under several budgets, where closing a gap takes an integer program; the exchange does the rest."""

WEIGHT_BITS = 20
"""Precision of the weights of the implied budget."""


@dataclass(frozen=True, slots=True, eq=False)
class PairwiseSolution:
    """Outcome: best choice found, its loss, and a lower bound (minus infinity when none is known)."""

    choice: NDArray[np.int32]
    loss: float
    bound: float


class Couplings:
    """Loss of a choice and of every single change, under pairwise terms."""

    def __init__(self, loss: Floats, pairs: PairwiseTerms) -> None:
        self.loss = loss.astype(np.float64)
        self.pairs = pairs
        self.rows = np.arange(len(loss))

    def total(self, choice: Integers) -> float:
        """Loss of ``choice``."""
        terms = self.pairs.value[np.arange(len(self.pairs.first)), choice[self.pairs.first], choice[self.pairs.second]]
        return float(self.loss[self.rows, choice].sum() + terms.sum())

    def field(self, choice: Integers) -> NDArray[np.float64]:
        """``[n, k]``: loss of every choice of an item while all others stay; exact for single changes."""
        pairs, each = self.pairs, np.arange(len(self.pairs.first))
        field = self.loss.copy()
        np.add.at(field, pairs.first, pairs.value[each, :, choice[pairs.second]])
        np.add.at(field, pairs.second, pairs.value[each, choice[pairs.first], :])
        return field

    def matrix(self) -> NDArray[np.float64]:
        """``[n k, n k]`` symmetric coupling matrix H."""
        n, k = self.loss.shape
        blocks = np.zeros((n, k, n, k))
        for first, second, value in zip(self.pairs.first, self.pairs.second, self.pairs.value, strict=True):
            blocks[first, :, second, :] += value
            blocks[second, :, first, :] += value.T
        return blocks.reshape(n * k, n * k)


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """All budgets, and one that they imply (the only one, where there is one)."""

    costs: tuple[Integers, ...]
    limits: tuple[int, ...]
    cost: Integers
    limit: int

    def fit(self, choice: Integers) -> bool:
        """Whether a choice is within all budgets."""
        rows = np.arange(len(choice))
        return all(
            int(c[rows, choice].sum(dtype=np.int64)) <= limit for c, limit in zip(self.costs, self.limits, strict=True)
        )

    def solve(self, loss: Floats, gap_tolerance: float, deadline: float) -> budgets.BudgetSolution:
        """Best choice for separable losses."""
        if len(self.costs) > 1:
            return budgets.solve_budgets(loss, self.costs, self.limits, gap_tolerance=gap_tolerance, deadline=deadline)
        one = mckp.solve_table(loss, self.cost, self.limit, gap_tolerance=gap_tolerance, deadline=deadline)
        return budgets.BudgetSolution(
            one.choice, (one.rate,), one.dual_bound, one.floor, one.proven, False, one.in_time
        )


def implied_budget(
    costs: tuple[Integers, ...], limits: tuple[int, ...], rates: tuple[float, ...]
) -> tuple[NDArray[np.int64], int]:
    """A budget that every choice within all budgets keeps: their sum, weighted by whole numbers in proportion to
    ``rates``."""
    largest = max(rates)
    room = _largest_weight(costs, limits)
    weights = [
        max(round(rate / largest * room), 0) if largest > 0 else int(number == 0) for number, rate in enumerate(rates)
    ]
    joined = sum(weight * cost.astype(np.int64) for weight, cost in zip(weights, costs, strict=True))
    return np.asarray(joined, dtype=np.int64), sum(
        weight * limit for weight, limit in zip(weights, limits, strict=True)
    )


def _largest_weight(costs: tuple[Integers, ...], limits: tuple[int, ...]) -> int:
    """Largest weight with which the sum of all budgets still fits 64 bits."""
    total = sum(int(cost.max()) * len(cost) + limit for cost, limit in zip(costs, limits, strict=True))
    return max(min(1 << WEIGHT_BITS, MAX_TOTAL // max(total, 1)), 1)


def solve_pairwise(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    pairs: PairwiseTerms,
    *,
    convex: bool = True,
    gap_tolerance: float = 0.0,
    deadline: float = float("inf"),
) -> PairwiseSolution | None:
    """Good choice and lower bound; None when no choice within all budgets was found.

    Args:
        loss: ``[n, k]`` separable losses, infinite where forbidden.
        costs: One ``[n, k]`` table of integers per budget.
        limits: One limit per budget, each attainable by itself.
        pairs: Terms between different rows, one per pair of rows.
        convex: Whether to take the trouble of the convex bound.
        gap_tolerance: The bound is not improved beyond this relative gap.
        deadline: ``time.perf_counter()`` value at which to stop.

    Raises:
        mckp.BudgetTooSmallError: Nothing fits.
    """
    couplings = Couplings(loss, pairs)
    within = Limits(costs, limits, costs[0], limits[0])
    start, rates = _iterate_linearizations(couplings, within, deadline)
    if start is None:
        return None
    if len(costs) > 1:
        within = Limits(costs, limits, *implied_budget(costs, limits, rates))
    cost, limit = within.cost, within.limit
    choice = _exchange(couplings, within, start, deadline)
    total = couplings.total(choice)
    bound = _simple_bound(couplings, cost, limit)
    if convex and loss.size <= DENSE_CELLS and bool((couplings.loss >= 0).all()):
        relaxation, vertices = _convex_bound(couplings, cost, limit, total, gap_tolerance, deadline)
        bound = max(bound, relaxation)
        for vertex in vertices:
            if not within.fit(vertex):
                continue
            other = _exchange(couplings, within, vertex, deadline)
            if couplings.total(other) < total:
                choice, total = other, couplings.total(other)
    return PairwiseSolution(choice, total, min(bound, total))


def _iterate_linearizations(
    couplings: Couplings, within: Limits, deadline: float
) -> tuple[NDArray[np.int32] | None, tuple[float, ...]]:
    """Solve the separable problem whose losses are the averaged fields of the choices so far.

    Returns the best choice met and the multipliers of the last problem, which knows most of the terms.
    """
    several = len(within.costs) > 1
    found = within.solve(couplings.loss, SEPARABLE_GAP_OF_SEVERAL if several else 0.0, deadline)
    best, rates = found.choice, found.rates
    if best is None:
        return None, rates
    least, mean = couplings.total(best), couplings.field(best)
    allowed = np.isfinite(couplings.loss)  # what is not allowed stays infinite: the mean of infinities is no number
    seen = {best.tobytes()}
    for number in range(1, ROUNDS):
        if time.perf_counter() > deadline:
            break
        found = within.solve(mean, SEPARABLE_GAP_OF_SEVERAL if several else SEPARABLE_GAP, deadline)
        choice, rates = found.choice, found.rates
        if choice is None:
            break
        total = couplings.total(choice)
        if total < least:
            best, least = choice, total
        if choice.tobytes() in seen and number > ROUNDS // 4:
            break
        seen.add(choice.tobytes())
        mean[allowed] += (couplings.field(choice)[allowed] - mean[allowed]) / (number + 1)
    return best, rates


def _exchange(couplings: Couplings, within: Limits, start: Integers, deadline: float) -> NDArray[np.int32]:
    """Descend by single changes and pairs of changes until none helps."""
    choice = start.astype(np.int32).copy()
    lookup = _pair_lookup(couplings)
    rows = couplings.rows
    for _ in range(MAX_MOVES):
        if time.perf_counter() > deadline:
            break
        field = couplings.field(choice)
        gain = field - field[rows, choice][:, None]
        growths = [cost.astype(np.int64) - cost[rows, choice].astype(np.int64)[:, None] for cost in within.costs]
        slacks = [
            limit - int(c[rows, choice].sum(dtype=np.int64))
            for c, limit in zip(within.costs, within.limits, strict=True)
        ]
        implied = within.cost.astype(np.int64) - within.cost[rows, choice].astype(np.int64)[:, None]
        price = gain + _marginal_rate(gain, implied) * implied
        move = _best_single(gain, growths, slacks) or _best_pair(
            couplings, lookup, choice, gain, price, growths, slacks
        )
        if move is None:
            break
        for item, to in move:
            choice[item] = to
    return choice


Move = list[tuple[int, int]]


def _best_single(gain: NDArray[np.float64], growths: list[NDArray[np.int64]], slacks: list[int]) -> Move | None:
    fits = np.logical_and.reduce([growth <= slack for growth, slack in zip(growths, slacks, strict=True)])
    value = np.where(fits, gain, np.inf)
    item, to = np.unravel_index(int(np.argmin(value)), value.shape)
    return [(int(item), int(to))] if value[item, to] < -_slip(gain) else None


def _slip(gain: NDArray[np.float64]) -> float:
    """Gains below this are rounding."""
    finite = gain[np.isfinite(gain)]
    return 1e-13 * float(np.abs(finite).max(initial=0.0))


def _best_pair(
    couplings: Couplings,
    lookup: dict[tuple[int, int], int],
    choice: Integers,
    gain: NDArray[np.float64],
    price: NDArray[np.float64],
    growths: list[NDArray[np.int64]],
    slacks: list[int],
) -> Move | None:
    """Best affordable pair among the single changes that are cheapest at the marginal rate of the budget."""
    n, k = gain.shape
    price = np.where(np.isfinite(gain), price, np.inf)
    price[np.arange(n), choice] = np.inf
    flat = np.argsort(price, axis=None)[:SWAP_CANDIDATES]
    flat = flat[np.isfinite(price.ravel()[flat])]
    item, to = np.divmod(flat, k)
    value = gain[item, to][:, None] + gain[item, to][None, :]
    fits = item[:, None] != item[None, :]
    for growth, slack in zip(growths, slacks, strict=True):
        fits = fits & (growth[item, to][:, None] + growth[item, to][None, :] <= slack)
    value = np.where(fits, value, np.inf)
    value += _corrections(couplings, lookup, choice, item, to)
    if not value.size:
        return None
    first, second = np.unravel_index(int(np.argmin(value)), value.shape)
    if not value[first, second] < -_slip(gain):
        return None
    return [(int(item[first]), int(to[first])), (int(item[second]), int(to[second]))]


def _marginal_rate(gain: NDArray[np.float64], growth: NDArray[np.int64]) -> float:
    """Cheapest loss per unit of cost at which some item can be made smaller."""
    smaller = (growth < 0) & np.isfinite(gain)
    return float(max((gain[smaller] / -growth[smaller]).min(), 0.0)) if smaller.any() else 0.0


def _pair_lookup(couplings: Couplings) -> dict[tuple[int, int], int]:
    pairs = zip(couplings.pairs.first.tolist(), couplings.pairs.second.tolist(), strict=True)
    return {pair: number for number, pair in enumerate(pairs)}


def _corrections(
    couplings: Couplings, lookup: dict[tuple[int, int], int], choice: Integers, item: Integers, to: Integers
) -> NDArray[np.float64]:
    """What two changes cost together beyond the sum of the single ones."""
    count = len(item)
    number = np.full((count, count), -1, dtype=np.int64)
    for a, first in enumerate(item.tolist()):
        for b, second in enumerate(item.tolist()):
            number[a, b] = lookup.get((first, second), -1)
    rows, columns = np.nonzero(number >= 0)
    value = couplings.pairs.value[number[rows, columns]]
    each = np.arange(len(rows))
    here_a, here_b, to_a, to_b = choice[item[rows]], choice[item[columns]], to[rows], to[columns]
    joint = (
        value[each, to_a, to_b] - value[each, to_a, here_b] - value[each, here_a, to_b] + value[each, here_a, here_b]
    )
    correction = np.zeros((count, count))
    correction[rows, columns] = joint
    return correction + correction.T


def _simple_bound(couplings: Couplings, cost: Integers, limit: int) -> float:
    """Separable bound plus the least value of every pair."""
    separable = mckp.relax(passes.column_major(couplings.loss), passes.column_major(cost.astype(np.int64)), limit).bound
    return separable + float(
        couplings.pairs.value.min(axis=(1, 2), initial=np.inf).sum() if len(couplings.pairs.first) else 0.0
    )


def _convex_bound(
    couplings: Couplings, cost: Integers, limit: int, target: float, gap_tolerance: float, deadline: float
) -> tuple[float, list[NDArray[np.int32]]]:
    """Frank-Wolfe on the convexified loss: a lower bound, and the best vertices met as starts for the exchange.

    The bound at a point z is F(z) + least of gradient . (x - z), valid because F is convex and equals the loss on every
    one-hot x.
    """
    n, k = couplings.loss.shape
    permitted = np.isfinite(couplings.loss)
    linear = np.where(permitted, couplings.loss, 0.0).ravel()
    coupling = couplings.matrix() * np.outer(permitted.ravel(), permitted.ravel())
    quadratic, diagonal = _convexified(coupling, linear, n, k)
    linear = linear - diagonal / 2
    table_cost = passes.column_major(cost.astype(np.int64))

    def least(gradient: NDArray[np.float64]) -> mckp.Relaxed:
        table = np.where(permitted, gradient.reshape(n, k), np.inf)
        return mckp.relax(passes.column_major(table), table_cost, limit)

    point = _vertex(least(linear), k)
    image = quadratic @ point
    bound = -np.inf
    starts: list[tuple[float, int, NDArray[np.int32]]] = []
    for number in range(BOUND_STEPS):
        gradient = linear + image
        vertex = least(gradient)
        if number % 4 == 0:
            starts = sorted([*starts, (couplings.total(vertex.choice), number, vertex.choice)], key=lambda s: s[:2])[
                :STARTS
            ]
        value = float(linear @ point + point @ image / 2)
        bound = max(bound, value + vertex.bound - float(gradient @ point))
        if target - bound <= max(gap_tolerance, 1e-9) * abs(target) or time.perf_counter() > deadline:
            break
        step = _vertex(vertex, k) - point
        step_image = quadratic @ step
        slope, bend = float(gradient @ step), float(step @ step_image)
        if slope >= 0:
            break
        length = min(1.0, -slope / bend) if bend > 0 else 1.0
        point, image = point + length * step, image + length * step_image
    return bound, [choice for _, _, choice in starts]


def _vertex(relaxed: mckp.Relaxed, k: int) -> NDArray[np.float64]:
    """The linear relaxation's solution as a point: one-hot but for the item whose step fits only in part."""
    point = np.zeros((len(relaxed.choice), k))
    point[np.arange(len(point)), relaxed.choice] = 1.0
    if relaxed.step is not None:
        item, to, share = relaxed.step
        point[item, relaxed.choice[item]] -= share
        point[item, to] += share
    return point.ravel()


def _convexified(
    coupling: NDArray[np.float64], linear: NDArray[np.float64], n: int, k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fill the blocks so that the matrix is positive semidefinite; returns it and its diagonal.

    Works on the matrix scaled by the separable losses, in which all decades count alike. Couplings that come from error
    vectors have low rank: the leading eigenvectors predict the blocks, the blocks correct the eigenvectors. What is
    still negative in the end is lifted along the diagonal.
    """
    scale = np.sqrt(np.maximum(linear, linear.max(initial=0.0) * 1e-16 + np.finfo(np.float64).tiny))
    filled = coupling / np.outer(scale, scale)
    blocks = filled.reshape(n, k, n, k)
    each = np.arange(n)
    blocks[each, :, each, :] = 2.0 * np.eye(k)  # the loss of squared error vectors has twice the separable loss here
    rank = min(COMPLETION_RANK, n * k)
    basis = np.random.default_rng(0).standard_normal((n * k, rank))
    for _ in range(COMPLETION_ROUNDS):
        basis, _ = np.linalg.qr(filled @ basis)
        values, rotation = np.linalg.eigh(basis.T @ filled @ basis)
        factor = (basis @ rotation * np.sqrt(np.maximum(values, 0.0))).reshape(n, k, rank)
        predicted = factor @ factor.transpose(0, 2, 1)
        change = float(np.abs(blocks[each, :, each, :] - predicted).max(initial=0.0))
        blocks[each, :, each, :] = predicted
        if change <= COMPLETION_TOLERANCE:
            break
    lowest = float(np.linalg.eigvalsh(filled)[0])
    filled[np.diag_indices_from(filled)] += max(-lowest, 0.0) + 1e-14 * float(np.abs(filled).max()) * len(filled)
    quadratic = filled * np.outer(scale, scale)
    return quadratic, np.diagonal(quadratic).copy()
