"""What a solving method is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.problem import AllocationProblem
from mpqsearch.allocate.result import Proof
from mpqsearch.allocate.tables import Tables


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """The problem, its tables, who should solve it and how closely."""

    problem: AllocationProblem
    tables: Tables
    solver: str
    gap_tolerance: float
    started: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """An answer for the rows of the tables.

    Attributes:
        choice: ``[r]`` choice of every row.
        proof: Who proved it optimal.
        floor: Best lower bound that was proven.
        dual_bound: The lower bound that the multipliers prove by themselves; minus infinity without any.
        multipliers: One multiplier per budget.
        solver: Name of the method.
    """

    choice: NDArray[np.int32]
    proof: Proof
    floor: float
    dual_bound: float
    multipliers: tuple[float, ...]
    solver: str
