"""Checking an answer from the raw tables alone, by code that shares nothing with the solvers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpqsearch.allocate.problem import AllocationProblem, AllocationResult

ROUNDING = 1e-12
"""Relative disagreement between two float64 sums of the same losses that is put down to their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateCheck:
    """Outcome of ``verify_certificate``; true when nothing contradicts the result.

    Attributes:
        problems: What does not hold, in words; empty when the certificate is valid.
        loss: Total loss, recomputed.
        costs: Totals of all budgets, recomputed.
        dual_bound: Lower bound that the multipliers prove, recomputed.
    """

    problems: tuple[str, ...]
    loss: float
    costs: tuple[int, ...]
    dual_bound: float

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
        return CertificateCheck(problems=problems, loss=float("nan"), costs=(), dual_bound=-float("inf"))
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
        return CertificateCheck(problems=tuple(problems_found), loss=loss, costs=costs, dual_bound=-float("inf"))
    dual = dual_bound(problem, result.multipliers)
    if result.dual_bound > dual + slip:
        problems_found.append(f"the multipliers prove {dual}, the result says {result.dual_bound}")
    if result.lower_bound > loss + slip:
        problems_found.append(f"lower bound {result.lower_bound} is above the loss {loss}")
    return CertificateCheck(problems=tuple(problems_found), loss=loss, costs=costs, dual_bound=dual)


def dual_bound(problem: AllocationProblem, multipliers: tuple[float, ...]) -> float:
    """Lagrangian bound: sum of the least loss + multipliers * costs per tie group, minus multipliers * limits."""
    priced = problem.loss.astype(np.float64)
    for budget, rate in zip(problem.budgets, multipliers, strict=True):
        priced += rate * budget.cost
    permitted = np.ones(priced.shape, dtype=bool) if problem.allowed is None else problem.allowed.copy()
    if problem.fixed_choice is not None:
        pinned = np.flatnonzero(problem.fixed_choice >= 0)
        permitted[pinned] = False
        permitted[pinned, problem.fixed_choice[pinned]] = True
    priced[~permitted] = np.inf
    if problem.tie_labels is not None:
        tied = problem.tie_labels >= 0
        groups = np.zeros((int(problem.tie_labels.max(initial=-1)) + 1, priced.shape[1]))
        np.add.at(groups, problem.tie_labels[tied], priced[tied])
        priced = np.vstack([priced[~tied], groups[np.unique(problem.tie_labels[tied])]])
    least = priced.min(axis=1).sum() if len(priced) else 0.0
    limits = sum(rate * budget.limit for budget, rate in zip(problem.budgets, multipliers, strict=True))
    return float(least - limits)
