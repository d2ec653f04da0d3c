"""Several budgets and limits on the number of formats: a Lagrangian bound, a heuristic, and an integer program.

1. The best multipliers give a lower bound and, for limits on formats, the sets of formats that look best.
2. Within such sets the exact core (one budget) or small integer programs near the break (several) give an answer.
3. A choice whose penalty at the multipliers exceeds the gap is in no better answer. An integer program through PuLP
   takes the rest, when they are at most ``MAX_CELLS``; else the answer of step 2 stays, with its certified gap.

With HiGHS a few hundred rows take seconds. From about 5,000 rows on, what step 3 drops decides whether it is tried.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import dual, ilp, infeasible, mckp
from mpqsearch.allocate.problem import AllocationProblem, Floats
from mpqsearch.allocate.result import Proof
from mpqsearch.allocate.tables import Tables, total_loss
from mpqsearch.allocate.task import Answer, Task
from mpqsearch.errors import SolverError

MAX_CELLS = 20_000
"""Choices left in doubt up to which the whole integer program is tried."""

CORE_ROWS = (72, 648)
"""Rows nearest to a change of mind that are solved alone first."""

FILL_GAP = 1e-8
"""Relative gap at which one budget alone is filled well enough."""

PATIENCE_S = 60.0
"""Seconds after which no further integer program is started, and that one may take."""


def solve_constrained(task: Task) -> Answer:
    """Best answer for any budgets and limits on formats.

    Raises:
        InfeasibleBudgetError: Nothing meets all constraints.
        NothingFoundError: No admissible choice was found in the time given.
    """
    search = _Search(task)
    search.check_formats()
    search.improve_in_patterns()
    if not search.close_enough():
        search.improve_by_program()
    if search.choice is None:
        raise NothingFoundError(impossible=search.impossible)
    return search.answer()


class NothingFoundError(Exception):
    """No admissible choice was found; ``impossible`` when there is none, by the solver's word."""

    def __init__(self, *, impossible: bool) -> None:
        super().__init__("no admissible choice was found")
        self.impossible = impossible


