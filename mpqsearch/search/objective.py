"""What one trial is worth: maps at every budget of the grid, measured rung by rung against the uniform maps of the same
size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mpqsearch.artifacts import digest_of
from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError, InfeasibleBudgetError
from mpqsearch.search.arms import uniform_candidate
from mpqsearch.search.ladder import Ladder
from mpqsearch.search.pruning import LEAST, is_clearly_worse
from mpqsearch.search.space import Space, Theta
from mpqsearch.search.surrogate import Candidate, Surrogate

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

INFEASIBLE = 5.0
"""Log ratio to uniform of a budget that the widths of a point cannot meet: finite, worse than anything that was ever
useful."""

Pruning = Literal["test", "instances", "means", "none"]
"""How a trial is cut short, see `Objective`."""

TARGET = "target_bits"
"""Name of the budget parameter in the mode with two objectives."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One map of a trial: all that is known of it. ``output`` and ``paired`` are None where the trial was pruned
    before."""

    budget: str
    digest: str
    size_bytes: int
    average_bits: float
    predicted: float
    output: float | None = None
    paired: float | None = None
    status: str = "none"
    gap: float = 0.0

    @classmethod
    def of(cls, candidate: Candidate, *, output: float | None = None, paired: float | None = None) -> Point:
        """A candidate with what was measured of it."""
        return cls(
            budget=candidate.budget.label(),
            digest=candidate.digest,
            size_bytes=candidate.size_bytes,
            average_bits=candidate.average_bits,
            predicted=candidate.predicted,
            output=output,
            paired=paired,
            status=candidate.status,
            gap=candidate.gap,
        )

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {k: getattr(self, k) for k in self.__dataclass_fields__}


@dataclass(kw_only=True)
class Objective:
    """Calls for an Optuna trial, in either mode.

    In *front* mode (`front`) the value is the mean over ``budgets`` of ``log(error / error of uniform at that
    budget)``: the logarithm of the area under the front, up to the grid. In *pareto* mode (`pareto`) the budget is a
    parameter and the values are the stored bits a parameter and the logarithm of the error.

    ``pruning`` says how a trial is cut short: ``test`` by `is_clearly_worse` over (budget, chunk of seeds) pairs,
    measured in an order of the trial's own; ``instances`` reports those pairs to the study's pruner under their own
    numbers, as `optuna.pruners.WilcoxonPruner` wants it; ``means`` reports running means in a fixed order, for all
    other pruners; ``none`` never. ``use_output`` measures rung 1 too.
    """

    surrogate: Surrogate
    space: Space
    ladder: Ladder
    budgets: tuple[Budget, ...]
    bits_range: tuple[float, float] = (2.0, 4.0)
    pruning: Pruning = "test"
    use_output: bool = True
    _uniform: dict[str, Candidate] = field(default_factory=dict, repr=False)
    _compared: tuple[Trial, float, dict[int, float]] | None = field(default=None, repr=False)

    def front(self, trial: Trial) -> float:
        """One point of the space at every budget; see the class."""
        began, asked, spent = time.perf_counter(), self.ladder.asked, self.ladder.spent
        theta = self.space.suggest(trial)
        candidates, missing = self.candidates(theta)
        if missing:
            trial.set_constraint("budgets out of reach", float(len(missing)))
        outputs: dict[int, float] = {}
        chunks: dict[int, dict[int, tuple[float, ...]]] = {k: {} for k in candidates}
        ratios: dict[int, float] = {}
        pruned = False
        for kind, k, index in self._order(trial.number, list(candidates)):
            uniform = self.uniform(self.budgets[k])
            if kind == "output":
                outputs[k] = self.ladder.output_error(candidates[k])
                ratio = _log_ratio([outputs[k]], [self.ladder.output_error(uniform)])
                step = k
            else:
                chunks[k][index] = self.ladder.chunk_errors(candidates[k], index)
                ratio = _log_ratio(chunks[k][index], self.ladder.chunk_errors(uniform, index))
                step = len(self.budgets) * (1 + index) + k
            ratios[step] = ratio
            if self._is_cut_short(trial, ratios):
                pruned = True
                break
        errors = {k: [e for i in sorted(got) for e in got[i]] for k, got in chunks.items()}
        value = self._estimate(trial, ratios) if pruned else self._value(errors, missing)
        points = [
            Point.of(
                c,
                output=outputs.get(k),
                paired=float(np.mean(errors[k])) if len(errors[k]) == len(self.ladder.seeds) else None,
            )
            for k, c in candidates.items()
        ]
        record = {
            "points": [p.to_data() for p in points],
            "pruned": pruned,
            "ratios": {str(step): ratio for step, ratio in ratios.items()},
            "forwards": self.ladder.asked - asked,
            "new_forwards": self.ladder.spent - spent,
            "seconds": round(time.perf_counter() - began, 3),
        }
        trial.set_user_attr("record", record)
        return value

    def pareto(self, trial: Trial) -> tuple[float, float]:
        """One point of the space at one budget, which is a parameter too; see the class."""
        began, asked, spent = time.perf_counter(), self.ladder.asked, self.ladder.spent
        low, high = self.bits_range
        target = trial.suggest_float(TARGET, low, high)
        candidate = self.surrogate.candidate(self.space.suggest(trial), Budget(quantity="uniform_bits", limit=target))
        output = self.ladder.output_error(candidate) if self.use_output else None
        error = self.ladder.paired_error(candidate)
        record = {
            "points": [Point.of(candidate, output=output, paired=error).to_data()],
            "pruned": False,
            "forwards": self.ladder.asked - asked,
            "new_forwards": self.ladder.spent - spent,
            "seconds": round(time.perf_counter() - began, 3),
        }
        trial.set_user_attr("record", record)
        return candidate.average_bits, math.log(max(error, 1e-30))

    def candidates(self, theta: Theta) -> tuple[dict[int, Candidate], list[int]]:
        """Maps by position of their budget, and the budgets that the widths of the point cannot meet."""
        found: dict[int, Candidate] = {}
        missing: list[int] = []
        for k, budget in enumerate(self.budgets):
            try:
                found[k] = self.surrogate.candidate(theta, budget)
            except InfeasibleBudgetError:
                missing.append(k)
        return found, missing

    def uniform(self, budget: Budget) -> Candidate:
        """The uniform map that the values are relative to."""
        label = budget.label()
        if label not in self._uniform:
            self._uniform[label] = uniform_candidate(self.surrogate, budget)
        return self._uniform[label]

    def value_of(self, candidates: Mapping[int, Candidate]) -> float:
        """The value in front mode of maps by position of their budget, measured through the ladder."""
        return self._value({k: list(self.ladder.errors(c)) for k, c in candidates.items()}, [])

    def _value(self, errors: Mapping[int, Sequence[float]], missing: Sequence[int]) -> float:
        ratios = [_log_ratio(errors[k], self.ladder.errors(self.uniform(self.budgets[k]))) for k in errors]
        return float(np.mean([*ratios, *([INFEASIBLE] * len(missing))]))

    def _order(self, number: int, budgets: list[int]) -> list[tuple[str, int, int]]:
        """Measurements of a trial: the cheap rung first, then (budget, chunk) pairs, shuffled by the trial's number
        where pairs are compared."""
        first = [("output", k, 0) for k in budgets] if self.use_output else []
        rest = [("samples", k, i) for i in range(self.ladder.chunks) for k in budgets]
        if self.pruning != "means":
            order = np.random.default_rng([number, 7]).permutation(len(rest))
            rest = [rest[int(j)] for j in order]
        return first + rest

    def _is_cut_short(self, trial: Trial, ratios: dict[int, float]) -> bool:
        """Whether what is known of a trial is enough; the last of ``ratios`` is new."""
        if self.pruning == "none":
            return False
        if self.pruning == "test":
            return len(ratios) >= LEAST and is_clearly_worse(ratios, self._best(trial)[1])
        step, ratio = next(reversed(ratios.items()))
        if self.pruning == "means":
            step, ratio = len(ratios), float(np.mean(list(ratios.values())))
        trial.report(ratio, step)
        return trial.should_prune()

    def _best(self, trial: Trial) -> tuple[float, dict[int, float]]:
        """Value and ratios by instance of the best trial; looked up once a trial, since a database takes long for
        it."""
        if self._compared is None or self._compared[0] is not trial:
            try:
                best = trial.study.best_trial
            except ValueError:  # none has ended
                self._compared = (trial, math.inf, {})
            else:
                assert best.value is not None
                recorded = (finished_record(best) or {}).get("ratios", {})
                self._compared = (trial, best.value, {int(step): ratio for step, ratio in recorded.items()})
        return self._compared[1:]

    def _estimate(self, trial: Trial, ratios: Mapping[int, float]) -> float:
        """Value of a pruned trial: the best trial's, plus the mean difference over what both were measured on, never
        below the best.

        The sampler learns more from it than from a bare failure, and a trial that was cut short can never become the
        best one.
        """
        value, best = self._best(trial)
        common = sorted(set(ratios) & set(best))
        if not common:
            return value + 1.0
        return value + max(float(np.mean([ratios[s] - best[s] for s in common])), 1e-6)

    @property
    def context(self) -> dict[str, str]:
        """Digests of what the values of a study depend on; a study is never continued under another one."""
        s = self.surrogate
        return {
            "measurements": self.ladder.evaluator.identity,
            "search seeds": digest_of([list(self.ladder.seeds), self.ladder.chunk]),
            "budgets": digest_of([b.label() for b in self.budgets] + [list(self.bits_range)]),
            "space": digest_of(self.space.to_data()),
            "method": digest_of([str(s.method), s.policy.to_data(), s.format.to_data()]),
            "model": s.table.digest,
            "correction": digest_of(None if s.correction is None else np.round(np.log(s.correction), 9).tolist()),
        }


def finished_record(trial: FrozenTrial) -> dict[str, Any] | None:
    """What a trial recorded, or None when it did not get that far."""
    record = trial.user_attrs.get("record")
    return record if isinstance(record, dict) else None


def _log_ratio(errors: Sequence[float], uniform: Sequence[float]) -> float:
    """``log(mean error / mean error of uniform)``; exact zeros (nothing was quantized) are held above 0."""
    return math.log(max(float(np.mean(errors)), 1e-30) / max(float(np.mean(uniform)), 1e-30))


def check_budgets(budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    """The budget grid of a search: distinct, not empty, sizes only."""
    if not budgets or len({b.label() for b in budgets}) != len(budgets):
        raise ConfigError(f"a search needs distinct budgets, got {[b.label() for b in budgets]}")
    return tuple(budgets)


ObjectiveFunction = Callable[["Trial"], "float | tuple[float, float]"]
