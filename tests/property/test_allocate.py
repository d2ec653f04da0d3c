"""Properties of the allocator against brute force, over scales, ties, duplicates and non-convex tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqsearch.allocate import check_certificate, solve, solve_path
from mpqsearch.errors import InfeasibleBudgetError
from tests.support import brute
from tests.support.problems import changed, problem_of

ROUNDING = 1e-12  # two float64 sums of a few losses in different orders


def checked(problem, result):
    return check_certificate(result.certificate(problem), problem, result.choice)


@st.composite
def problems(draw, max_items=5, max_choices=4):
    """Small problems: loss scales 1e-12 .. 1e12, costs up to 1e12, duplicates, zero costs, masks, any budget."""
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
    loss = (loss * 10.0 ** draw(st.integers(-12, 12))).astype(draw(st.sampled_from([np.float32, np.float64])))
    cost = rng.integers(0, draw(st.sampled_from([2, 9, 1000, 10**12])), size=(n, k))
    if draw(st.booleans()):
        cost = np.sort(cost, axis=1)
    allowed = rng.random((n, k)) < 0.8 if draw(st.booleans()) else np.ones((n, k), dtype=bool)
    allowed[np.arange(n), rng.integers(0, k, n)] = True
    least = int(np.where(allowed, cost, 2**60).min(axis=1).sum())
    most = int(np.where(allowed, cost, 0).max(axis=1).sum())
    limit = draw(st.integers(least, max(most, least)))
    return problem_of(loss=loss, cost=cost, limit=limit, allowed=allowed)


@settings(max_examples=400, deadline=None)
@given(problems())
def test_the_core_equals_brute_force_and_its_certificate_holds(problem):
    core, least = solve(problem), brute.least(problem)
    assert core.status == "optimal"
    assert core.loss == pytest.approx(least, rel=ROUNDING, abs=0)
    assert brute.admissible(problem, tuple(core.choice.tolist()))
    assert core.dual_bound <= least * (1 + ROUNDING)
    assert checked(problem, core).valid, checked(problem, core)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_one_below_the_smallest_attainable_cost_is_refused_with_that_cost(problem):
    least = int(np.where(problem.allowed, problem.budgets[0].cost, 2**60).min(axis=1).sum())
    too_small = problem_of(loss=problem.loss, cost=problem.budgets[0].cost, limit=least - 1, allowed=problem.allowed)
    with pytest.raises(InfeasibleBudgetError, match=str(least)):
        solve(too_small)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(-15, 15), st.integers(1, 1000), st.randoms(use_true_random=False))
def test_scaling_shifting_and_reordering_leave_the_optimum(problem, decade, factor, random):
    """P5: units, constants per item and the order of items and choices are not part of the problem."""
    reference = solve(problem)
    scaled = solve(
        problem_of(
            loss=problem.loss.astype(np.float64) * 10.0**decade,
            cost=problem.budgets[0].cost,
            limit=problem.budgets[0].limit,
            allowed=problem.allowed,
        )
    )
    assert scaled.loss == pytest.approx(reference.loss * 10.0**decade, rel=ROUNDING, abs=0)
    cost, limit = problem.budgets[0].cost, problem.budgets[0].limit
    if int(cost.max()) < 10**9:
        sized = problem_of(loss=problem.loss, cost=cost * factor, limit=limit * factor, allowed=problem.allowed)
        assert solve(sized).loss == pytest.approx(reference.loss, rel=ROUNDING, abs=0)
    items, choices = list(range(problem.n_items)), list(range(problem.n_choices))
    random.shuffle(items)
    random.shuffle(choices)
    shuffled = problem_of(
        loss=problem.loss[items][:, choices],
        cost=problem.budgets[0].cost[items][:, choices],
        limit=problem.budgets[0].limit,
        allowed=problem.allowed[items][:, choices],
    )
    assert solve(shuffled).loss == pytest.approx(reference.loss, rel=ROUNDING, abs=0)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_more_budget_is_never_worse_and_the_bound_is_convex(problem):
    """P3: over the whole path, losses fall, bounds fall and bend upwards, and no optimum is below them."""
    path = solve_path(problem)
    limits = np.unique(np.linspace(path.budgets[0], path.budgets[-1] + 2, 7).astype(np.int64))
    optima = [solve(changed(problem, limit=int(limit))).loss for limit in limits]
    bounds = [path.lower_bound(int(limit)) for limit in limits]
    vertices = [path.vertex(int(limit)) for limit in limits]
    slip = ROUNDING * max(abs(optima[0]), 1e-300)
    assert all(later <= earlier + slip for earlier, later in itertools.pairwise(optima))
    assert all(bound <= best + slip for bound, best in zip(bounds, optima, strict=True))
    for vertex, limit, best in zip(vertices, limits, optima, strict=True):
        loss, (cost,) = problem.evaluate(path.choice(vertex))
        assert loss == pytest.approx(path.losses[vertex], rel=1e-9, abs=slip)
        assert loss >= best - slip
        assert cost == path.budgets[vertex] <= limit
    assert np.all(np.diff(path.rates) <= 0)
    assert np.all(np.diff(path.budgets) > 0)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_dominated_and_duplicated_choices_change_nothing(problem):
    """P7."""
    worse = np.column_stack([problem.loss, problem.loss[:, 0] * 2 + 1, problem.loss[:, -1]])
    cost = problem.budgets[0].cost
    dearer = np.column_stack([cost, cost[:, 0] + 1, cost[:, -1]])
    allowed = np.column_stack([problem.allowed, problem.allowed[:, 0], problem.allowed[:, -1]])
    more = problem_of(loss=worse, cost=dearer, limit=problem.budgets[0].limit, allowed=allowed)
    assert solve(more).loss == pytest.approx(solve(problem).loss, rel=ROUNDING, abs=0)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_groups_equal_brute_force(problem, seed):
    """P9: groups merge rows."""
    rng = np.random.default_rng(seed)
    asked = changed(problem, groups=rng.integers(-1, 2, problem.n_items))
    least = brute.least(asked)
    if least is None:
        with pytest.raises(InfeasibleBudgetError, match="smallest attainable|choice in common"):
            solve(asked)
        return
    core = solve(asked)
    assert core.loss == pytest.approx(least, rel=ROUNDING, abs=0)
    assert brute.admissible(asked, tuple(core.choice.tolist()))
    assert checked(asked, core).valid
