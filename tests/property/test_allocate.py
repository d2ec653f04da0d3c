"""Properties of the allocator against brute force, over scales, ties, duplicates and non-convex tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqsearch.allocate import AllocationProblem, solve, verify_certificate
from mpqsearch.errors import InfeasibleBudgetError

ROUNDING = 1e-12  # two float64 sums of a few losses in different orders


@st.composite
def problems(draw, max_items=5, max_choices=4):
    """Small problems: loss scales 1e-9 .. 1e9, costs up to 1e12, duplicates, zero costs, masks, any budget."""
    n, k = draw(st.integers(1, max_items)), draw(st.integers(1, max_choices))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loss = rng.random((n, k))
    kind = draw(st.sampled_from(["random", "coarse", "decaying", "eight decades"]))
    if kind == "coarse":
        loss = np.round(loss * 3)
    elif kind == "decaying":
        loss = rng.random((n, 1)) * 4.0 ** -np.arange(k) * (1 + 0.3 * loss)
    elif kind == "eight decades":
        loss = 10.0 ** (-8 * loss)
    loss = loss * 10.0 ** draw(st.integers(-9, 9))
    cost = rng.integers(0, draw(st.sampled_from([2, 9, 1000, 10**12])), size=(n, k))
    if draw(st.booleans()):
        cost = np.sort(cost, axis=1)
    allowed = rng.random((n, k)) < 0.8 if draw(st.booleans()) else np.ones((n, k), dtype=bool)
    allowed[np.arange(n), rng.integers(0, k, n)] = True
    least = int(np.where(allowed, cost, 2**60).min(axis=1).sum())
    most = int(np.where(allowed, cost, 0).max(axis=1).sum())
    limit = draw(st.integers(least, max(most, least)))
    return AllocationProblem(loss=loss, cost=cost, limit=limit, allowed=allowed)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_core_equals_brute_force_and_its_certificate_holds(problem):
    core, oracle = solve(problem, solver="core"), solve(problem, solver="exhaustive")
    assert core.status == "optimal"
    assert core.loss == pytest.approx(oracle.loss, rel=ROUNDING, abs=0)
    assert core.cost <= problem.limit
    assert core.dual_bound <= oracle.loss * (1 + ROUNDING)
    assert verify_certificate(problem, core)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_one_below_the_smallest_attainable_cost_is_refused_with_that_cost(problem):
    least = int(np.where(problem.allowed, problem.cost, 2**60).min(axis=1).sum())
    too_small = AllocationProblem(loss=problem.loss, cost=problem.cost, limit=least - 1, allowed=problem.allowed)
    with pytest.raises(InfeasibleBudgetError, match=str(least)):
        solve(too_small)
