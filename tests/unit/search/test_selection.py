"""Measured selection: the best of a handful of maps, as soon as it is clear."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mpqsearch.core import BitMap, Budget
from mpqsearch.errors import NumericsError
from mpqsearch.search.selection import APART, FIRST, Rival, log_ratio, select
from mpqsearch.search.surrogate import Candidate

SEEDS = range(3_000_000, 3_000_016)


def rivals(predicted: Sequence[float]) -> list[Rival]:
    found = []
    for i, loss in enumerate(predicted):
        bit_map = BitMap(model_digest="m", weights={"a": np.array(1 + i)})
        candidate = Candidate(
            bit_map=bit_map, budget=Budget.parse("3bit"), bias_correction=False, predicted=loss, size_bytes=10,
            average_bits=3.0,
        )  # fmt: skip
        found.append(Rival(label=f"map {i}", candidate=candidate))
    return found


class Bench:
    """Errors of a lognormal of which all maps share most of the noise, as samples of the same seeds do."""

    def __init__(self, some: Sequence[Rival], means: Sequence[float], own: float = 0.05) -> None:
        self.means = {r.candidate.digest: m for r, m in zip(some, means, strict=True)}
        self.own, self.n = own, 0

    def __call__(self, candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        self.n += len(seeds)
        index = list(self.means).index(candidate.digest)
        mean = self.means[candidate.digest]
        if np.isnan(mean):
            raise NumericsError("not finite")
        shared = [np.random.default_rng(s).normal() for s in seeds]
        alone = [np.random.default_rng([s, index]).normal() for s in seeds]
        return [float(mean * np.exp(a + self.own * b)) for a, b in zip(shared, alone, strict=True)]


def test_the_best_is_handed_out_and_bad_ones_cost_little() -> None:
    some = rivals([9, 1, 2, 3, 4, 5, 6, 7])
    bench = Bench(some, [8, 5, 4, 2, 1, 3, 6, 7])
    found = select(some, bench, SEEDS)
    assert found.chosen is some[4]
    assert not found.close
    assert bench.n <= FIRST * 8 + FIRST * 4, "what is clear after a round is not measured on"
    rows = found.to_data()["rows"]
    assert [r["verdict"] for r in rows].count("chosen") == 1
    assert rows[0]["ratio"] == pytest.approx(8, rel=0.3)
    assert min(r["ratio"] for r in rows) == 1


def test_what_cannot_be_told_apart_goes_to_the_safest() -> None:
    some = rivals([1, 2, 3])
    factors = {some[0].candidate.digest: (1, 1), some[1].candidate.digest: (0.3, 1.6), some[2].candidate.digest: (5, 6)}

    def measure(candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        return [float(factors[candidate.digest][s % 2]) for s in seeds]

    found = select(some, measure, SEEDS)
    assert found.chosen is some[0]
    assert [r.label for r in found.close] == ["map 1"]
    assert found.to_data()["rows"][1]["verdict"] == APART


def test_samples_that_do_not_react_choose_nothing() -> None:
    some = rivals([3, 2, 1])
    found = select(some, lambda candidate, seeds: [0.0] * len(seeds), SEEDS)
    assert found.chosen is some[0]
    assert len(found.close) >= 1
    assert found.to_data()["rows"][0]["ratio"] is None


def test_maps_whose_samples_are_not_finite_are_out() -> None:
    some = rivals([1, 2, 3])
    found = select(some, Bench(some, [float("nan"), 2, 1]), SEEDS)
    assert found.chosen is some[2]
    assert found.to_data()["rows"][0]["verdict"] == "not finite"
    assert found.to_data()["rows"][0]["error"] is None
    other = rivals([1, 2])
    with pytest.raises(NumericsError, match="no candidate has finite samples"):
        select(other, Bench(other, [float("nan")] * 2), SEEDS)


def test_one_candidate_is_measured_once_and_never_worse_than_uniform() -> None:
    (only,) = rivals([1])
    assert select([only], Bench([only], [1]), SEEDS).chosen is only
    assert len(only.errors) == FIRST
    wins = 0
    for trial in range(20):  # the first is the uniform map: it is chosen whenever it is better by a noticeable amount
        some = rivals([5, 1, 2])
        found = select(some, Bench(some, [1, 1.5, 2]), range(100 * trial, 100 * trial + 16))
        wins += found.chosen is some[0]
    assert wins == 20


def test_the_error_of_a_ratio_is_that_of_paired_seeds() -> None:
    a, b = rivals([1, 2])
    rng = np.random.default_rng(0)
    a.errors = np.exp(rng.normal(size=400)).tolist()
    b.errors = [2 * e * float(np.exp(0.1 * rng.normal())) for e in a.errors]
    value, error = log_ratio(b, a)
    assert value == pytest.approx(np.log(2), abs=4 * error)
    assert 0.002 < error < 0.02
    assert np.isnan(log_ratio(Rival(label="x", candidate=a.candidate, errors=[1.0]), a)[1])


def test_the_rank_correlation_of_predictions_is_kept() -> None:
    some = rivals([1, 2, 3, 4])
    found = select(some, Bench(some, [4, 3, 2, 1]), SEEDS)
    assert found.spearman == pytest.approx(-1)
    assert found.to_data()["spearman"] == -1
