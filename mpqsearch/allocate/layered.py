"""Constraints on the channels of a layer: exact in two levels.

All channels of a layer have one size, so a layer's cost depends only on how many width steps (ticks) its channels take
together. Inside a layer the least loss for every total of ticks is a curve; between layers a point of every curve is
chosen by the exact engine. Where all channels are convex the curve is the sorted list of their marginal losses; where
they are not, its missing points are closed one by one with an exactly filled knapsack of unit sizes. Overheads and
limits on distinct choices turn a layer's curve into several: one for every set of choices it may use. Several budgets
change nothing inside a layer as long as each follows its width; between layers they take their own solver.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import budgets, closing, mckp, passes
from mpqsearch.allocate.problem import WIDTH_SLIP, Floats, Integers, LayerRules

MAX_CLOSED_POINTS = 256
"""Points of one curve that are closed exactly when every total is admissible."""

CONVEX_SLIP = 8 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Least loss of one layer for totals of ticks, using only some choices.

    Attributes:
        ticks: ``[t]`` totals.
        loss: ``[t]`` least losses.
        costs: One ``[t]`` vector of costs per budget, overheads included.
        choices: The choices that the channels may use.
        complete: Whether every admissible total is in ``ticks``.
    """

    ticks: NDArray[np.int64]
    loss: NDArray[np.float64]
    costs: tuple[NDArray[np.int64], ...]
    choices: tuple[int, ...]
    complete: bool


@dataclass(frozen=True, slots=True, eq=False)
class LayerSolution:
    """Outcome under layer rules; see ``budgets.BudgetSolution``."""

    choice: NDArray[np.int32] | None
    rates: tuple[float, ...]
    floor: float
    proven: bool
    infeasible: bool
    in_time: bool


class NotTwoLevelError(ValueError):
    """The channels of a layer differ in cost, or its cost is not determined by its mean width."""


class NoLayerOptionError(ValueError):
    """A layer's rules cannot be met; ``layer`` is its number."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"layer {layer}")
        self.layer = layer


class LayerBudgetError(ValueError):
    """Under the rules even the smallest total of budget ``number`` is ``smallest``, above its limit."""

    def __init__(self, number: int, smallest: int) -> None:
        super().__init__(f"budget {number}: the smallest attainable cost is {smallest}")
        self.number, self.smallest = number, smallest


def solve_layers(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    rules: LayerRules,
    *,
    gap_tolerance: float = 0.0,
    deadline: float = float("inf"),
) -> LayerSolution:
    """Minimize the total loss within all budgets and the layer rules; overheads belong to the first budget.

    Raises:
        NotTwoLevelError: The costs do not have the form that two levels need.
        NoLayerOptionError: One layer's rules cannot be met whatever the budget.
        LayerBudgetError: A budget cannot be met even by itself.
    """
    members = _members(rules)
    grid = _grid(rules)
    layers = [_Layer(number, rows, loss, costs, rules, grid) for number, rows in enumerate(members) if rows.size]
    curves = [layer.curves() for layer in layers]
    outer_loss, outer_costs = _outer_tables(curves, len(costs))
    for number, (cost, limit) in enumerate(zip(outer_costs, limits, strict=True)):
        smallest = mckp.smallest_cost(outer_loss, cost)
        if smallest > limit:
            raise LayerBudgetError(number, smallest)
    complete = all(curve.complete for layer_curves in curves for curve in layer_curves)
    outer = _solve_outer(outer_loss, outer_costs, limits, gap_tolerance, deadline)
    if outer.choice is None:
        return LayerSolution(None, outer.rates, outer.bound, False, outer.infeasible and complete, outer.in_time)
    choice = np.zeros(len(loss), dtype=np.int32)
    for layer, layer_curves, picked in zip(layers, curves, outer.choice, strict=True):
        choice[layer.rows] = layer.choice_at(*_locate(layer_curves, int(picked)))
    floor = outer.floor if complete else outer.bound
    return LayerSolution(choice, outer.rates, floor, outer.proven and complete, False, outer.in_time)


def _solve_outer(
    loss: NDArray[np.float64],
    costs: tuple[NDArray[np.int64], ...],
    limits: tuple[int, ...],
    gap_tolerance: float,
    deadline: float,
) -> budgets.BudgetSolution:
    """One point of every layer's curves: the exact engine for one budget, dual and integer program for several."""
    if len(costs) > 1:
        return budgets.solve_budgets(loss, costs, limits, gap_tolerance=gap_tolerance, deadline=deadline)
    one = mckp.solve_table(loss, costs[0], limits[0], gap_tolerance=gap_tolerance, deadline=deadline)
    return budgets.BudgetSolution(one.choice, (one.rate,), one.dual_bound, one.floor, one.proven, False, one.in_time)


