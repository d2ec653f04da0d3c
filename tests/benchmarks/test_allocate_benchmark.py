"""The allocator under pytest-benchmark; the full table is ``allocate_benchmark.py``."""

from __future__ import annotations

import numpy as np
import pytest

from mpqsearch.allocate import AllocationProblem, CostBudget, check_certificate, solve, solve_path


@pytest.fixture(scope="module")
def channels():
    rng = np.random.default_rng(0)
    weights = np.repeat(rng.integers(300, 11_000, 200), 100)
    loss = (rng.lognormal(0, 2, weights.size) * weights)[:, None] * 4.0 ** -np.arange(2, 9)
    bits = CostBudget(name="bits", cost=weights[:, None] * np.arange(2, 9), limit=int(4.4 * weights.sum()))
    return AllocationProblem(loss=loss, budgets=(bits,))


def test_proven_optimum(benchmark, channels):
    assert benchmark(solve, channels).status == "optimal"


def test_whole_path(benchmark, channels):
    assert benchmark(solve_path, channels).budgets.size > 10_000


def test_certificate(benchmark, channels):
    result = solve(channels)
    assert benchmark(check_certificate, result.certificate(channels), channels, result.choice).valid
