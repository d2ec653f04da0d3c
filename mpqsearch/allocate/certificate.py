"""Checking an answer from the raw tables, with arithmetic of its own: plain Python integers and ``math.fsum``.

Nothing here is shared with the solvers. The check costs the choice again, holds it against every rule, and recomputes
the Lagrangian bound: for any multipliers >= 0, the sum over the items of the least loss + multipliers * cost, minus
multipliers * limits, is a lower bound of every admissible loss. It ends at the first contradiction.

The bound holds for every limit on the number of formats too: the least sum is taken over all sets of so many formats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpqsearch.allocate.problem import AllocationProblem

SLIP = 2.0**-48
"""Rounding that is forgiven, as a share of the sum of the absolute numbers that were added."""

Columns = list[list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The claims of an answer, as plain data for a file.

    Attributes:
        status, proof, solver: As in ``AllocationResult``.
        loss: Total loss of the choice.
        costs, limits, multipliers: By name of the budget.
        bound: Lower bound that the multipliers prove; None when none is claimed.
        digests: SHA-256 of the tables, see ``table_digests``.
    """

    status: str
    proof: str
    solver: str
    loss: float
    costs: Mapping[str, int]
    limits: Mapping[str, int]
    multipliers: Mapping[str, float]
    bound: float | None
    digests: Mapping[str, str]

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Certificate:
        """The inverse of ``to_data``; raises ``KeyError`` or ``TypeError`` for other data."""
        return cls(**{name: data[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Outcome of ``check_certificate``.

    Attributes:
        problem: The first contradiction in words; empty when every claim that can be checked holds.
        loss: Total loss, recomputed (NaN when the check ended before).
        costs: Totals of all budgets, recomputed.
        bound: Lower bound that the multipliers prove, recomputed; minus infinity when none was computed.
        gap: What this proves: ``(loss - bound) / |loss|``. Claims of optimality beyond it rest on the solver's word.
    """

    problem: str = ""
    loss: float = math.nan
    costs: tuple[int, ...] = ()
    bound: float = -math.inf
    gap: float = math.inf

    @property
    def valid(self) -> bool:
        """Whether nothing contradicts the certificate."""
        return not self.problem


def check_certificate(certificate: Certificate, problem: AllocationProblem, choice: Sequence[int]) -> Check:
    """Check the claims of ``certificate`` about ``choice [n]`` against the raw tables of ``problem``.

    The digests are for whoever rebuilt the tables to compare; they are not looked at here.
    """
    picked, (n, k) = [int(c) for c in choice], problem.loss.shape
    if len(picked) != n or any(not 0 <= c < k for c in picked):
        return Check(problem=f"the choice must name one of {k} formats for each of {n} items")
    budgets = {b.name: (_columns(b.cost), int(b.limit)) for b in problem.budgets}
    if set(budgets) != set(certificate.limits):
        return Check(problem=f"the budgets are {sorted(budgets)}, the certificate has {sorted(certificate.limits)}")
    costs = []
    for name, (table, limit) in budgets.items():
        costs.append(sum(table[c][i] for i, c in enumerate(picked)))
        if certificate.limits[name] != limit:
            return Check(problem=f"the limit on {name} is {limit}, the certificate says {certificate.limits[name]}")
        if costs[-1] != certificate.costs.get(name):
            return Check(problem=f"{name} is {costs[-1]}, the certificate says {certificate.costs.get(name)}")
        if costs[-1] > limit:
            return Check(problem=f"{name} is {costs[-1]}, above the limit {limit}")
    losses = _columns(problem.loss)
    terms = [losses[c][i] for i, c in enumerate(picked)] + _pair_terms(problem, picked)
    loss, slip = math.fsum(terms), SLIP * math.fsum(map(abs, terms))
    if not abs(loss - certificate.loss) <= slip:
        return Check(problem=f"the loss is {loss}, the certificate says {certificate.loss}")
    if broken := _broken_rule(problem, picked):
        return Check(problem=broken, loss=loss, costs=tuple(costs))
    if certificate.bound is None:
        return Check(loss=loss, costs=tuple(costs))
    rates = [certificate.multipliers.get(name, math.nan) for name in budgets]
    if not all(0 <= rate < math.inf for rate in rates):
        return Check(problem=f"the multipliers {rates} are not all finite and >= 0", loss=loss, costs=tuple(costs))
    bound, slip = _bound(problem, losses, list(zip(rates, budgets.values(), strict=True)), slip)
    gap = 0.0 if loss <= bound else (loss - bound) / abs(loss) if loss else math.inf
    wrong = ""
    if certificate.bound > bound + slip:
        wrong = f"the multipliers prove {bound}, the certificate says {certificate.bound}"
    elif certificate.bound > loss + slip:
        wrong = f"the bound {certificate.bound} is above the loss {loss}"
    return Check(problem=wrong, loss=loss, costs=tuple(costs), bound=bound, gap=gap)


def _columns(table: Any) -> Columns:
    return [table[:, j].tolist() for j in range(table.shape[1])]


def _pair_terms(problem: AllocationProblem, picked: list[int]) -> list[float]:
    if problem.pairwise is None:
        return []
    pairs = zip(problem.pairwise.first.tolist(), problem.pairwise.second.tolist(), problem.pairwise.value, strict=True)
    return [float(value[picked[first], picked[second]]) for first, second, value in pairs]


def _broken_rule(problem: AllocationProblem, picked: list[int]) -> str:
    """The first rule beside the budgets that the choice breaks."""
    allowed = None if problem.allowed is None else _columns(problem.allowed)
    fixed = [-1] * len(picked) if problem.fixed_choice is None else problem.fixed_choice.tolist()
    for item, choice in enumerate(picked):
        if fixed[item] not in (-1, choice) or (allowed is not None and not allowed[choice][item]):
            return f"item {item} has choice {choice}, which is not allowed"
    shared: dict[int, int] = {}
    for item, group in enumerate([] if problem.group_labels is None else problem.group_labels.tolist()):
        if group >= 0 and shared.setdefault(group, picked[item]) != picked[item]:
            return f"group {group} has the choices {shared[group]} and {picked[item]}"
    if problem.max_formats is not None and len(set(picked)) > problem.max_formats:
        return f"{len(set(picked))} formats are used, {problem.max_formats} are allowed"
    if problem.max_formats_per_layer is not None and problem.layer is not None:
        for layer, choices in _by_label(problem.layer.tolist(), picked).items():
            if len(set(choices)) > problem.max_formats_per_layer:
                return f"layer {layer} uses {len(set(choices))} formats, {problem.max_formats_per_layer} are allowed"
    return ""


def _by_label(labels: list[int], values: list[Any]) -> dict[int, list[Any]]:
    listed: dict[int, list[Any]] = {}
    for label, value in zip(labels, values, strict=True):
        listed.setdefault(label, []).append(value)
    return listed


def _bound(
    problem: AllocationProblem, losses: Columns, budgets: list[tuple[float, tuple[Columns, int]]], slip: float
) -> tuple[float, float]:
    """The Lagrangian bound, and the rounding to forgive."""
    prices = losses
    for rate, (costs, _) in budgets:
        if rate:
            prices = [[p + rate * c for p, c in zip(*pair, strict=True)] for pair in zip(prices, costs, strict=True)]
    prices = _permitted(problem, prices)
    few = problem.max_formats is not None or problem.max_formats_per_layer is not None
    if few or problem.group_labels is not None:
        least = _least_in_groups(problem, [list(row) for row in zip(*prices, strict=True)])
    else:
        least = math.fsum(map(min, *prices)) if len(prices) > 1 else math.fsum(prices[0])
    paid = [-rate * limit for rate, (_, limit) in budgets]
    pairs = [] if problem.pairwise is None else [float(value.min()) for value in problem.pairwise.value]
    slip += SLIP * (abs(least) + math.fsum(map(abs, paid)) + math.fsum(map(abs, pairs)))
    return math.fsum([least, *pairs, *paid]), slip


def _permitted(problem: AllocationProblem, prices: Columns) -> Columns:
    """The prices, infinite where ``allowed`` and ``fixed`` forbid."""
    if problem.allowed is not None:
        prices = [
            [p if ok else math.inf for p, ok in zip(*pair, strict=True)]
            for pair in zip(prices, _columns(problem.allowed), strict=True)
        ]
    if problem.fixed_choice is not None:
        fixed = problem.fixed_choice.tolist()
        prices = [
            [p if f in (-1, j) else math.inf for p, f in zip(column, fixed, strict=True)]
            for j, column in enumerate(prices)
        ]
    return prices


def _least_in_groups(problem: AllocationProblem, rows: list[list[float]]) -> float:
    """Least sum of prices when the items of a group share a choice, and formats are few in the model and its layers.

    A group that lies in several layers counts in its first: fewer rules bind a lower bound.
    """
    groups = [-1] * len(rows) if problem.group_labels is None else problem.group_labels.tolist()
    items = _by_label([g if g >= 0 else -2 - i for i, g in enumerate(groups)], list(range(len(rows))))
    merged = [
        [math.fsum(column) for column in zip(*(rows[i] for i in members), strict=True)] for members in items.values()
    ]
    k, in_layer = problem.loss.shape[1], problem.max_formats_per_layer
    most = min(problem.max_formats or k, k)
    inside = min(in_layer or most, most)
    layers = [0 if in_layer is None or problem.layer is None else int(problem.layer[m[0]]) for m in items.values()]
    sets = list(combinations(range(k), inside))
    sums = [
        {s: math.fsum(min(row[j] for j in s) for row in block) for s in sets}
        for block in _by_label(layers, merged).values()
    ]
    return min(
        math.fsum(min(total for s, total in block.items() if model.issuperset(s)) for block in sums)
        for model in map(set, combinations(range(k), most))
    )