class _Search:
    """The best choice so far and the bound it is held against."""

    def __init__(self, task: Task) -> None:
        problem = task.problem
        self.task, self.tables = task, task.tables
        self.few = dual.format_limits(problem.n_choices, problem.max_formats, problem.max_formats_per_layer)
        self.until = time.perf_counter() + PATIENCE_S
        self.choice: NDArray[np.int32] | None = None
        self.loss = float("inf")
        self.by_solver = self.impossible = False
        self.used_solver = "core"

    def check_formats(self) -> None:
        """Refuse budgets that no sets of so many formats can keep, before any search."""
        if self.few is not None:
            infeasible.check_formats(self.task.problem, self.tables, self.few)
        self.dual = dual.maximize(self.tables, self.few, max(dual.TOLERANCE, self.task.gap_tolerance / 20), self.until)
        self.floor = self.dual.best.value

    def gap(self) -> float:
        """What is not certified yet, in units of the loss."""
        gap = self.loss - self.floor
        return 0.0 if gap <= mckp.ROUNDING * abs(self.loss) else gap

    def close_enough(self) -> bool:
        """Whether the gap is as small as was asked."""
        return self.choice is not None and self.gap() <= self.task.gap_tolerance * abs(self.loss)

    def offer(self, choice: NDArray[np.int32], solver: str) -> None:
        """Keep a choice if it is admissible and better than the best one."""
        loss = total_loss(self.tables.loss, choice)
        if loss < self.loss and self.tables.fits(choice) and self.task.problem.permits(self.tables.expand(choice)):
            self.choice, self.loss, self.used_solver = choice, loss, solver

    def improve_in_patterns(self) -> None:
        """Answers within the sets of formats that the multipliers chose."""
        for at in self.dual.patterns:
            self.offer(at.choice, "dual")
        for at in self.dual.patterns:
            if time.perf_counter() > self.until or self.close_enough():
                return
            loss = self.tables.loss if at.formats is None else np.where(at.formats, self.tables.loss, np.inf)
            within = replace(self.tables, loss=loss)
            starts = [at.choice, *self._filled(within, at)]
            if len(self.tables.limits) > 1:
                self._solve_near_break(within, at, min(starts, key=lambda c: self._nearness(within, c)))

    def _filled(self, within: Tables, at: dual.Evaluation) -> list[NDArray[np.int32]]:
        """The exact core's answers for one budget at a time, with the prices of all others in the losses.

        Such a program relaxes the other budgets only, so its bound holds for the whole problem.
        """
        answers = []
        for number in range(len(at.rates)):
            others = np.where(np.arange(len(at.rates)) == number, 0.0, at.rates)
            priced, cost, limit = dual.prices(within, others), within.costs[number], within.limits[number]
            tolerance = max(self.task.gap_tolerance / 4, FILL_GAP if others.any() else 0.0)
            try:
                solved = mckp.solve_table(priced, cost, limit, gap_tolerance=tolerance)
            except mckp.BudgetTooSmallError:  # too small within these formats
                continue
            self.offer(solved.choice, "core")
            answers.append(solved.choice)
            if self.few is None:
                paid = float(others @ np.array(within.limits, dtype=np.float64))
                slip = mckp.ROUNDING * abs(solved.loss) if others.any() else 0.0
                self.floor = max(self.floor, solved.floor - paid - slip)
        return answers

    def _nearness(self, within: Tables, choice: NDArray[np.int32]) -> tuple[float, float]:
        """What exceeds the limits, each as a share of its limit, and the loss."""
        spent = zip(within.spent(choice), within.limits, strict=True)
        return sum(max(used - limit, 0) / max(limit, 1) for used, limit in spent), total_loss(within.loss, choice)

    def _solve_near_break(self, within: Tables, at: dual.Evaluation, start: NDArray[np.int32]) -> None:
        """Solve for the rows whose choice is most in doubt, all others held as in a start."""
        order = np.argsort(_doubt(penalties(within, at.rates, at.choice)), kind="stable")
        rows = np.arange(len(start))
        for size in CORE_ROWS:
            if size >= len(order) or time.perf_counter() > self.until or self.close_enough():
                return
            held = np.full(within.loss.shape, np.inf)
            held[rows, start] = within.loss[rows, start]
            held[order[:size]] = within.loss[order[:size]]
            self._program(held, rules=False)

    def improve_by_program(self) -> None:
        """The integer program over every choice that could be part of a better answer."""
        plain = self.dual.best if self.few is None else dual.evaluate(self.tables, self.dual.best.rates, None)
        worth = self.loss - plain.value
        penalty = penalties(self.tables, plain.rates, plain.choice)
        open_loss = np.where(penalty <= worth, self.tables.loss, np.inf)
        finite = np.isfinite(open_loss)
        modelled = finite if self.few is not None else finite[finite.sum(axis=1) > 1]
        if int(modelled.sum()) > MAX_CELLS or time.perf_counter() > self.until:
            return
        outcome = self._program(open_loss, rules=True)
        self.impossible = outcome.infeasible and self.choice is None
        self.by_solver = outcome.proven or (outcome.infeasible and self.choice is not None)

    def _program(self, loss: Floats, rules: bool) -> ilp.IlpAnswer:
        """Solve for the rows with more than one finite loss; offer the answer, and say whether it was admissible."""
        problem, tables = self.task.problem, self.tables
        open_rows = np.flatnonzero(np.isfinite(loss).sum(axis=1) > 1)
        choice = np.argmin(loss, axis=1).astype(np.int32)
        if rules and problem.limits_formats:
            open_rows = np.arange(len(loss))  # the formats of all rows count
        if not open_rows.size:
            return ilp.IlpAnswer(None, proven=False, infeasible=not tables.fits(choice))
        held = np.ones(len(loss), dtype=bool)
        held[open_rows] = False
        rest = np.flatnonzero(held)
        limits = tuple(
            limit - int(cost[rest, choice[rest]].sum(dtype=np.int64))
            for cost, limit in zip(tables.costs, tables.limits, strict=True)
        )
        solver = solver_name(self.task)
        outcome = ilp.solve_ilp(
            loss[open_rows].astype(np.float64),
            tuple(cost[open_rows] for cost in tables.costs),
            limits,
            ilp.Effort(solver=solver, gap=self._enough(), seconds=self.until - time.perf_counter()),
            reference=self.loss - total_loss(loss[rest], choice[rest]) if self.choice is not None else None,
            formats=format_rules(problem, tables) if rules else None,
        )
        if outcome.choice is None:
            return outcome
        choice[open_rows] = outcome.choice
        self.offer(choice, solver)
        # A float solver may overstep a limit by its tolerance: then nothing is proven.
        return replace(outcome, proven=outcome.proven and tables.fits(choice))

    def _enough(self) -> float:
        return self.task.gap_tolerance / 2 * abs(self.loss) if self.choice is not None else 0.0

    def answer(self) -> Answer:
        """The best choice, and what is proven about it."""
        assert self.choice is not None
        best = self.dual.best
        proof: Proof = "none"
        if self.loss - best.value <= mckp.ROUNDING * abs(self.loss):
            proof = "bound"
        elif not self.gap():
            proof = "search"
        elif self.by_solver and self.task.gap_tolerance == 0:
            proof = "solver"
        return Answer(
            choice=self.choice,
            proof=proof,
            floor=self.floor,
            dual_bound=best.value,
            multipliers=tuple(float(rate) for rate in best.rates),
            solver=self.used_solver,
        )


