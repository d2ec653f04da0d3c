from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.search.cache import Measured
from mpqsearch.search.ladder import Ladder, rung_correlations, spearman, spearman_interval
from mpqsearch.search.objective import Objective
from mpqsearch.search.surrogate import Surrogate


def test_a_map_is_measured_once_whatever_found_it(make_objective: Callable[..., Objective], tmp_path: Path) -> None:
    o = make_objective(folder=tmp_path)
    first = o.surrogate.candidate({}, o.budgets[0])
    again = o.surrogate.candidate({"exponent": 1.0, "low_bits": 0.0}, o.budgets[0])
    error = o.ladder.paired_error(first)
    spent = o.ladder.spent
    assert o.ladder.paired_error(again) == error
    assert (o.ladder.spent, o.ladder.asked) == (spent, 2 * spent)
    assert len(o.ladder.evaluator.measured) == o.ladder.chunks

    other = make_objective(folder=tmp_path)  # another process would do the same: only the files are shared
    assert other.ladder.paired_error(first) == error
    assert other.ladder.spent == 0
    assert not other.ladder.evaluator.measured


def test_errors_come_in_chunks_of_the_same_seeds(make_objective: Callable[..., Objective]) -> None:
    o = make_objective()
    a, b = (o.surrogate.candidate({}, budget) for budget in o.budgets)
    assert len(o.ladder.errors(a)) == 8
    ratio = np.array(o.ladder.errors(a)) / np.array(o.ladder.errors(b))
    np.testing.assert_allclose(ratio, ratio[0])  # common random numbers: the seeds' factors are the same for both


def test_a_value_that_is_not_finite_fails_the_trial(make_surrogate: Callable[..., Surrogate]) -> None:
    class Broken:
        identity = "broken"

        def sample_errors(self, candidate: object, seeds: object) -> Measured:
            return Measured(values=(1.0, math.inf), forwards=2)

    s = make_surrogate()
    ladder = Ladder(evaluator=Broken(), seeds=(0, 1), chunk=2)
    with pytest.raises(NumericsError, match="samples errors of the map .* at uniform:3 are not finite"):
        ladder.paired_error(s.candidate({}, Budget.parse("uniform:3")))


def test_a_ladder_needs_seeds_and_a_chunk() -> None:
    with pytest.raises(ConfigError, match="at least 2 seeds"):
        Ladder(evaluator=None, seeds=(0,), chunk=1)


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 40).astype(float)  # many ties
    y = x + rng.normal(size=40)
    assert spearman(x.tolist(), y.tolist()) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    low, high = spearman_interval(x.tolist(), y.tolist())
    assert low < spearman(x.tolist(), y.tolist()) < high
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


def test_correlations_between_rungs_are_taken_within_a_budget() -> None:
    # Within each budget the cheap rung is upside down; pooled over budgets it would look perfect.
    points = [
        {"budget": b, "predicted": 100 * i + k, "paired": 100 * i - k}
        for i, b in enumerate(("uniform:2", "uniform:3"))
        for k in range(5)
    ]
    (row,) = rung_correlations(points)
    assert (row["cheap"], row["dear"], row["spearman"], row["maps"]) == ("predicted", "paired", -1.0, 10)
