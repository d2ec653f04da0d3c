from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mpqsearch.ranks import spearman, spearman_interval


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 12), rng.integers(0, 6, 12)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize("pairs", [([1, 1, 1], [1, 2, 3]), ([1, 2], [1, 2]), ([], [])])
def test_without_spread_or_pairs_there_is_no_correlation(pairs: tuple[list[float], list[float]]) -> None:
    assert np.isnan(spearman(*pairs))


def test_bootstrap_interval_holds_the_value_and_narrows() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=400)
    b = a + rng.normal(size=400)
    few, many = spearman_interval(a[:30], b[:30]), spearman_interval(a, b)
    assert many[0] < spearman(a, b) < many[1]
    assert few[1] - few[0] > 2 * (many[1] - many[0])
    assert spearman_interval(a[:30], b[:30]) == few
    assert spearman_interval([1, 2, 3], [1, 2, 3])[1] == 1.0
