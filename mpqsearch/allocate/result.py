"""What a solver hands back: the choice, its costs, and what is proven about it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate.certificate import Certificate
from mpqsearch.allocate.problem import AllocationProblem
from mpqsearch.core.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["optimal", "feasible", "heuristic"]
"""``optimal``: proven, see ``Proof``. ``feasible``: stopped early, ``gap`` certified. ``heuristic``: no useful bound is
known."""

Proof = Literal["bound", "search", "solver", "none"]
"""Who says that the answer is optimal. ``bound``: the multipliers' bound meets the loss. ``search``: the exact core
tried every move that could be better. ``solver``: an integer programming solver's word, to its tolerance of 1e-10."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What a solving method found, for the rows of the tables.

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class AllocationResult(Shown):
    """A solved allocation. ``loss`` and ``costs`` are recomputed from ``choice``, never taken from a solver.

    Attributes:
        status: What is proven about the answer, see ``Status``.
        proof: Who proved it, see ``Proof``.
        choice: ``[n]`` choice index per item.
        loss: Total loss of ``choice``.
        costs: Total of every budget by name, never above the limit.
        lower_bound: No admissible choice has a smaller loss (up to float64 rounding). An integer programming solver's
            claim is not counted, so an answer that is optimal by its word may keep a gap.
        gap: ``(loss - lower_bound) / |loss|``; 0 when they meet, infinite without a bound.
        multipliers: Lagrange multiplier of every budget: loss that one more unit of that budget would save.
        dual_bound: The lower bound that anyone can recompute from the multipliers in one pass over the tables.
        solver: Name of the solver that found ``choice``.
        seconds: Wall time of the solve.
    """

    status: Status
    proof: Proof
    choice: NDArray[np.int32]
    loss: float
    costs: Mapping[str, int]
    lower_bound: float
    gap: float
    multipliers: tuple[float, ...]
    dual_bound: float
    solver: str
    seconds: float

    def certificate(self, problem: AllocationProblem) -> Certificate:
        """What a stranger needs to check this answer, with digests of the tables of ``problem``."""
        return Certificate(
            status=self.status,
            proof=self.proof,
            solver=self.solver,
            loss=self.loss,
            costs=dict(self.costs),
            limits={b.name: b.limit for b in problem.budgets},
            multipliers={b.name: rate for b, rate in zip(problem.budgets, self.multipliers, strict=True)},
            bound=self.dual_bound if math.isfinite(self.dual_bound) else None,
            digests=table_digests(problem),
        )

    def facts(self) -> dict[str, Any]:
        """Status, loss, costs, and what is proven."""
        return {
            "status": f"{self.status}, by {self.solver} in {self.seconds:.3g} s",
            "loss": f"{self.loss:.6g}, at least {self.lower_bound:.6g} (gap {self.gap:.2g})",
            **self.costs,
        }

    def to_frame(self) -> pd.DataFrame:
        """One row an item: ``item`` (its index) and ``choice`` (the index of what it takes)."""
        import pandas as pd

        return pd.DataFrame({"item": np.arange(len(self.choice)), "choice": self.choice})


def table_digests(problem: AllocationProblem) -> dict[str, str]:
    """SHA-256 of the tables: ``loss`` (float64, infinite where not permitted), each budget's costs by name (int64),
    and ``rules`` (groups, layers, numbers of formats) where there are some. Rows in order, little-endian."""
    loss = problem.loss
    if problem.allowed is not None:
        loss = np.where(problem.allowed, loss, np.inf)
    digests = {"loss": _sha256(loss.astype("<f8", copy=False))}
    digests |= {f"cost {b.name}": _sha256(b.cost.astype("<i8", copy=False)) for b in problem.budgets}
    layer = None if problem.max_formats_per_layer is None else problem.layer
    labels = [None if given is None else given.tolist() for given in (problem.groups, layer)]
    rules = [labels[0], problem.max_formats, problem.max_formats_per_layer, labels[1]]
    if any(rule is not None for rule in rules):
        digests["rules"] = hashlib.sha256(repr(rules).encode()).hexdigest()
    return digests


def _sha256(table: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(table).data).hexdigest()
