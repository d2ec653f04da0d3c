"""Several budgets, limits on formats and losses of pairs against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mpqsearch.allocate import (
    CostBudget,
    PairwiseTerms,
    check_certificate,
    solve,
)
from mpqsearch.errors import InfeasibleBudgetError
from tests.support import brute
from tests.support.everything import ALL
from tests.support.problems import changed, problem_of

SAME = 1e-9  # of an integer programming solver's objective
SEEDS = st.integers(0, 2**32 - 1)
DECADES = st.integers(-12, 12)


def examples(n):
    """Half of them in a run that takes a sample: most of the time goes to integer programs."""
    return n if ALL else n // 2


def agrees_with_brute_force(problem):
    """The answer equals the oracle's and its certificate holds, or both refuse; None when they refuse."""
    least = brute.least(problem)
    if least is None:
        with pytest.raises(InfeasibleBudgetError):
            solve(problem)
        return None
    answer = solve(problem)
    assert answer.status == "optimal"
    assert answer.loss == pytest.approx(least, rel=SAME, abs=0)
    assert brute.admissible(problem, tuple(answer.choice.tolist()))
    assert answer.lower_bound <= least * (1 + SAME)
    check = check_certificate(answer.certificate(problem), problem, answer.choice)
    assert check.valid, check
    assert check.bound <= least * (1 + SAME)
    return answer


