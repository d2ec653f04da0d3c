"""Several budgets, limits on the number of formats, and named solvers: a Lagrangian bound, and integer programs.

1. The best multipliers give a lower bound and, for limits on formats, the sets of formats that look best.
2. Within such sets the exact core (one budget) or small integer programs near the break (several) give an answer.
3. A choice whose penalty at the multipliers exceeds the gap is in no better answer. An integer program through PuLP
   takes the rest, when they are at most ``MAX_CELLS``; else the answer of step 2 stays, with its certified gap.

Of more than ``PROVEN_ROWS`` rows an answer is good enough at a certified gap of ``ENOUGH``: losses are measured to some
per cent, and the last ten-thousandth takes HiGHS ten times as long as all before.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import dual, ilp, infeasible, mckp
from mpqsearch.allocate.certificate import broken_rule
from mpqsearch.allocate.problem import AllocationProblem, Floats
from mpqsearch.allocate.result import Answer, Proof
from mpqsearch.allocate.tables import Tables, total_loss
from mpqsearch.errors import SolverError

MAX_CELLS = 20_000
"""Choices left in doubt up to which the whole integer program is tried."""

CORE_ROWS = 72
"""Rows nearest to a change of mind that are solved alone first."""

PROVEN_ROWS = 1_000
"""Rows up to which an answer is proven to be the best."""

ENOUGH = 1e-4
"""Relative gap at which an answer is good enough beyond that."""

PATIENCE_S = 60.0
"""Seconds after which no further integer program is started, and that one may take."""


class NothingFoundError(Exception):
    """No admissible choice was found; ``impossible`` when there is none, by the solver's word."""

    def __init__(self, *, impossible: bool) -> None:
        super().__init__("no admissible choice was found")
        self.impossible = impossible


def solve_constrained(problem: AllocationProblem, tables: Tables, solver: str) -> Answer:
    """Best answer for any budgets and limits on formats; of a plain problem, the answer of the solver that was named.

    Raises:
        InfeasibleBudgetError: Nothing meets all constraints.
        NothingFoundError: No admissible choice was found in the time given.
        SolverError: A plain problem is too large for the solver that was named.
    """
    search = _Search(problem, tables, "highs" if solver == "auto" else solver)
    if problem.constrained:
        search.improve_in_patterns()
    else:
        search.offer(mckp.relax(tables.loss, tables.costs[0], tables.limits[0]).choice, solver)
    if not search.close_enough() and not search.improve_by_program() and not problem.constrained:
        raise SolverError(
            f"more than {MAX_CELLS} choices are in doubt, too many for {solver}. Use solver='auto', which is exact."
        )
    return search.answer()