def solve_by_program(task: Task) -> Answer:
    """One budget and separable losses by the integer programming solver that the caller named: a second opinion."""
    tables = task.tables
    relaxed = mckp.relax(tables.loss, tables.cost, tables.limit)
    if tables.loss.size > MAX_CELLS:
        raise SolverError(
            f"{tables.loss.size} choices are too many for {task.solver} (at most {MAX_CELLS}). Use solver='auto'."
        )
    outcome = ilp.solve_ilp(
        tables.loss.astype(np.float64),
        tables.costs,
        tables.limits,
        ilp.Effort(
            solver=task.solver,
            gap=task.gap_tolerance * abs(relaxed.loss),
            seconds=PATIENCE_S,
        ),
        reference=relaxed.loss,
    )
    choice = outcome.choice
    proven = outcome.proven and task.gap_tolerance == 0
    if choice is None or not tables.fits(choice) or total_loss(tables.loss, choice) > relaxed.loss:
        choice, proven = relaxed.choice, proven and relaxed.slack >= 0 and choice is not None and tables.fits(choice)
    return Answer(
        choice=choice,
        proof="solver" if proven else "none",
        floor=relaxed.bound,
        dual_bound=relaxed.bound,
        multipliers=(relaxed.rate,),
        solver=task.solver,
    )


def solver_name(task: Task) -> str:
    """The integer programming solver: the one that was named, else HiGHS."""
    return "highs" if task.solver in ("auto", "core") else task.solver


def format_rules(problem: AllocationProblem, tables: Tables) -> ilp.FormatRules | None:
    """The limits on formats, over rows instead of items."""
    if not problem.limits_formats:
        return None
    layer = np.zeros(problem.n_items, dtype=np.int64) if problem.layer is None else problem.layer
    members = np.unique(np.stack([tables.row, layer.astype(np.int64)], axis=1), axis=0)
    return ilp.FormatRules(problem.max_formats, problem.max_formats_per_layer, members[:, 0], members[:, 1])


def penalties(tables: Tables, rates: NDArray[np.float64], choice: NDArray[np.int32]) -> NDArray[np.float64]:
    """``[r, k]``: what every choice costs beyond the minimizer at ``rates``."""
    priced = dual.prices(tables, rates)
    penalty: NDArray[np.float64] = np.maximum(priced - priced[np.arange(len(priced)), choice][:, None], 0.0)
    return penalty


def _doubt(penalty: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[r]``: penalty of the second best choice of every row."""
    if penalty.shape[1] == 1:
        return np.full(len(penalty), np.inf)
    second: NDArray[np.float64] = np.partition(penalty, 1, axis=1)[:, 1]
    return second
