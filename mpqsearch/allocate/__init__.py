"""Bit allocation as an exact, certified multiple-choice knapsack. Numbers only: no model, no torch, no file.

Source of the method: Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (1995), after
Sinha and Zoltners (1979) and Dyer (1984) on its linear relaxation.
"""

from __future__ import annotations

from mpqsearch.allocate.alternatives import solve_alternatives
from mpqsearch.allocate.backend import use_backend, warm_up
from mpqsearch.allocate.certificate import CertificateCheck, verify_certificate
from mpqsearch.allocate.dispatch import solve
from mpqsearch.allocate.explain import (
    ConstraintPrice,
    Explanation,
    GroupExplanation,
    ItemExplanation,
    explain,
    explain_groups,
)
from mpqsearch.allocate.path import ParetoPath, solve_path
from mpqsearch.allocate.problem import (
    AllocationProblem,
    AllocationResult,
    CostBudget,
    LayerRules,
    PairwiseTerms,
    Status,
    relative_gap,
    whole_units,
)

__all__ = [
    "AllocationProblem",
    "AllocationResult",
    "CertificateCheck",
    "ConstraintPrice",
    "CostBudget",
    "Explanation",
    "GroupExplanation",
    "ItemExplanation",
    "LayerRules",
    "PairwiseTerms",
    "ParetoPath",
    "Status",
    "explain",
    "explain_groups",
    "relative_gap",
    "solve",
    "solve_alternatives",
    "solve_path",
    "use_backend",
    "verify_certificate",
    "warm_up",
    "whole_units",
]
