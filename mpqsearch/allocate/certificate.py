"""Checking an answer from the raw tables, with arithmetic of its own: plain Python integers and ``math.fsum``.

Nothing here is shared with the solvers. The check costs the choice again, holds it against every rule, and recomputes
the Lagrangian bound: for any multipliers >= 0, the sum over the items of the least loss + multipliers * cost, minus
multipliers * limits, is a lower bound of every admissible loss. It ends at the first contradiction.

The bound holds for every limit on the number of formats too: the least sum is taken over all sets of so many formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpqsearch.allocate.problem import AllocationProblem

SLIP = 2.0**-48
"""Rounding that is forgiven, as a share of the sum of the absolute numbers that were added."""

Rows = list[list[float]]


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
    picked = [int(c) for c in choice]
    if len(picked) != len(problem.loss) or any(not 0 <= c < problem.loss.shape[1] for c in picked):
        return Check(problem=f"the choice must name one of {problem.loss.shape[1]} formats for each item")
    budgets = {b.name: (b.cost, int(b.limit)) for b in problem.budgets}
    if set(budgets) != set(certificate.limits):
        return Check(problem=f"the budgets are {sorted(budgets)}, the certificate has {sorted(certificate.limits)}")
    costs = []
    for name, (table, limit) in budgets.items():
        cost = sum(row[c] for row, c in zip(table.tolist(), picked, strict=True))
        costs.append(cost)
        if certificate.limits[name] != limit:
            return Check(problem=f"the limit on {name} is {limit}, the certificate says {certificate.limits[name]}")
        if cost != certificate.costs.get(name):
            return Check(problem=f"{name} is {cost}, the certificate says {certificate.costs.get(name)}")
        if cost > limit:
            return Check(problem=f"{name} is {cost}, above the limit {limit}")
    losses = problem.loss.tolist()
    terms = [row[c] for row, c in zip(losses, picked, strict=True)] + list(_pair_terms(problem, picked))
    loss = math.fsum(terms)
    slip = SLIP * math.fsum(map(abs, terms))
    if not abs(loss - certificate.loss) <= slip:
        return Check(problem=f"the loss is {loss}, the certificate says {certificate.loss}")
    if broken := _broken_rule(problem, picked):
        return Check(problem=broken, loss=loss, costs=tuple(costs))
    if certificate.bound is None:
        return Check(loss=loss, costs=tuple(costs))
    rates = [certificate.multipliers.get(name, math.nan) for name in budgets]
    if not all(0 <= rate < math.inf for rate in rates):
        return Check(problem=f"the multipliers {rates} are not all finite and >= 0", loss=loss, costs=tuple(costs))
    bound, slip = _bound(problem, losses, rates, slip)
    gap = 0.0 if loss <= bound else (loss - bound) / abs(loss) if loss else math.inf
    claimed = certificate.bound
    wrong = ""
    if claimed > bound + slip:
        wrong = f"the multipliers prove {bound}, the certificate says {claimed}"
    elif claimed > loss + slip:
        wrong = f"the bound {claimed} is above the loss {loss}"
    return Check(problem=wrong, loss=loss, costs=tuple(costs), bound=bound, gap=gap)


def _broken_rule(problem: AllocationProblem, picked: list[int]) -> str:
    """The first rule beside the budgets that the choice breaks."""
    for item, choice in enumerate(picked):
        fixed = -1 if problem.fixed_choice is None else int(problem.fixed_choice[item])
        if fixed not in (-1, choice) or (problem.allowed is not None and not problem.allowed[item, choice]):
            return f"item {item} has choice {choice}, which is not allowed"
    shared: dict[int, int] = {}
    for item, group in enumerate([] if problem.group_labels is None else problem.group_labels.tolist()):
        if group >= 0 and shared.setdefault(group, picked[item]) != picked[item]:
            return f"group {group} has the choices {shared[group]} and {picked[item]}"
    if problem.max_formats is not None and len(set(picked)) > problem.max_formats:
        return f"{len(set(picked))} formats are used, {problem.max_formats} are allowed"
    if problem.max_formats_per_layer is not None and problem.layer is not None:
        used: dict[int, set[int]] = {}
        for layer, choice in zip(problem.layer.tolist(), picked, strict=True):
            used.setdefault(layer, set()).add(choice)
        for layer, formats in used.items():
            if len(formats) > problem.max_formats_per_layer:
                return f"layer {layer} uses {len(formats)} formats, {problem.max_formats_per_layer} are allowed"
    return ""


def _pair_terms(problem: AllocationProblem, picked: list[int]) -> Iterator[float]:
    if problem.pairwise is not None:
        pairs = problem.pairwise
        for first, second, value in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.value, strict=True):
            yield float(value[picked[first], picked[second]])


def _bound(
    problem: AllocationProblem, losses: list[list[float]], rates: list[float], slip: float
) -> tuple[float, float]:
    """The Lagrangian bound, and the rounding to forgive."""
    priced = _forbidden(problem, losses)
    for rate, budget in zip(rates, problem.budgets, strict=True):
        if rate:
            priced = [
                [p + rate * c for p, c in zip(prices, costs, strict=True)]
                for prices, costs in zip(priced, budget.cost.tolist(), strict=True)
            ]
    rows, layers = _shared_rows(problem, priced)
    paid = [rate * int(b.limit) for rate, b in zip(rates, problem.budgets, strict=True)]
    if problem.max_formats is None and problem.max_formats_per_layer is None:
        least = math.fsum(map(min, rows))
    else:
        least = _least_with_few_formats(problem, rows, layers)
    pairs = [] if problem.pairwise is None else [float(value.min()) for value in problem.pairwise.value]
    slip += SLIP * (abs(least) + math.fsum(map(abs, paid)) + math.fsum(map(abs, pairs)))
    return math.fsum([least, *pairs, *(-p for p in paid)]), slip


def _forbidden(problem: AllocationProblem, losses: list[list[float]]) -> Rows:
    """The losses, infinite where ``allowed`` and ``fixed`` forbid."""
    if problem.allowed is not None:
        losses = [
            [x if ok else math.inf for x, ok in zip(row, oks, strict=True)]
            for row, oks in zip(losses, problem.allowed.tolist(), strict=True)
        ]
    if problem.fixed_choice is not None:
        losses = [
            row if fixed < 0 else [x if j == fixed else math.inf for j, x in enumerate(row)]
            for row, fixed in zip(losses, problem.fixed_choice.tolist(), strict=True)
        ]
    return losses


def _shared_rows(problem: AllocationProblem, priced: Rows) -> tuple[Rows, list[int]]:
    """One row per group or free item, and its layer (of several layers the first: fewer rules bind the bound)."""
    layers = [0] * len(priced) if problem.layer is None else [int(x) for x in problem.layer]
    if problem.group_labels is None:
        return priced, layers
    rows: dict[tuple[int, int], list[float]] = {}
    layer_of: dict[tuple[int, int], int] = {}
    for item, (row, group) in enumerate(zip(priced, problem.group_labels.tolist(), strict=True)):
        key = (group, -1) if group >= 0 else (-1, item)
        rows[key] = [a + b for a, b in zip(rows[key], row, strict=True)] if key in rows else row
        layer_of.setdefault(key, layers[item])
    return list(rows.values()), list(layer_of.values())


def _least_with_few_formats(problem: AllocationProblem, rows: Rows, layers: list[int]) -> float:
    """Least sum of the rows' prices with few formats in the model, and few in each layer."""
    k = problem.loss.shape[1]
    most = k if problem.max_formats is None else min(problem.max_formats, k)
    in_layer = most if problem.max_formats_per_layer is None else min(problem.max_formats_per_layer, most)
    by_layer: dict[int, Rows] = {}
    for row, layer in zip(rows, layers if problem.max_formats_per_layer is not None else [0] * len(rows), strict=True):
        by_layer.setdefault(layer, []).append(row)
    subsets = list(combinations(range(k), in_layer))
    sums = [{s: math.fsum(min(row[j] for j in s) for row in block) for s in subsets} for block in by_layer.values()]
    return min(
        math.fsum(min(total for s, total in block.items() if set(s) <= model) for block in sums)
        for model in map(set, combinations(range(k), most))
    )
