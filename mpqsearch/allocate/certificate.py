"""Checking an answer from the raw tables alone, by code that shares nothing with the solvers.

Two kinds of proof. The multipliers give a lower bound in one pass, which anyone can repeat. Where the result claims more
(a proven optimum), the claim is proven again: every choice outside the multipliers' minimizers has a penalty, a better
solution has less total penalty than the gap, and all such sets of choices are enumerated by their total cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import AllocationProblem, AllocationResult

ROUNDING = 1e-12
"""Relative disagreement between two float64 sums of the same losses that is put down to their order."""

MAX_STATES = 3_000_000
"""Partial solutions beyond which the enumeration gives up."""

NOTHING = -float("inf")

Proof = Literal["dual", "search", "none", "not repeated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateCheck:
    """Outcome of ``verify_certificate``; true when nothing contradicts the result.

    Attributes:
        problems: What does not hold, in words; empty when the certificate is valid.
        loss: Total loss, recomputed.
        costs: Totals of all budgets, recomputed.
        dual_bound: Lower bound that the multipliers prove, recomputed.
        proof: What the check itself established about ``lower_bound``: ``dual`` (the multipliers alone prove it),
            ``search`` (proven again by enumeration), ``none`` (nothing is claimed), or ``not repeated``: nothing
            contradicts it, but the enumeration is too large or the kind of problem has none.
    """

    problems: tuple[str, ...]
    loss: float
    costs: tuple[int, ...]
    dual_bound: float
    proof: Proof

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
        return CertificateCheck(problems=tuple(problems_found), loss=loss, costs=costs, dual_bound=NOTHING, proof="none")
    dual = dual_bound(problem, result.multipliers)
    if abs(min(dual, loss) - result.dual_bound) > slip:
        problems_found.append(f"the multipliers prove {dual}, the result says {result.dual_bound}")
    if result.lower_bound > loss + slip:
        problems_found.append(f"lower bound {result.lower_bound} is above the loss {loss}")
    if result.status == "optimal" and result.lower_bound < loss - slip:
        problems_found.append(f"the status is optimal, the lower bound {result.lower_bound} is below the loss {loss}")
    proof, better = _prove(problem, result, dual, slip)
    if better:
        problems_found.append(f"a choice with a smaller loss than the lower bound {result.lower_bound} exists")
    return CertificateCheck(problems=tuple(problems_found), loss=loss, costs=costs, dual_bound=dual, proof=proof)


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
        total += float(problem.pairwise.value.min(axis=(1, 2), initial=np.inf).sum() if len(problem.pairwise.first) else 0)
    return total


def _grouped(problem: AllocationProblem) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    """Loss (infinite where nothing may be chosen) and costs with one row per tie group or free item."""
    permitted = np.ones(problem.loss.shape, dtype=bool) if problem.allowed is None else problem.allowed.copy()
    if problem.fixed_choice is not None:
        pinned = np.flatnonzero(problem.fixed_choice >= 0)
        permitted[pinned] = False
        permitted[pinned, problem.fixed_choice[pinned]] = True
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


def _prove(problem: AllocationProblem, result: AllocationResult, dual: float, slip: float) -> tuple[Proof, bool]:
    """Establish the lower bound anew; the second value tells that a better solution was met."""
    if result.lower_bound == NOTHING:
        return "none", False
    if result.lower_bound <= dual + slip:
        return "dual", False
    if problem.more_budgets or problem.layers is not None or problem.pairwise is not None:
        return "not repeated", False
    loss, costs = _grouped(problem)
    found = _enumerate(loss, costs[0], problem.limit, result.multiplier, result.lower_bound - slip - dual)
    return ("not repeated", False) if found is None else ("search", found)


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