def instance(seed, decade):
    """Up to 5 items of 2 to 4 choices, an attainable budget."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 6)), int(rng.integers(2, 5))
    loss = [rng.random((n, k)), rng.integers(0, 4, (n, k)) * 1.0, 10.0 ** (-6 * rng.random((n, k)))][rng.integers(3)]
    cost = rng.integers(0, 50, (n, k))
    limit = int(rng.integers(cost.min(axis=1).sum(), cost.max(axis=1).sum() + 1))
    return rng, problem_of(loss=loss * 10.0**decade, cost=cost, limit=limit)


def another_budget(rng, shape, name):
    cost = rng.integers(0, 50, shape)
    return CostBudget(name=name, cost=cost, limit=int(rng.integers(cost.min(axis=1).sum(), cost.max(axis=1).sum() + 1)))


@settings(max_examples=examples(60), deadline=None)
@given(SEEDS, DECADES, st.integers(1, 2))
def test_several_budgets(seed, decade, extra):
    rng, problem = instance(seed, decade)
    more = tuple(another_budget(rng, problem.loss.shape, f"budget {number}") for number in range(extra))
    agrees_with_brute_force(changed(problem, more=more))


@settings(max_examples=examples(60), deadline=None)
@given(SEEDS, DECADES, st.integers(1, 3))
def test_few_formats_in_the_model(seed, decade, most):
    rng, problem = instance(seed, decade)
    allowed = rng.random(problem.loss.shape) < 0.8
    allowed[np.arange(problem.n_items), rng.integers(0, problem.n_choices, problem.n_items)] = True
    agrees_with_brute_force(changed(problem, max_formats=most, allowed=allowed))


@settings(max_examples=examples(60), deadline=None)
@given(SEEDS, DECADES, st.integers(1, 2), st.booleans())
def test_few_formats_in_a_layer(seed, decade, most, grouped):
    """Groups may lie across layers."""
    rng, problem = instance(seed, decade)
    groups = rng.integers(-1, 2, problem.n_items) if grouped else None
    layer = rng.integers(0, 3, problem.n_items)
    agrees_with_brute_force(changed(problem, max_formats_per_layer=most, layer=layer, groups=groups))


@settings(max_examples=examples(40), deadline=None)
@given(SEEDS, DECADES)
def test_all_constraints_at_once(seed, decade):
    rng, problem = instance(seed, decade)
    allowed = rng.random(problem.loss.shape) < 0.9
    allowed[:, 0] = True
    agrees_with_brute_force(
        changed(
            problem,
            allowed=allowed,
            groups=rng.integers(-1, 2, problem.n_items),
            more=(another_budget(rng, problem.loss.shape, "bops"),),
            max_formats=int(rng.integers(1, problem.n_choices + 1)),
            max_formats_per_layer=int(rng.integers(1, 3)),
            layer=rng.integers(0, 2, problem.n_items),
        )
    )


@settings(max_examples=examples(25), deadline=None)
@given(SEEDS)
def test_what_excludes_each_other_is_named_with_the_smallest_value(seed):
    """Costs that fall where the others rise: every budget attainable alone, not all together."""
    rng, problem = instance(seed, 0)
    opposite = problem.budgets[0].cost.max() - problem.budgets[0].cost
    room = int(rng.integers(0, 20))
    other = CostBudget(name="bops", cost=opposite, limit=int(opposite.min(axis=1).sum()) + room)
    asked = changed(problem, limit=int(problem.budgets[0].cost.min(axis=1).sum()) + 10, more=(other,))
    assume(brute.least(asked) is None)
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(asked)
    for name, limit in (("cost", asked.budgets[0].limit), ("bops", other.limit)):
        smallest = brute.smallest(asked, name)
        assert smallest > limit
        assert f"the smallest {name} under the other constraints is {smallest}" in str(caught.value)


@settings(max_examples=examples(25), deadline=None)
@given(SEEDS, st.integers(1, 2))
def test_a_budget_that_few_formats_cannot_keep_is_named(seed, most):
    rng, problem = instance(seed, 0)
    layer = rng.integers(0, 2, problem.n_items)
    asked = changed(problem, max_formats=most, max_formats_per_layer=1, layer=layer)
    smallest = brute.smallest(asked, "cost")
    assume(smallest > problem.budgets[0].cost.min(axis=1).sum())
    with pytest.raises(InfeasibleBudgetError, match=rf"value is {smallest} .*max_formats_per_layer = 1"):
        solve(changed(asked, limit=smallest - 1))
    assert solve(changed(asked, limit=smallest)).costs["cost"] == smallest


def test_formats_that_the_items_cannot_share_are_named():
    allowed = np.eye(3, dtype=bool)
    problem = problem_of(loss=np.ones((3, 3)), cost=np.ones((3, 3), int), limit=3, allowed=allowed)
    with pytest.raises(InfeasibleBudgetError, match="smallest attainable max_formats is 3"):
        solve(changed(problem, max_formats=2))
    layer = np.array([0, 0, 1])
    with pytest.raises(InfeasibleBudgetError, match="smallest attainable max_formats_per_layer is 2"):
        solve(changed(problem, max_formats_per_layer=1, layer=layer))


@settings(max_examples=examples(40), deadline=None)
@given(SEEDS, DECADES)
@example(53742667, 0)  # the start was the answer with the losses of pairs inside groups alone
def test_pairs_are_admissible_no_worse_than_without_them_and_never_below_the_optimum(seed, decade):
    rng, problem = instance(seed, decade)
    n, k = problem.loss.shape
    first, second = np.triu_indices(n, 1)
    value = rng.normal(size=(len(first), k, k)) * 10.0**decade
    groups = rng.integers(-1, 2, n)
    asked = changed(problem, groups=groups, pairwise=PairwiseTerms(first=first, second=second, value=value))
    least = brute.least(asked)
    if least is None:
        with pytest.raises(InfeasibleBudgetError):
            solve(asked)
        return
    answer = solve(asked)
    slip = SAME * float(np.abs(value).sum() + problem.loss.sum())
    alone = solve(changed(asked, pairwise=None))
    assert brute.admissible(asked, tuple(answer.choice.tolist()))
    assert least - slip <= answer.loss <= brute.total(asked, tuple(alone.choice.tolist())) + slip
    assert answer.lower_bound <= least + slip
    assert answer.status == "heuristic" or answer.loss <= least + slip
    check = check_certificate(answer.certificate(asked), asked, answer.choice)
    assert check.valid, check