class _Search:
    """The best choice so far and the bound it is held against."""

    def __init__(self, problem: AllocationProblem, tables: Tables, solver: str) -> None:
        self.problem, self.tables, self.solver = problem, tables, solver
        self.gap_tolerance = ENOUGH if problem.constrained and len(tables.loss) > PROVEN_ROWS else 0.0
        self.few = dual.format_limits(problem.n_choices, problem.max_formats, problem.max_formats_per_layer)
        if self.few is not None:
            infeasible.check_formats(problem, tables, self.few)
        self.until = time.perf_counter() + PATIENCE_S
        self.dual = dual.maximize(tables, self.few, max(dual.TOLERANCE, self.gap_tolerance / 20), self.until)
        self.floor = self.dual.best.value
        self.choice: NDArray[np.int32] | None = None
        self.loss = float("inf")
        self.by_solver = self.impossible = False
        self.used_solver = "core"

    def gap(self) -> float:
        """What is not certified yet, in units of the loss."""
        gap = self.loss - self.floor
        return 0.0 if gap <= mckp.ROUNDING * abs(self.loss) else gap

    def close_enough(self) -> bool:
        """Whether the gap is small enough."""
        return self.choice is not None and self.gap() <= self.gap_tolerance * abs(self.loss)

    def done(self) -> bool:
        """Whether to look for nothing better."""
        return time.perf_counter() > self.until or self.close_enough()

    def offer(self, choice: NDArray[np.int32], solver: str) -> None:
        """Keep a choice if it is admissible and better than the best one."""
        loss = total_loss(self.tables.loss, choice)
        if loss < self.loss and self.tables.fits(choice) and not broken_rule(self.problem, self.tables.expand(choice)):
            self.choice, self.loss, self.used_solver = choice, loss, solver

    def improve_in_patterns(self) -> None:
        """Answers within the sets of formats that the multipliers chose."""
        for at in self.dual.patterns:
            self.offer(at.choice, "dual")
        for at in self.dual.patterns:
            if self.done():
                return
            loss = self.tables.loss if at.formats is None else np.where(at.formats, self.tables.loss, np.inf)
            within = replace(self.tables, loss=loss)
            starts = [at.choice, *self._filled(within, at)]
            if len(self.tables.limits) > 1:
                self._solve_near_break(within, at, min(starts, key=lambda c: _nearness(within, c)))

    def _filled(self, within: Tables, at: dual.Evaluation) -> list[NDArray[np.int32]]:
        """The exact core's answers for one budget at a time, with the prices of all others in the losses.

        Such a program relaxes the other budgets only, so its bound holds for the whole problem.
        """
        answers = []
        for number, (cost, limit) in enumerate(zip(within.costs, within.limits, strict=True)):
            others = np.where(np.arange(len(at.rates)) == number, 0.0, at.rates)
            try:
                solved = mckp.solve_table(dual.prices(within, others), cost, limit)
            except mckp.BudgetTooSmallError:  # too small within these formats
                continue
            self.offer(solved.choice, "core")
            answers.append(solved.choice)
            if self.few is None:
                paid = float(others @ np.array(within.limits, dtype=np.float64))
                slip = mckp.ROUNDING * abs(solved.loss) if others.any() else 0.0
                self.floor = max(self.floor, solved.floor - paid - slip)
        return answers

    def _solve_near_break(self, within: Tables, at: dual.Evaluation, start: NDArray[np.int32]) -> None:
        """Solve for the rows whose choice is most in doubt, all others held as in a start."""
        doubt = np.sort(_penalties(within, at), axis=1)[:, 1:2]  # of the second best choice; nothing with one choice
        order, rows = np.argsort(doubt.sum(axis=1), kind="stable"), np.arange(len(start))
        if len(order) > CORE_ROWS and not self.done():
            held = np.full(within.loss.shape, np.inf)
            held[rows, start] = within.loss[rows, start]
            held[order[:CORE_ROWS]] = within.loss[order[:CORE_ROWS]]
            self._program(held)

    def improve_by_program(self) -> bool:
        """The integer program over every choice that could be part of a better answer; False when it is too large."""
        plain = self.dual.best if self.few is None else dual.evaluate(self.tables, self.dual.best.rates, None)
        penalty = _penalties(self.tables, plain)
        open_loss = np.where(penalty <= self.loss - plain.value, self.tables.loss, np.inf)
        finite = np.isfinite(open_loss)
        modelled = finite if self.few is not None else finite[finite.sum(axis=1) > 1]
        if int(modelled.sum()) > MAX_CELLS or time.perf_counter() > self.until:
            return False
        outcome = self._program(open_loss, _format_rules(self.problem, self.tables))
        self.impossible = outcome.infeasible and self.choice is None
        self.by_solver = outcome.proven or (outcome.infeasible and self.choice is not None)
        return True

    def _program(self, loss: Floats, rules: tuple[ilp.FormatRule, ...] = ()) -> ilp.IlpAnswer:
        """Solve for the rows with more than one finite loss; offer the answer, and say whether it was admissible."""
        tables, choice = self.tables, np.argmin(loss, axis=1).astype(np.int32)
        is_open = np.isfinite(loss).sum(axis=1) > (0 if rules else 1)  # the formats of all rows count
        if not is_open.any():
            return ilp.IlpAnswer(None, proven=False, infeasible=not tables.fits(choice))
        rest = np.flatnonzero(~is_open)
        paid = [int(cost[rest, choice[rest]].sum(dtype=np.int64)) for cost in tables.costs]
        known = self.choice is not None
        outcome = ilp.solve_ilp(
            loss[is_open].astype(np.float64),
            tuple(cost[is_open] for cost in tables.costs),
            tuple(limit - spent for limit, spent in zip(tables.limits, paid, strict=True)),
            ilp.Effort(
                solver=self.solver,
                gap=self.gap_tolerance / 2 * abs(self.loss) if known else 0.0,
                seconds=self.until - time.perf_counter(),
            ),
            reference=self.loss - total_loss(loss[rest], choice[rest]) if known else None,
            formats=rules,
        )
        if outcome.choice is None:
            return outcome
        choice[is_open] = outcome.choice
        self.offer(choice, self.solver)
        # A float solver may overstep a limit by its tolerance: then nothing is proven.
        return replace(outcome, proven=outcome.proven and tables.fits(choice))

    def answer(self) -> Answer:
        """The best choice, and what is proven about it."""
        if self.choice is None:
            raise NothingFoundError(impossible=self.impossible)
        best = self.dual.best
        proof: Proof = "none"
        if self.loss - best.value <= mckp.ROUNDING * abs(self.loss):
            proof = "bound"
        elif not self.gap():
            proof = "search"
        elif self.by_solver and self.gap_tolerance == 0:
            proof = "solver"
        return Answer(
            choice=self.choice,
            proof=proof,
            floor=self.floor,
            dual_bound=best.value,
            multipliers=tuple(float(rate) for rate in best.rates),
            solver=self.used_solver,
        )


def _format_rules(problem: AllocationProblem, tables: Tables) -> tuple[ilp.FormatRule, ...]:
    """The limits on formats, over rows instead of items."""
    rules = []
    if problem.max_formats is not None:
        rules.append(ilp.FormatRule(problem.max_formats, np.arange(len(tables.loss)), np.zeros(len(tables.loss), int)))
    if problem.max_formats_per_layer is not None and problem.layer is not None:
        members = np.unique(np.stack([tables.row, problem.layer], axis=1), axis=0)
        rules.append(ilp.FormatRule(problem.max_formats_per_layer, members[:, 0], members[:, 1]))
    return tuple(rules)


def _penalties(tables: Tables, at: dual.Evaluation) -> NDArray[np.float64]:
    """``[r, k]``: what every choice costs beyond the minimizer at the multipliers."""
    priced = dual.prices(tables, at.rates)
    penalty: NDArray[np.float64] = np.maximum(priced - priced[np.arange(len(priced)), at.choice][:, None], 0.0)
    return penalty


def _nearness(within: Tables, choice: NDArray[np.int32]) -> tuple[float, float]:
    """What exceeds the limits, each as a share of its limit, and the loss."""
    spent = zip(within.spent(choice), within.limits, strict=True)
    return sum(max(used - limit, 0) / max(limit, 1) for used, limit in spent), total_loss(within.loss, choice)
