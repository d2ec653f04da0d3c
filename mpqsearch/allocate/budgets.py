"""Several budgets: the Lagrangian dual by cutting planes, then an integer program over the items near the break.

The dual is a concave piecewise linear function of one multiplier per budget. Every evaluation is one pass over the
tables and gives a value and a supergradient; a small linear program over the cuts proposes the next multipliers inside
a trust region. The choices that the final multipliers leave in doubt form the core; an integer program over the core,
everything else held, gives a solution. It is optimal when every left-out choice costs more than the remaining gap.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import ilp, passes
from mpqsearch.allocate.problem import Floats, Integers

MAX_EVALUATIONS = 80
"""Passes that the dual may take; two or three budgets need 20 to 45."""

DUAL_TOLERANCE = 1e-9
"""Relative distance between the best dual value and the cutting-plane model at which the ascent ends."""

CORE_SIZES = (24, 72, 216, 648)
"""Items in the core, tried in this order until the gap is small enough."""

ROUNDING = 1e-13
"""A gap below this share of the loss cannot be told from rounding."""

SAMPLE_ITEMS = 8_192
"""Items of the sample on which the ascent of a large problem starts."""

REPAIR_ITEMS = 4_096
"""Items nearest to a change of mind that the first repair may change."""

REPAIR_MOVES = 400
"""Changes after which the repair gives up."""

PATIENCE_S = 30.0
"""Seconds for all core programs together when the caller sets no time limit."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The dual at some multipliers: its value, the minimizers and what they use of every budget."""

    value: float
    choice: NDArray[np.int32]
    loss: float
    used: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BudgetSolution:
    """Outcome for several budgets; ``choice`` is None when no feasible choice was found.

    Attributes:
        choice: ``[n]`` best choice found.
        rates: Multiplier of every budget.
        bound: The dual's value at ``rates``.
        floor: Proven lower bound, at least ``bound``.
        proven: Whether ``choice`` is optimal.
        infeasible: Whether it is proven that nothing meets all budgets.
        in_time: Whether the search ended by itself.
    """

    choice: NDArray[np.int32] | None
    rates: tuple[float, ...]
    bound: float
    floor: float
    proven: bool
    infeasible: bool
    in_time: bool


def solve_budgets(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    *,
    known: NDArray[np.int32] | None = None,
    solver: str = "highs",
    gap_tolerance: float = 0.0,
    deadline: float = float("inf"),
) -> BudgetSolution:
    """Minimize the total loss within all budgets.

    Args:
        loss: ``[n, k]``, infinite where forbidden.
        costs: One ``[n, k]`` table per budget.
        limits: One limit per budget; each attainable by itself.
        known: A feasible choice, if one is known.
        solver: PuLP solver of the core programs.
        gap_tolerance: Stop at this relative gap.
        deadline: ``time.perf_counter()`` value at which to return the best found.
    """
    rates, best = maximize_dual(loss, costs, limits, max(DUAL_TOLERANCE, gap_tolerance / 20), deadline)
    if all(used <= limit for used, limit in zip(best.used, limits, strict=True)):
        known = _better(loss, known, best.choice)
    patience = min(deadline, time.perf_counter() + PATIENCE_S)
    return _close(loss, costs, limits, rates, best, known, solver, gap_tolerance, patience, deadline)


def evaluate_dual(
    loss: Floats, costs: tuple[Integers, ...], limits: tuple[int, ...], rates: NDArray[np.float64]
) -> Evaluation:
    """One pass: value and minimizers of the Lagrangian at ``rates``."""
    choice = np.empty(len(loss), dtype=np.int32)
    total, used = 0.0, np.zeros(len(costs), dtype=np.int64)
    for part in passes.blocks(loss):
        priced = loss[part].T.astype(np.float64)
        for cost, rate in zip(costs, rates, strict=True):
            priced += rate * cost[part].T
        chosen = np.argmin(priced, axis=0)
        rows = np.arange(len(chosen))
        choice[part] = chosen
        total += float(loss[part][rows, chosen].sum(dtype=np.float64))
        used += [int(cost[part][rows, chosen].sum(dtype=np.int64)) for cost in costs]
    slack = np.array([int(spent) - limit for spent, limit in zip(used, limits, strict=True)], dtype=np.float64)
    return Evaluation(total + float(rates @ slack), choice, total, used)


