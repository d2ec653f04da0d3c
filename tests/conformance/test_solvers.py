"""One suite for every solver: what any of them must do with any problem that it takes."""

from __future__ import annotations

import numpy as np
import pytest

from mpqsearch.allocate import check_certificate, solve
from mpqsearch.errors import InfeasibleBudgetError, UnknownNameError
from tests.support import brute
from tests.support.problems import grouped, problem_of

ALL = ["auto", "core", "highs", "cbc"]
SAME = 1e-12  # two float64 sums of the same losses


def instance(seed, n=6, k=4, scale=1.0, decades=6):
    rng = np.random.default_rng(seed)
    loss = 10.0 ** (-decades * rng.random((n, k))) * scale
    cost = np.sort(rng.integers(1, 2000, (n, k)), axis=1)
    limit = int((cost.min(axis=1).sum() + cost.max(axis=1).sum()) // 2)
    return {"loss": loss, "cost": cost, "limit": limit}


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_answer_is_admissible_recosted_and_certified(solver, seed):
    problem = problem_of(**instance(seed))
    result = solve(problem, solver=solver)
    rows = np.arange(problem.n_items)
    assert result.costs["cost"] == int(problem.budgets[0].cost[rows, result.choice].sum()) <= problem.budgets[0].limit
    assert result.loss == pytest.approx(float(problem.loss[rows, result.choice].sum()), rel=SAME)
    assert result.dual_bound <= result.lower_bound * (1 + SAME)
    assert result.lower_bound <= result.loss * (1 + SAME)
    check = check_certificate(result.certificate(problem), problem, result.choice)
    assert check.valid, check


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e-4, 1.0, 1e9, 1e15])
def test_optimal_means_optimal_at_every_scale(solver, scale):
    problem = problem_of(**instance(7, scale=scale))
    result = solve(problem, solver=solver)
    assert result.status == "optimal"
    assert result.gap == 0 or result.proof == "solver"
    assert result.loss == pytest.approx(brute.least(problem), rel=SAME, abs=0)


@pytest.mark.parametrize("solver", ALL)
def test_costs_of_a_size_that_float_solvers_confuse(solver):
    """Sizes of 1e12 and a budget of one unit less than an attainable total."""
    rng = np.random.default_rng(3)
    loss = np.sort(rng.random((6, 3)), axis=1)[:, ::-1]
    cost = np.sort(rng.integers(10**9, 10**12, (6, 3)), axis=1)
    limit = int(cost[:, 1].sum()) - 1
    problem = problem_of(loss=loss, cost=cost, limit=limit)
    result = solve(problem, solver=solver)
    assert result.costs["cost"] <= limit
    assert result.loss == pytest.approx(brute.least(problem), rel=1e-6)


@pytest.mark.parametrize("solver", ALL)
def test_groups_and_masks_hold(solver):
    given = instance(11)
    allowed = np.ones(given["loss"].shape, dtype=bool)
    allowed[3, 0] = False
    allowed[1] = np.arange(4) == 1
    problem = problem_of(**given, groups=grouped(6, [0, 2], [4, 5]), allowed=allowed)
    result = solve(problem, solver=solver)
    assert result.choice[0] == result.choice[2]
    assert result.choice[4] == result.choice[5]
    assert result.choice[1] == 1
    assert result.choice[3] != 0
    assert result.loss == pytest.approx(brute.least(problem), rel=SAME)


@pytest.mark.parametrize("solver", ALL)
def test_infeasible_names_the_smallest_attainable_value(solver):
    given = instance(13)
    least = int(given["cost"].min(axis=1).sum())
    with pytest.raises(InfeasibleBudgetError, match=str(least)):
        solve(problem_of(**{**given, "limit": least - 1}), solver=solver)


@pytest.mark.parametrize("solver", ALL)
def test_the_smallest_budget_takes_the_cheapest_choices(solver):
    given = instance(17)
    least = int(given["cost"].min(axis=1).sum())
    result = solve(problem_of(**{**given, "limit": least}), solver=solver)
    assert result.costs["cost"] == least


@pytest.mark.parametrize("solver", ALL)
def test_a_slack_budget_gives_every_item_its_best_choice(solver):
    given = instance(19)
    problem = problem_of(**{**given, "limit": int(given["cost"].max(axis=1).sum())})
    result = solve(problem, solver=solver)
    np.testing.assert_array_equal(result.choice, problem.loss.argmin(axis=1))


@pytest.mark.parametrize("solver", ALL)
def test_one_item_and_one_choice(solver):
    result = solve(problem_of(loss=np.array([[2.0]]), cost=np.array([[5]]), limit=5), solver=solver)
    assert (result.loss, result.costs["cost"], result.choice.tolist()) == (2.0, 5, [0])


def test_an_unknown_solver_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="highs"):
        solve(problem_of(**instance(0)), solver="highz")


def test_three_thousand_small_instances_against_the_whole_grid():
    """Scales from 1e-12 to 1e12, ties, 32-bit tables: every choice costed at once by these lines."""
    rng = np.random.default_rng(2024)
    for number in range(3000):
        n, k = int(rng.integers(1, 6)), int(rng.integers(1, 5))
        loss = rng.integers(0, 4, (n, k)) * 1.0 if number % 3 == 0 else 10.0 ** (-6 * rng.random((n, k)))
        loss = (loss * 10.0 ** rng.integers(-12, 13)).astype(np.float32 if number % 5 == 0 else np.float64)
        cost = rng.integers(0, 10 ** int(rng.integers(1, 9)), (n, k)).astype(np.int32 if number % 2 else np.int64)
        limit = int(rng.integers(cost.min(axis=1).sum(), cost.max(axis=1).sum() + 1))
        grid = np.stack(np.meshgrid(*[np.arange(k)] * n, indexing="ij"), axis=-1).reshape(-1, n)
        losses = loss.astype(np.float64)[np.arange(n), grid].sum(axis=1)
        least = losses[cost.astype(np.int64)[np.arange(n), grid].sum(axis=1) <= limit].min()
        result = solve(problem_of(loss=loss, cost=cost, limit=limit))
        assert result.status == "optimal", number
        assert result.loss == pytest.approx(least, rel=SAME, abs=0), number
        assert result.costs["cost"] <= limit, number
        assert result.dual_bound <= least * (1 + SAME), number


@pytest.mark.slow
def test_random_instances_core_against_highs():
    """Within HiGHS's own tolerance: a millionth of what greedy leaves above the unattainable minimum."""
    rng = np.random.default_rng(2024)
    worse = 0
    for seed in range(300):
        n, k = int(rng.integers(3, 15)), int(rng.integers(2, 8))
        problem = problem_of(**instance(seed, n, k, scale=10.0 ** rng.integers(-9, 10)))
        core, highs = solve(problem, solver="core"), solve(problem, solver="highs")
        assert core.status == "optimal"
        assert core.loss <= highs.loss * (1 + SAME)
        assert highs.loss >= core.lower_bound * (1 - SAME)
        worse += highs.loss > core.loss * (1 + 1e-6)
    assert worse == 0
