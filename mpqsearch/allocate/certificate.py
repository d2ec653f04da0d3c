"""Checking an answer from the raw tables, with arithmetic of its own: nothing of the solvers is used here.

The check costs the choice again, holds it against every rule, and recomputes the Lagrangian bound: for any multipliers
>= 0, the sum over the items of the least loss + multipliers * cost, minus multipliers * limits, is a lower bound of
every admissible loss; with limits on the number of formats, the least over all sets of so many formats. It ends at the
first contradiction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mpqsearch.allocate.problem import AllocationProblem, Integers

SLIP = 2.0**-48
"""Rounding that is forgiven, as a share of the sum of the absolute numbers that were added."""


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
    picked, (n, k) = np.array(choice, dtype=np.int64), problem.loss.shape
    if len(picked) != n or bool(((picked < 0) | (picked >= k)).any()):
        return Check(problem=f"the choice must name one of {k} formats for each of {n} items")
    rows = np.arange(n)
    costs = {b.name: sum(b.cost[rows, picked].tolist()) for b in problem.budgets}
    terms = problem.loss[rows, picked].tolist()
    if problem.pairwise is not None:
        pairs = problem.pairwise
        terms += pairs.value[np.arange(len(pairs.first)), picked[pairs.first], picked[pairs.second]].tolist()
    loss, slip = math.fsum(terms), SLIP * math.fsum(map(abs, terms))
    wrong = _wrong_cost(certificate, problem, costs)
    if not wrong and not abs(loss - certificate.loss) <= slip:
        wrong = f"the loss is {loss}, the certificate says {certificate.loss}"
    wrong = wrong or broken_rule(problem, picked)
    if wrong or certificate.bound is None:
        return Check(problem=wrong, loss=loss, costs=tuple(costs.values()))
    rates = [certificate.multipliers.get(name, math.nan) for name in costs]
    if not all(0 <= rate < math.inf for rate in rates):
        wrong = f"the multipliers {rates} are not all finite and >= 0"
        return Check(problem=wrong, loss=loss, costs=tuple(costs.values()))
    parts = _bound_terms(problem, rates)
    bound, slip = math.fsum(parts), slip + SLIP * math.fsum(map(abs, parts))
    if certificate.bound > bound + slip:
        wrong = f"the multipliers prove {bound}, the certificate says {certificate.bound}"
    elif certificate.bound > loss + slip:
        wrong = f"the bound {certificate.bound} is above the loss {loss}"
    gap = 0.0 if loss <= bound else (loss - bound) / abs(loss) if loss else math.inf
    return Check(problem=wrong, loss=loss, costs=tuple(costs.values()), bound=bound, gap=gap)


def _wrong_cost(certificate: Certificate, problem: AllocationProblem, costs: Mapping[str, int]) -> str:
    limits = {b.name: b.limit for b in problem.budgets}
    if dict(certificate.limits) != limits:
        return f"the limits are {limits}, the certificate says {dict(certificate.limits)}"
    for name, cost in costs.items():
        if cost != certificate.costs.get(name):
            return f"{name} is {cost}, the certificate says {certificate.costs.get(name)}"
        if cost > limits[name]:
            return f"{name} is {cost}, above the limit {limits[name]}"
    return ""


def broken_rule(problem: AllocationProblem, picked: Integers) -> str:
    """The first rule beside the budgets that a choice ``[n]`` breaks, in words; empty when it obeys them all."""
    if problem.allowed is not None:
        refused = np.flatnonzero(~problem.allowed[np.arange(len(picked)), picked])
        if refused.size:
            return f"item {refused[0]} has choice {picked[refused[0]]}, which is not allowed"
    if problem.groups is not None and len(picked):
        items = np.flatnonzero(problem.groups >= 0)
        labels, shared = problem.groups[items], np.zeros(int(problem.groups.max()) + 1, dtype=np.int64)
        shared[labels] = picked[items]
        apart = items[shared[labels] != picked[items]]
        if apart.size:
            group = int(problem.groups[apart[0]])
            return f"group {group} has the choices {picked[apart[0]]} and {shared[group]}"
    if problem.max_formats is not None and len(np.unique(picked)) > problem.max_formats:
        return f"{len(np.unique(picked))} formats are used, {problem.max_formats} are allowed"
    if problem.max_formats_per_layer is not None and problem.layer is not None and len(picked):
        used = np.unique(np.stack([problem.layer, picked], axis=1), axis=0)
        layers, counts = np.unique(used[:, 0], return_counts=True)
        if counts.max() > problem.max_formats_per_layer:
            layer = layers[counts.argmax()]
            return f"layer {layer} uses {counts.max()} formats, {problem.max_formats_per_layer} are allowed"
    return ""


def _bound_terms(problem: AllocationProblem, rates: Sequence[float]) -> list[float]:
    """Numbers whose sum is the Lagrangian bound."""
    prices = problem.loss.astype(np.float64)
    for rate, budget in zip(rates, problem.budgets, strict=True):
        if rate:
            prices += rate * budget.cost
    if problem.allowed is not None:
        prices[~problem.allowed] = math.inf
    layer: NDArray[Any] = np.zeros(len(prices), dtype=np.int64)
    if problem.max_formats_per_layer is not None and problem.layer is not None:
        layer = problem.layer
    if problem.groups is not None:  # a group counts in the layer of its first item: fewer rules bind a lower bound
        free = problem.groups < 0
        labels = np.where(free, -1 - np.arange(len(free)), problem.groups)
        _, first, row = np.unique(labels, return_index=True, return_inverse=True)
        merged = np.zeros((len(first), prices.shape[1]))
        np.add.at(merged, row, prices)
        prices, layer = merged, layer[first]
    paid = [-rate * budget.limit for rate, budget in zip(rates, problem.budgets, strict=True)]
    return [*_least_prices(problem, prices, layer), *paid]


def _least_prices(problem: AllocationProblem, prices: NDArray[np.float64], layer: NDArray[Any]) -> list[float]:
    """The least prices of every row, or of every layer over the best sets of so many formats."""
    k = prices.shape[1]
    most = min(problem.max_formats or k, k)
    inside = min(problem.max_formats_per_layer or most, most)
    if inside == k:
        least: list[float] = prices.min(axis=1).tolist()
        return least
    members = [np.flatnonzero(layer == one) for one in np.unique(layer)]
    sums = {}
    for formats in combinations(range(k), inside):
        column = prices[:, list(formats)].min(axis=1)
        sums[formats] = [math.fsum(column[rows].tolist()) for rows in members]
    totals = (
        [min(block) for block in zip(*(sums[s] for s in combinations(model, inside)), strict=True)]
        for model in combinations(range(k), most)
    )
    return min(totals, key=math.fsum)