def maximize_dual(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    tolerance: float = DUAL_TOLERANCE,
    deadline: float = float("inf"),
) -> tuple[NDArray[np.float64], Evaluation]:
    """Multipliers of the best Lagrangian bound; a large problem starts from the multipliers of a sample of its
    items."""
    n = len(loss)
    start, radius = np.zeros(len(costs)), 1.0
    if n > 4 * SAMPLE_ITEMS:
        edges = np.linspace(0, n, SAMPLE_ITEMS + 1).astype(np.int64)
        picked = edges[:-1] + (np.random.default_rng(0).random(SAMPLE_ITEMS) * np.diff(edges)).astype(np.int64)
        share = tuple(limit * SAMPLE_ITEMS // n for limit in limits)
        part = tuple(cost[picked] for cost in costs)
        start, _ = _ascend(loss[picked], part, share, start, radius, 1e-5, deadline)
        radius = 0.05
    return _ascend(loss, costs, limits, start, radius, tolerance, deadline)


def _ascend(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    start: NDArray[np.float64],
    reach: float,
    tolerance: float,
    deadline: float,
) -> tuple[NDArray[np.float64], Evaluation]:
    """Kelley's cutting planes in a trust region around the best multipliers so far.

    Works in prices of a whole budget (rate * limit) divided by the scale of the losses, so that neither the unit of a
    budget nor the size of the losses matters to the linear program. ``reach`` is the first radius, relative to the
    start (or to the scale, where the start is zero).
    """
    scale = _loss_range(loss)
    if scale < float(np.finfo(np.float64).tiny):  # all choices lose the same: no multiplier can raise the bound
        zero = np.zeros(len(costs))
        return zero, evaluate_dual(loss, costs, limits, zero)
    unit = scale / np.maximum(np.array(limits, dtype=np.float64), 1.0)
    centre = start / unit
    radius = reach * max(float(centre.max()), 1.0 if not centre.any() else 0.0)
    best = evaluate_dual(loss, costs, limits, start)
    planes = [_plane(best, limits, centre, scale)]
    for _ in range(MAX_EVALUATIONS):
        point, model = ilp.maximize_planes(planes, np.maximum(centre - radius, 0.0), centre + radius)
        promised = model - best.value / scale
        reached_edge = bool((np.abs(point - centre) >= radius * (1 - 1e-9)).any())
        if time.perf_counter() > deadline or (not reached_edge and promised <= tolerance * abs(best.value) / scale):
            break
        if promised <= tolerance * abs(best.value) / scale:  # nothing more in this box: look in a wider one
            radius *= 4.0
            continue
        found = evaluate_dual(loss, costs, limits, point * unit)
        planes.append(_plane(found, limits, point, scale))
        gained = (found.value - best.value) / scale
        if gained <= 0:
            radius /= 2
            continue
        centre, best = point, found
        radius *= 2.0 if reached_edge and gained > promised / 4 else 1.0
    return centre * unit, best


def _loss_range(loss: Floats) -> float:
    """Largest sum of losses minus the smallest, over permitted choices: no multiplier needs to buy more than this."""
    finite = np.isfinite(loss)
    largest = np.where(finite, loss, -np.inf).max(axis=1).astype(np.float64)
    return float((largest - loss.min(axis=1)).sum())


def _plane(
    found: Evaluation, limits: tuple[int, ...], point: NDArray[np.float64], scale: float
) -> tuple[float, NDArray[np.float64]]:
    """Value at zero and slope of the dual's tangent plane, in the scaled prices."""
    slope = np.array(
        [(int(used) - limit) / max(limit, 1) for used, limit in zip(found.used, limits, strict=True)], dtype=np.float64
    )
    return found.value / scale - float(slope @ point), slope


def _better(loss: Floats, first: NDArray[np.int32] | None, second: NDArray[np.int32]) -> NDArray[np.int32]:
    if first is None:
        return second
    rows = np.arange(len(loss))
    totals = [float(loss[rows, choice].sum(dtype=np.float64)) for choice in (first, second)]
    return first if totals[0] <= totals[1] else second


def _close(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    rates: NDArray[np.float64],
    dual: Evaluation,
    known: NDArray[np.int32] | None,
    solver: str,
    gap_tolerance: float,
    patience: float,
    deadline: float,
) -> BudgetSolution:
    """Core programs of growing size until the gap is closed."""
    rows = np.arange(len(loss))
    penalty = _penalties(loss, costs, rates, dual.choice)
    doubt = (
        np.partition(np.where(penalty > 0, penalty, np.inf), 0, axis=1)[:, 0] if penalty.shape[1] > 1 else penalty[:, 0]
    )
    doubt = np.where((penalty == 0).sum(axis=1) > 1, 0.0, doubt)
    order = np.argsort(doubt, kind="stable")
    if known is None:
        known = _repaired(costs, limits, dual, penalty, order[:REPAIR_ITEMS])
    rate_tuple = tuple(float(rate) for rate in rates)

    def loss_of(choice: NDArray[np.int32] | None) -> float:
        return np.inf if choice is None else float(loss[rows, choice].sum(dtype=np.float64))

    def answer(*, proven: bool = False, infeasible: bool = False, floor: float = -np.inf) -> BudgetSolution:
        floor = loss_of(known) if proven else max(floor, dual.value)
        in_time = time.perf_counter() < deadline
        return BudgetSolution(known, rate_tuple, dual.value, floor, proven, infeasible, in_time)

    sizes = [size for size in CORE_SIZES if size < len(loss)] + [len(loss)]
    for size in sizes:
        excess = loss_of(known) - dual.value
        if known is not None and excess <= max(gap_tolerance, ROUNDING) * abs(loss_of(known)):
            return answer(proven=excess <= ROUNDING * abs(loss_of(known)))
        if time.perf_counter() > patience or size > 20_000:
            break
        open_cells = penalty <= excess
        needed = int((open_cells.sum(axis=1) > 1).sum())
        core = order[: min(size, max(needed, 1)) if np.isfinite(excess) else size]
        enough = gap_tolerance / 4 * abs(dual.value)
        result = _solve_core(loss, costs, limits, dual, core, open_cells, known, solver, enough, patience)
        if result.choice is not None and loss_of(result.choice) < loss_of(known):
            known = result.choice
        everything = core.size >= needed if np.isfinite(excess) else core.size == len(loss)
        if everything and (result.proven or (result.infeasible and known is not None)):
            return answer(proven=enough == 0, floor=loss_of(known) - enough)
        if everything and result.infeasible:
            return answer(infeasible=True)
    return answer()


def _repaired(
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    dual: Evaluation,
    penalty: NDArray[np.float64],
    items: NDArray[np.int64],
) -> NDArray[np.int32] | None:
    """The dual's minimizers brought within all budgets by the changes that cost least per violation removed, or
    None."""
    unit = 1.0 / np.maximum(np.array(limits, dtype=np.float64), 1.0)
    tables = [cost[items].astype(np.int64) for cost in costs]
    choice, rows = dual.choice[items].copy(), np.arange(len(items))
    over = dual.used - np.array(limits, dtype=np.int64)
    for _ in range(REPAIR_MOVES):
        if not bool((over > 0).any()):
            repaired = dual.choice.copy()
            repaired[items] = choice
            return repaired
        growth = [table - table[rows, choice][:, None] for table in tables]
        left = sum(np.maximum(excess + grown, 0) * one for excess, grown, one in zip(over, growth, unit, strict=True))
        removed = float((np.maximum(over, 0) * unit).sum()) - left
        price = penalty[items] - penalty[items, choice][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where((removed > 0) & np.isfinite(price), price / removed, np.inf)
        item, to = np.unravel_index(int(np.argmin(rate)), rate.shape)
        if not np.isfinite(rate[item, to]):
            return None
        over = over + np.array([int(grown[item, to]) for grown in growth])
        choice[item] = to
    return None


def _penalties(
    loss: Floats, costs: tuple[Integers, ...], rates: NDArray[np.float64], choice: NDArray[np.int32]
) -> NDArray[np.float64]:
    """What every choice costs beyond the minimizer at ``rates``."""
    priced = loss.astype(np.float64)
    for cost, rate in zip(costs, rates, strict=True):
        priced += rate * cost
    penalty: NDArray[np.float64] = np.maximum(priced - priced[np.arange(len(loss)), choice][:, None], 0.0)
    return penalty


def _solve_core(
    loss: Floats,
    costs: tuple[Integers, ...],
    limits: tuple[int, ...],
    dual: Evaluation,
    core: NDArray[np.int64],
    open_cells: NDArray[np.bool_],
    known: NDArray[np.int32] | None,
    solver: str,
    enough: float,
    patience: float,
) -> ilp.IlpAnswer:
    """Integer program over the core items; all others keep the dual's minimizers."""
    core_loss = np.where(open_cells[core], loss[core].astype(np.float64), np.inf)
    held = dual.used - [int(cost[core, dual.choice[core]].sum(dtype=np.int64)) for cost in costs]
    room = tuple(limit - int(spent) for limit, spent in zip(limits, held, strict=True))
    core_costs = tuple(cost[core].astype(np.int64) for cost in costs)
    held_loss = dual.loss - float(loss[core, dual.choice[core]].sum(dtype=np.float64))
    reference = None
    if known is not None:
        reference = float(loss[np.arange(len(loss)), known].sum(dtype=np.float64)) - held_loss
    answer = ilp.solve_ilp(
        core_loss,
        core_costs,
        room,
        reference=reference,
        solver=solver,
        gap=enough,
        time_limit_s=ilp.remaining(patience),
    )
    if answer.choice is None:
        return answer
    full = dual.choice.copy()
    full[core] = answer.choice
    fits = all(
        int(cost[np.arange(len(loss)), full].sum(dtype=np.int64)) <= limit
        for cost, limit in zip(costs, limits, strict=True)
    )
    return ilp.IlpAnswer(full if fits else None, proven=answer.proven and fits, infeasible=False)
