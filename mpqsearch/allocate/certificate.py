"""Checking an answer from the raw tables alone, by code that shares nothing with the solvers.

Two kinds of proof. The multipliers give a lower bound in one pass, which anyone can repeat. Where the result claims
more (a proven optimum), the claim is proven again: every choice outside the multipliers' minimizers has a penalty, a
better solution has less total penalty than the gap, and all such sets of choices are enumerated by their total cost.

Rules of layers are kept in both: the channels of a layer are joined to a curve of least losses over their mean width,
from their lower hulls, which no rule can lower. Very small problems of any kind are tried out whole. Where a claim is
larger than what is proven here (the bound of a branch and bound, or of a convex relaxation, leaves no short witness),
the check says what it did prove: ``verified_bound``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import WIDTH_SLIP, AllocationProblem, AllocationResult, LayerRules

ROUNDING = 1e-12
"""Relative disagreement between two float64 sums of the same losses that is put down to their order."""

MAX_STATES = 3_000_000
"""Partial solutions beyond which the enumeration gives up."""

NOTHING = -float("inf")

MAX_LAYER_CELLS = 20_000_000
"""Points of all layers' curves above which they are not built."""

MAX_TRIED = 3_000
"""Assignments of a problem that are simply all tried."""

Proof = Literal["dual", "search", "weaker", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateCheck:
    """Outcome of ``verify_certificate``; true when nothing contradicts the result.

    Attributes:
        problems: What does not hold, in words; empty when the certificate is valid.
        loss: Total loss, recomputed.
        costs: Totals of all budgets, recomputed.
        dual_bound: Lower bound that the multipliers prove, recomputed.
        proof: What the check itself established about ``lower_bound``: ``dual`` (the multipliers alone prove it),
            ``search`` (proven again by enumeration), ``none`` (nothing is claimed), or ``weaker``: nothing contradicts
            it, but only the smaller ``verified_bound`` was proven here.
        verified_bound: The largest lower bound that the check proved by itself; ``lower_bound`` unless ``weaker``.
    """

    problems: tuple[str, ...]
    loss: float
    costs: tuple[int, ...]
    dual_bound: float
    proof: Proof
    verified_bound: float = NOTHING

    @property
    def valid(self) -> bool:
        """Whether every claim of the result holds."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.valid


def verify_certificate(problem: AllocationProblem, result: AllocationResult) -> CertificateCheck:
    """Check choice, loss, costs, multipliers and bound of ``result`` against ``problem``."""
    if not problem.permits(result.choice):
        problems = ("the choice has the wrong shape or breaks allowed, fixed or ties",)
        return CertificateCheck(problems=problems, loss=float("nan"), costs=(), dual_bound=NOTHING, proof="none")
    loss, costs = problem.evaluate(result.choice)
    problems_found = []
    slip = ROUNDING * (abs(loss) + 1e-300)
    if abs(loss - result.loss) > slip:
        problems_found.append(f"loss is {loss}, the result says {result.loss}")
    for budget, cost in zip(problem.budgets, costs, strict=True):
        if cost != result.costs.get(budget.name):
            problems_found.append(f"{budget.name} is {cost}, the result says {result.costs.get(budget.name)}")
        if cost > budget.limit:
            problems_found.append(f"{budget.name} is {cost}, above the limit {budget.limit}")
    if costs[0] != result.cost:
        problems_found.append(f"cost is {costs[0]}, the result says {result.cost}")
    if any(not np.isfinite(rate) or rate < 0 for rate in result.multipliers):
        problems_found.append(f"multipliers {result.multipliers} are not all finite and >= 0")
        return CertificateCheck(
            problems=tuple(problems_found), loss=loss, costs=costs, dual_bound=NOTHING, proof="none"
        )
    dual = dual_bound(problem, result.multipliers)
    if abs(min(dual, loss) - result.dual_bound) > slip:
        problems_found.append(f"the multipliers prove {dual}, the result says {result.dual_bound}")
    if result.lower_bound > loss + slip:
        problems_found.append(f"lower bound {result.lower_bound} is above the loss {loss}")
    if result.status == "optimal" and result.lower_bound < loss - slip:
        problems_found.append(f"the status is optimal, the lower bound {result.lower_bound} is below the loss {loss}")
    proof, verified, better = _prove(problem, result, dual, slip)
    if better:
        problems_found.append(f"a choice with a smaller loss than the lower bound {result.lower_bound} exists")
    return CertificateCheck(
        problems=tuple(problems_found), loss=loss, costs=costs, dual_bound=dual, proof=proof, verified_bound=verified
    )


def dual_bound(problem: AllocationProblem, multipliers: tuple[float, ...]) -> float:
    """Lagrangian bound: loss + multipliers * (cost - limit) of the least priced choice of every tie group.

    Layer rules only restrict, so they are left out; pairs add at least their least value.
    """
    loss, costs = _grouped(problem)
    priced = loss + sum(rate * cost for rate, cost in zip(multipliers, costs, strict=True))
    rows = np.arange(len(priced))
    least = priced.argmin(axis=1)
    total = float(loss[rows, least].sum())
    for rate, cost, budget in zip(multipliers, costs, problem.budgets, strict=True):
        total += rate * (int(cost[rows, least].sum()) - budget.limit)
    if problem.pairwise is not None:
        total += float(
            problem.pairwise.value.min(axis=(1, 2), initial=np.inf).sum() if len(problem.pairwise.first) else 0
        )
    return total


def _grouped(problem: AllocationProblem) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    """Loss (infinite where nothing may be chosen) and costs with one row per tie group or free item."""
    permitted = np.ones(problem.loss.shape, dtype=bool) if problem.allowed is None else problem.allowed.copy()
    if problem.fixed_choice is not None:
        overrides = np.flatnonzero(problem.fixed_choice >= 0)
        permitted[overrides] = False
        permitted[overrides, problem.fixed_choice[overrides]] = True
    loss = np.where(permitted, problem.loss, np.inf).astype(np.float64)
    costs = [budget.cost.astype(np.int64) for budget in problem.budgets]
    if problem.tie_labels is None:
        return loss, costs
    tied = problem.tie_labels >= 0
    _, group = np.unique(problem.tie_labels[tied], return_inverse=True)
    count = int(group.max(initial=-1)) + 1

    def merge(table: NDArray[Any]) -> NDArray[Any]:
        sums = np.zeros((count, table.shape[1]), dtype=table.dtype)
        np.add.at(sums, group, table[tied])
        return np.vstack([table[~tied], sums])

    return merge(loss), [merge(cost) for cost in costs]


def _prove(problem: AllocationProblem, result: AllocationResult, dual: float, slip: float) -> tuple[Proof, float, bool]:
    """Establish the lower bound anew: how, how much of it, and whether a better solution was met."""
    claimed = result.lower_bound
    if claimed == NOTHING:
        return "none", dual, False
    if claimed <= dual + slip:
        return "dual", claimed, False
    verified = dual
    tables = _joined(problem)
    if tables is not None:
        joined_dual = _dual_of(tables, problem, result.multipliers)
        verified = max(dual, min(joined_dual, claimed))
        if claimed <= joined_dual + slip:
            return "dual", claimed, False
        if len(tables.costs) == 1:
            better = _enumerate(
                tables.loss, tables.costs[0], problem.limit, result.multiplier, claimed - slip - joined_dual
            )
            if better is False or (better and tables.exact):
                return "search", claimed, better
    least = _least_of_all(problem)
    if least is not None:
        return "search", claimed, least < claimed - slip
    return "weaker", verified, False


@dataclass(frozen=True, slots=True)
class _Joined:
    """Tables of independent rows; ``exact`` unless their losses are only lower bounds."""

    loss: NDArray[np.float64]
    costs: list[NDArray[np.int64]]
    exact: bool


def _joined(problem: AllocationProblem) -> _Joined | None:
    """One row per tie group or item, or per layer where there are layer rules; None where neither is possible."""
    if problem.pairwise is not None and len(problem.pairwise.first):
        return None
    loss, costs = _grouped(problem)
    if problem.layers is None:
        return _Joined(loss, costs, exact=True)
    if problem.tie_labels is not None and bool((problem.tie_labels >= 0).any()):
        return None
    rows = []
    for layer in range(problem.layers.n_layers):
        members = np.flatnonzero(problem.layers.layer == layer)
        if not members.size:
            continue
        row = _layer_row(problem.layers, layer, loss[members], [cost[members] for cost in costs])
        if row is None:
            return None
        rows.append(row)
    width = max(row[0].size for row in rows)
    if width * len(rows) > MAX_LAYER_CELLS:
        return None
    joined = np.full((len(rows), width), np.inf)
    joined_costs = [np.zeros((len(rows), width), dtype=np.int64) for _ in costs]
    for number, (values, layer_costs, _) in enumerate(rows):
        joined[number, : values.size] = values
        for table, cost in zip(joined_costs, layer_costs, strict=True):
            table[number, : values.size] = cost
    return _Joined(joined, joined_costs, exact=all(row[2] for row in rows))


def _layer_row(
    rules: LayerRules, layer: int, loss: NDArray[np.float64], costs: list[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], list[NDArray[np.int64]], bool] | None:
    """Least losses of a layer for every mean width that its rules admit, their costs, and whether they are exact.

    First every choice for all channels, then mixtures on the sum of the channels' lower hulls. None where the channels
    differ in cost, or a cost does not follow the width.
    """
    count = len(loss)
    if any(bool((cost != cost[0]).any()) for cost in costs):
        return None
    ruled = any(rule is not None for rule in (rules.average, rules.average_step, rules.average_min, rules.average_max))
    ticks, unit = _ticks((rules.width if ruled else costs[0][0]).astype(np.float64))
    if ticks is None:
        return None
    slopes = []
    for cost in costs:
        low, high = int(ticks.argmin()), int(ticks.argmax())
        span = int(ticks[high] - ticks[low])
        slope = int(cost[0, high] - cost[0, low]) // span if span else 0
        if bool((cost[0, low] + slope * (ticks - ticks[low]) != cost[0]).any()):
            return None
        slopes.append((int(cost[0, low]), slope))
    overhead = (
        np.zeros(len(ticks), np.int64) if rules.choice_overhead is None else np.asarray(rules.choice_overhead)[layer]
    )
    uniform = loss.sum(axis=0)
    ends, values, exact = _hull_sum(loss, ticks)
    tag = 0 if rules.mixed_overhead is None else int(np.broadcast_to(rules.mixed_overhead, (rules.n_layers,))[layer])
    if rules.max_distinct == 1 or not values.size:
        ends, values = ends[:0], values[:0]
    elif rules.choice_overhead is not None:  # at least the two cheapest are paid for
        tag += int(np.sort(overhead)[: 2 if tag else 1].sum())
    exact = exact and rules.choice_overhead is None and rules.max_widths is None and rules.max_distinct in (None, 1)
    total_ticks = np.concatenate([count * ticks, ends])
    least = np.concatenate([uniform, values])
    once = np.concatenate([overhead, np.full(values.size, tag, dtype=np.int64)])
    least = (
        np.where(_admitted(rules, layer, float(rules.width.min()) + unit * total_ticks / count), least, np.inf)
        if ruled
        else least
    )
    totals = [
        origin * count + slope * total_ticks + (once if number == 0 else 0)
        for number, (origin, slope) in enumerate(slopes)
    ]
    return least, totals, exact


def _ticks(sizes: NDArray[np.float64]) -> tuple[NDArray[np.int64] | None, float]:
    """Sizes as whole multiples of a unit above the smallest; None when there is no such unit down to a millionth."""
    above = sizes - sizes.min()
    grain = 1.0 if bool((above == np.round(above)).all()) else 1e-6
    whole = np.round(above / grain).astype(np.int64)
    if bool((np.abs(whole * grain - above) > 1e-9).any()):
        return None, 0.0
    divisor = max(int(np.gcd.reduce(whole)), 1)
    return whole // divisor, divisor * grain


def _hull_sum(
    loss: NDArray[np.float64], ticks: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], bool]:
    """Sum over the rows of their lower hulls, at every whole total of ticks, and whether every row is its own hull."""
    places = np.unique(ticks)
    table = np.stack([loss[:, ticks == place].min(axis=1) for place in places], axis=1)
    hull = table.copy()
    for first in range(places.size):
        for last in range(first + 2, places.size):
            for between in range(first + 1, last):
                share = float(places[between] - places[first]) / float(places[last] - places[first])
                np.minimum(
                    hull[:, between], (1 - share) * table[:, first] + share * table[:, last], out=hull[:, between]
                )
    finite = np.isfinite(hull)
    if not bool(finite.any(axis=1).all()):
        return np.empty(0, dtype=np.int64), np.empty(0), True
    exact = bool((np.diff(places) == 1).all()) and bool(
        (hull >= table).all() or (table[finite] - hull[finite]).max() == 0
    )
    rows, start = np.arange(len(hull)), finite.argmax(axis=1)
    steps = np.diff(places)
    inside = finite[:, :-1] & finite[:, 1:]
    with np.errstate(invalid="ignore"):
        slope = np.diff(hull, axis=1) / steps
    units = np.sort(np.repeat(slope[inside], np.broadcast_to(steps, slope.shape)[inside]))
    bottom = hull[rows, start].sum(dtype=np.longdouble)
    curve = bottom + np.concatenate(
        [[0], np.cumsum(units, dtype=np.longdouble)]
    )  # small losses must survive large first ones
    return int(places[start].sum()) + np.arange(curve.size), curve.astype(np.float64), exact


def _admitted(rules: LayerRules, layer: int, mean: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether mean widths obey the layer's bounds and step."""
    low, high = (float(bound[layer]) for bound in rules.average_bounds())
    good = (mean >= low - WIDTH_SLIP) & (mean <= high + WIDTH_SLIP)
    if rules.average_step is not None:
        steps = mean / rules.average_step
        good &= np.abs(steps - np.round(steps)) <= WIDTH_SLIP
    return np.asarray(good)


def _dual_of(tables: _Joined, problem: AllocationProblem, multipliers: tuple[float, ...]) -> float:
    """The Lagrangian bound of joined tables."""
    priced = tables.loss + sum(rate * cost for rate, cost in zip(multipliers, tables.costs, strict=True))
    rows, least = np.arange(len(priced)), priced.argmin(axis=1)
    total = float(tables.loss[rows, least].sum())
    for rate, cost, budget in zip(multipliers, tables.costs, problem.budgets, strict=True):
        total += rate * (int(cost[rows, least].sum()) - budget.limit)
    return total


def _least_of_all(problem: AllocationProblem) -> float | None:
    """Least loss over all admissible assignments; None where there are too many to try."""
    groups: NDArray[np.int64] = np.arange(problem.n_items)
    if problem.tie_labels is not None:
        labels = problem.tie_labels
        groups = np.unique(np.where(labels >= 0, labels, labels.max(initial=-1) + 1 + groups), return_inverse=True)[1]
    kinds = int(groups.max(initial=-1)) + 1
    if kinds * np.log(problem.n_choices) > np.log(MAX_TRIED):
        return None
    least = np.inf
    for code in range(problem.n_choices**kinds):
        choice = (code // problem.n_choices ** np.arange(kinds) % problem.n_choices)[groups]
        if not problem.permits(choice):
            continue
        loss, costs = problem.evaluate(choice)
        if loss < least and all(cost <= budget.limit for cost, budget in zip(costs, problem.budgets, strict=True)):
            least = loss
    return least


def _enumerate(loss: NDArray[np.float64], cost: NDArray[np.int64], limit: int, rate: float, gap: float) -> bool | None:
    """Whether a solution lies closer than ``gap`` to the Lagrangian bound; None when there are too many to tell.

    A solution exceeds the bound by its penalties plus rate * unused budget. Partial solutions are kept by total cost,
    and only while penalties plus the least that the rest must add stay below the gap.
    """
    priced = loss + rate * cost
    rows = np.arange(len(priced))
    least = priced.argmin(axis=1)
    penalty = priced - priced[rows, least][:, None]
    growth = cost - cost[rows, least][:, None]
    open_cells = (penalty < gap) & (growth != 0)
    items = np.flatnonzero(open_cells.any(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = np.where(open_cells, penalty / np.abs(growth), np.inf)
    items = items[np.argsort(unit[items].min(axis=1), kind="stable")]
    up = _later_minimum(np.where(growth > 0, unit, np.inf)[items].min(axis=1, initial=np.inf))
    down = _later_minimum(np.where(growth < 0, unit, np.inf)[items].min(axis=1, initial=np.inf))
    room = limit - int(cost[rows, least].sum())
    used, spent = np.zeros(1, dtype=np.int64), np.zeros(1)
    for number, item in enumerate(items.tolist()):
        options = np.flatnonzero(open_cells[item])
        used = np.concatenate([used, *(used + growth[item, option] for option in options)])
        spent = np.concatenate([spent, *(spent + penalty[item, option] for option in options)])
        order = np.lexsort((spent, used))
        first = order[np.flatnonzero(np.diff(used[order], prepend=used[order[0]] - 1))]
        used, spent = used[first], spent[first]
        if bool((spent + rate * (room - used) < gap)[used <= room].any()):
            return True
        free = room - used
        with np.errstate(invalid="ignore"):
            rest = np.where(free >= 0, free * min(rate, up[number + 1]), -free * down[number + 1])
        alive = spent + np.nan_to_num(rest, nan=0.0, posinf=np.inf) < gap
        used, spent = used[alive], spent[alive]
        if not used.size:
            return False
        if used.size > MAX_STATES:
            return None
    return bool((room >= 0) and rate * room < gap) if not items.size else False


def _later_minimum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least of all values from each position on; infinite after the end."""
    return np.append(np.minimum.accumulate(values[::-1])[::-1], np.inf)
