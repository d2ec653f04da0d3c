"""Bit allocation as an exact, certified multiple-choice knapsack. Numbers only: no model, no torch, no file.

Source of the method: Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (1995), after
Sinha and Zoltners (1979) and Dyer (1984) on its linear relaxation.
"""

from __future__ import annotations

from mpqsearch._verbs import make_callable
from mpqsearch.allocate.certificate import Certificate, check_certificate
from mpqsearch.allocate.dispatch import solve
from mpqsearch.allocate.explain import NextStep, explain
from mpqsearch.allocate.path import ParetoPath, solve_path
from mpqsearch.allocate.problem import AllocationProblem, CostBudget, PairwiseTerms
from mpqsearch.allocate.result import AllocationResult, table_digests

__all__ = [
    "AllocationProblem",
    "AllocationResult",
    "Certificate",
    "CostBudget",
    "NextStep",
    "PairwiseTerms",
    "ParetoPath",
    "check_certificate",
    "explain",
    "solve",
    "solve_path",
    "table_digests",
]

make_callable(__name__)
