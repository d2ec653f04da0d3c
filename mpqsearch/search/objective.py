"""What one trial is worth: a map at every budget, measured on more and more seeds against the uniform maps of the same
size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch.artifacts import digest_of
from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, NumericsError
from mpqsearch.search.measure import Measurements
from mpqsearch.search.space import Space
from mpqsearch.search.surrogate import Candidate, Surrogate

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

POINTS = "points"
"""User attribute of a trial: its maps, as `Point` data."""

SAMPLES = "samples"
"""User attribute of a trial: how many samples it took, those from the cache counted too."""

REASON = "reason"
"""User attribute of a trial that was given up: what was wrong with its maps."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One map of a trial. ``error`` is the mean over the search seeds; None where the trial was pruned before."""

    budget: str
    digest: str
    size_bytes: int
    average_bits: float
    predicted: float
    error: float | None

    @classmethod
    def of(cls, candidate: Candidate, error: float | None) -> Point:
        """A candidate with what was measured of it."""
        return cls(
            budget=candidate.budget.label(),
            digest=candidate.digest,
            size_bytes=candidate.size_bytes,
            average_bits=candidate.average_bits,
            predicted=candidate.predicted,
            error=error,
        )


@dataclass(kw_only=True)
class Objective:
    """A function of an Optuna trial: the mean over ``budgets`` of ``log(error / error of the uniform map)``.

    That is the logarithm of the area under the front, up to the grid. A trial reports to the study's pruner after every
    chunk of search seeds: its value so far or, to a `WilcoxonPruner`, the log ratio of every seed under the seed's own
    number. Points whose budgets are out of reach or whose samples are not finite are pruned, with the reason in a user
    attribute.
    """

    surrogate: Surrogate
    space: Space
    measurements: Measurements
    budgets: tuple[Budget, ...]
    _baselines: list[list[float]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.budgets or len({b.label() for b in self.budgets}) != len(self.budgets):
            raise ConfigError(f"a search needs distinct budgets, got {[b.label() for b in self.budgets]}")

    def __call__(self, trial: Trial) -> float:
        """The value of one point of the space."""
        from optuna import TrialPruned

        theta = self.space.suggest(trial)
        if not self._baselines:  # errors of the uniform maps, without which there is no trial
            self._baselines = [self.measurements.errors(self.surrogate.uniform(b)) for b in self.budgets]
        try:
            return self._measured(trial, [self.surrogate.candidate(theta, b) for b in self.budgets])
        except (InfeasibleBudgetError, NumericsError) as error:
            trial.set_user_attr(REASON, str(error))
            raise TrialPruned(str(error)) from error

    def _measured(self, trial: Trial, candidates: Sequence[Candidate]) -> float:
        from optuna import TrialPruned

        errors: list[list[float]] = [[] for _ in candidates]
        value, prune = 0.0, False
        for seeds in self.measurements.chunks:
            before = len(errors[0])
            for k, candidate in enumerate(candidates):
                errors[k] += self.measurements.chunk_errors(candidate, seeds)
            value = value_of(errors, self._baselines)
            self._report(trial, errors, before, value)
            prune = len(errors[0]) < len(self.measurements.seeds) and trial.should_prune()
            if prune:
                break
        points = [Point.of(c, None if prune else float(np.mean(e))) for c, e in zip(candidates, errors, strict=True)]
        trial.set_user_attr(POINTS, [asdict(p) for p in points])
        trial.set_user_attr(SAMPLES, sum(len(e) for e in errors))
        if prune:
            raise TrialPruned
        return value

    def _report(self, trial: Trial, errors: Sequence[Sequence[float]], before: int, value: float) -> None:
        """Tell the pruner what the seeds from number ``before`` on have shown."""
        from optuna.pruners import WilcoxonPruner

        if not isinstance(trial.study.pruner, WilcoxonPruner):
            trial.report(value, len(errors[0]))
            return
        for i in range(before, len(errors[0])):
            trial.report(value_of([[e[i]] for e in errors], [[b[i]] for b in self._baselines]), i)

    @property
    def context(self) -> dict[str, str]:
        """Digests of what the values of a study depend on; a study is never continued under another one."""
        s, m = self.surrogate, self.measurements
        return {
            "measurements": m.evaluator.identity,
            "search seeds": digest_of([list(m.seeds), m.chunk]),
            "budgets": digest_of([b.label() for b in self.budgets]),
            "space": digest_of(self.space.to_data()),
            "method": digest_of([str(s.method), s.policy.to_data(), s.format.to_data()]),
            "model": s.table.digest,
        }


def value_of(errors: Sequence[Sequence[float]], baselines: Sequence[Sequence[float]]) -> float:
    """Mean over budgets of the log ratio of mean errors, over the seeds that were measured. Exact zeros (nothing was
    quantized) are held above 0."""

    def log_mean(values: Sequence[float]) -> float:
        return math.log(max(float(np.mean(values)), 1e-30))

    return float(np.mean([log_mean(e) - log_mean(b[: len(e)]) for e, b in zip(errors, baselines, strict=True)]))


def points_of(trial: FrozenTrial) -> list[dict[str, Any]]:
    """The maps of a trial, as `Point` data; none before it has measured them."""
    return list(trial.user_attrs.get(POINTS, []))