def _members(rules: LayerRules) -> list[NDArray[np.int64]]:
    """Items of every layer."""
    order = np.argsort(rules.layer, kind="stable")
    edges = np.searchsorted(rules.layer[order], np.arange(rules.n_layers + 1))
    return [order[first:last] for first, last in itertools.pairwise(edges)]


def _as_slice(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Consecutive rows as a slice: no gather where a layer's channels stand together, as they usually do."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if last - first == len(rows) else rows


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """Widths as whole ticks: width = origin + unit * tick."""

    tick: NDArray[np.int64]
    origin: Fraction
    unit: Fraction


def _grid(rules: LayerRules) -> _Grid | None:
    """The grid of widths, or None when no rule speaks of widths."""
    if rules.average is rules.average_step is rules.average_min is rules.average_max is None:
        return None
    widths = [Fraction(float(width)).limit_denominator(10_000) for width in rules.width]
    origin = min(widths)
    common = math.lcm(*(width.denominator for width in widths))
    grain = math.gcd(*(int((width - origin) * common) for width in widths)) or 1
    unit = Fraction(grain, common)
    return _Grid(np.array([int((width - origin) / unit) for width in widths], dtype=np.int64), origin, unit)


def _outer_tables(
    curves: list[list[Curve]], n_budgets: int
) -> tuple[NDArray[np.float64], tuple[NDArray[np.int64], ...]]:
    """Losses, and costs by budget: one row per layer, one column per point of its curves."""
    columns = max(sum(curve.loss.size for curve in layer) for layer in curves)
    loss = np.full((len(curves), columns), np.inf)
    costs = tuple(np.zeros((len(curves), columns), dtype=np.int64) for _ in range(n_budgets))
    for row, layer in enumerate(curves):
        values = np.concatenate([curve.loss for curve in layer])
        loss[row, : values.size] = values
        for number, cost in enumerate(costs):
            cost[row, : values.size] = np.concatenate([curve.costs[number] for curve in layer])
    return loss, costs


def _locate(curves: list[Curve], column: int) -> tuple[Curve, int]:
    for curve in curves:
        if column < curve.ticks.size:
            return curve, int(curve.ticks[column])
        column -= curve.ticks.size
    raise AssertionError("a column beyond the last curve")


@dataclass(slots=True, eq=False)
class _Layer:
    """One layer: its channels' tables, and what its rules admit."""

    number: int
    rows: NDArray[np.int64]
    loss_table: Floats
    cost_tables: tuple[Integers, ...]
    rules: LayerRules
    grid: _Grid | None
    loss: NDArray[np.float64] = field(init=False)
    tick: NDArray[np.int64] = field(init=False)
    prices: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        members = _as_slice(self.rows)
        self.loss = self.loss_table[members].astype(np.float64)
        costs = [table[self.rows[0]].astype(np.int64) for table in self.cost_tables]
        if any(bool((table[members] != cost).any()) for table, cost in zip(self.cost_tables, costs, strict=True)):
            raise NotTwoLevelError(f"the channels of layer {self.number} differ in cost")
        if self.grid is None:
            spread = costs[0] - costs[0].min()
            self.tick = spread // max(int(np.gcd.reduce(spread)), 1)
        else:
            self.tick = self.grid.tick
        self.prices = tuple(self._per_tick(cost) for cost in costs)

    def _per_tick(self, cost: NDArray[np.int64]) -> tuple[int, int]:
        """Cost of tick 0 and of every further tick in one budget."""
        low, high = int(np.argmin(self.tick)), int(np.argmax(self.tick))
        span = int(self.tick[high] - self.tick[low])
        slope, rest = divmod(int(cost[high] - cost[low]), span) if span else (0, 0)
        origin = int(cost[low]) - slope * int(self.tick[low])
        if rest or bool((origin + slope * self.tick != cost).any()):
            raise NotTwoLevelError(f"the cost of layer {self.number} does not follow its width")
        return origin, slope

    def curves(self) -> list[Curve]:
        """Curves of all sets of choices that can matter.

        Raises:
            NoLayerOptionError: No set admits anything.
        """
        found = [curve for choices in self._choice_sets() if (curve := self._curve(choices)) is not None]
        if not found:
            raise NoLayerOptionError(self.number)
        return found

    def _choice_sets(self) -> Iterator[tuple[int, ...]]:
        """All sets of choices that the rules admit and that no other one of the same overhead contains."""
        seen: set[tuple[int, ...]] = set()
        for pool in self._pools():
            widest = len(pool) if self.rules.max_distinct is None else min(self.rules.max_distinct, len(pool))
            sizes = [widest]
            if self.rules.choice_overhead is not None:
                sizes = list(range(1, widest + 1))
            elif self.rules.mixed_overhead is not None and widest > 1:
                sizes = [1, widest]
            for size in sizes:
                for choices in itertools.combinations(pool, size):
                    if choices not in seen:
                        seen.add(choices)
                        yield choices

    def _pools(self) -> Iterator[tuple[int, ...]]:
        """The largest sets of choices with no more different widths than are admitted."""
        values, which = np.unique(self.rules.width, return_inverse=True)
        most = len(values) if self.rules.max_widths is None else min(self.rules.max_widths, len(values))
        for admitted in itertools.combinations(range(len(values)), most):
            yield tuple(np.flatnonzero(np.isin(which, admitted)).tolist())

    def _overhead(self, choices: tuple[int, ...]) -> int:
        total = 0
        if self.rules.mixed_overhead is not None and len(choices) > 1:
            total += int(np.broadcast_to(self.rules.mixed_overhead, (self.rules.n_layers,))[self.number])
        if self.rules.choice_overhead is not None:
            total += int(self.rules.choice_overhead[self.number, list(choices)].sum())
        return total

    def _curve(self, choices: tuple[int, ...]) -> Curve | None:
        inner = _Inner(self.loss[:, choices], self.tick[list(choices)])
        if not inner.possible:
            return None
        ticks, loss, complete = inner.points(self._targets(inner.least, inner.most))
        if not ticks.size:
            return None
        costs = [origin * len(self.rows) + slope * ticks for origin, slope in self.prices]
        costs[0] = costs[0] + self._overhead(choices)
        return Curve(ticks, loss, tuple(costs), choices, complete)

    def _targets(self, least: int, most: int) -> NDArray[np.int64] | None:
        """Admissible totals of ticks between ``least`` and ``most``; None when all are."""
        if self.grid is None:
            return None
        low, high = (float(bounds[self.number]) for bounds in self.rules.average_bounds())
        count = len(self.rows)
        ticks = np.arange(least, most + 1)
        mean = float(self.grid.origin) + float(self.grid.unit) * ticks / count
        good = (mean >= low - WIDTH_SLIP) & (mean <= high + WIDTH_SLIP)
        if self.rules.average_step is not None:
            steps = mean / self.rules.average_step
            good &= np.abs(steps - np.round(steps)) <= WIDTH_SLIP
        return None if bool(good.all()) else ticks[good]

    def choice_at(self, curve: Curve, ticks: int) -> NDArray[np.int32]:
        """Choice of every channel at a point of a curve."""
        inner = _Inner(self.loss[:, curve.choices], self.tick[list(curve.choices)])
        return np.array(curve.choices, dtype=np.int32)[inner.choice_at(ticks)]


class _Inner:
    """Least loss of some channels, which all have the same tick per choice, for exact totals of ticks."""

    def __init__(self, loss: NDArray[np.float64], tick: NDArray[np.int64]) -> None:
        self.tick_order = np.argsort(tick, kind="stable")
        self.loss = loss[:, self.tick_order]
        self.tick = tick[self.tick_order]
        self.possible = bool(np.isfinite(self.loss).any(axis=1).all())
        if not self.possible:
            return
        finite = np.isfinite(self.loss)
        columns = np.arange(self.tick.size)
        self.least = int(self.tick[np.where(finite, columns, self.tick.size).min(axis=1)].sum())
        self.most = int(self.tick[np.where(finite, columns, -1).max(axis=1)].sum())
        self.convex = self._is_convex()

    def _is_convex(self) -> bool:
        """Unit steps and rising marginal losses in every channel: then sorting the marginals is exact."""
        if self.tick.size == 1:
            return True
        if bool((np.diff(self.tick) != 1).any()) or not bool(np.isfinite(self.loss).all()):
            return False
        bend = np.diff(self.loss, n=2, axis=1)
        slip = CONVEX_SLIP * np.abs(self.loss).max(axis=1, keepdims=True)
        return bool((bend >= -slip).all())

    def points(self, targets: NDArray[np.int64] | None) -> tuple[NDArray[np.int64], NDArray[np.float64], bool]:
        """Totals, least losses, and whether all targets (None: every total) were priced."""
        if self.convex:
            return self._convex_points(targets)
        wanted = np.arange(self.least, self.most + 1) if targets is None else targets
        vertex_ticks, vertex_loss = self._hull_curve()
        on_hull = np.isin(wanted, vertex_ticks)
        missing = wanted[~on_hull]
        complete = targets is not None or missing.size <= MAX_CLOSED_POINTS
        if not complete:
            missing = missing[:0]
        priced = np.concatenate([wanted[on_hull], missing])
        hull_part = vertex_loss[np.searchsorted(vertex_ticks, wanted[on_hull])]
        closed = np.array([self._loss_at(int(ticks)) for ticks in missing])
        loss = np.concatenate([hull_part, closed])
        good = np.isfinite(loss)
        return priced[good], loss[good], complete

    def _convex_points(self, targets: NDArray[np.int64] | None) -> tuple[NDArray[np.int64], NDArray[np.float64], bool]:
        marginal = np.sort(np.diff(self.loss, axis=1), axis=None)
        lowest = int(np.searchsorted(marginal, 0.0))
        curve = _curve_through(float(self.loss.min(axis=1).sum()), marginal, lowest)
        ticks = np.arange(self.least, self.most + 1) if targets is None else targets
        return ticks, curve[ticks - self.least], True

    def _hull_curve(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        steps = self._steps()
        rows = np.arange(len(self.loss))
        lowest = int(np.searchsorted(-steps.rate, 0.0))  # from here on steps raise the loss
        choice = steps.base.copy()
        choice[steps.item[:lowest]] = steps.to[:lowest]
        ticks = int(self.tick[steps.base].sum()) + np.concatenate([[0], np.cumsum(steps.size)])
        return ticks, _curve_through(float(self.loss[rows, choice].sum()), -steps.gain, lowest)

    def _steps(self) -> passes.HullSteps:
        sizes = np.broadcast_to(self.tick, self.loss.shape)
        return passes.hull_steps(passes.column_major(self.loss), passes.column_major(sizes), None, -np.inf)

    def _loss_at(self, ticks: int) -> float:
        choice = self._exact_choice(ticks)
        return np.inf if choice is None else float(self.loss[np.arange(len(self.loss)), choice].sum())

    def choice_at(self, ticks: int) -> NDArray[np.int64]:
        """Choice (in the order of the constructor's columns) of every channel for an exact total."""
        if self.convex:
            inner = self._convex_choice(ticks)
        else:
            found = self._exact_choice(ticks)
            assert found is not None, "a total that was priced is attainable"
            inner = found
        return self.tick_order[inner]

    def _convex_choice(self, ticks: int) -> NDArray[np.int64]:
        marginal = np.diff(self.loss, axis=1)
        # Rounding must not reorder a channel's own marginals.
        flat = np.maximum.accumulate(marginal, axis=1).ravel()
        count = ticks - self.least
        taken = np.zeros(flat.size, dtype=bool)
        taken[np.argsort(flat, kind="stable")[:count]] = True
        chosen: NDArray[np.int64] = taken.reshape(marginal.shape).sum(axis=1)
        return chosen

    def _exact_choice(self, ticks: int) -> NDArray[np.int64] | None:
        """Exactly filled knapsack of unit sizes: hull vertex below the total, closed by moves."""
        steps = self._steps()
        choice = steps.base.copy()
        used = int(self.tick[choice].sum()) + np.concatenate([[0], np.cumsum(steps.size)])
        taken = int(np.searchsorted(used, ticks, side="right")) - 1
        if taken < 0:
            return None
        choice[steps.item[:taken]] = steps.to[:taken]
        short = ticks - int(used[taken])
        if short == 0:
            return choice.astype(np.int64)
        if taken == steps.rate.size:
            return None
        rate = float(steps.rate[taken])
        sizes = passes.column_major(np.broadcast_to(self.tick, self.loss.shape))
        moves = passes.collect_moves(passes.column_major(self.loss), sizes, choice, rate, np.inf)
        moves = passes.subset(moves, np.flatnonzero(np.isfinite(moves.penalty)))
        closed = closing.close(moves, short, rate, excess=np.inf, tolerance=0.0, exact_fill=True)
        if not np.isfinite(closed.excess):
            return None
        choice[closed.item] = closed.choice
        return choice.astype(np.int64)


def _curve_through(bottom: float, change: NDArray[np.float64], lowest: int) -> NDArray[np.float64]:
    """Losses before and after every change, summed outwards from the lowest point so that small losses survive."""
    above = bottom + np.cumsum(change[lowest:])
    below = bottom - np.cumsum(change[:lowest][::-1])[::-1]
    return np.concatenate([below, [bottom], above])
