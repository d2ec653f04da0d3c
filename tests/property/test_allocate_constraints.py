"""Several budgets, layer rules and pairwise terms against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpqsearch.allocate import (
    AllocationProblem,
    CostBudget,
    LayerRules,
    PairwiseTerms,
    budgets,
    dispatch,
    solve,
    solve_alternatives,
    verify_certificate,
)
from mpqsearch.errors import ConfigError, InfeasibleBudgetError

SAME = 1e-12  # two float64 sums of a few losses in different orders
SEEDS = st.integers(0, 2**32 - 1)
DECADES = st.integers(-9, 9)


def agrees_with_brute_force(problem, **options):
    """The answer equals the oracle's, or both refuse."""
    try:
        oracle = solve(problem, solver="exhaustive")
    except InfeasibleBudgetError:
        with pytest.raises(InfeasibleBudgetError):
            solve(problem, **options)
        return None
    answer = solve(problem, **options)
    assert answer.status == "optimal"
    assert answer.loss == pytest.approx(oracle.loss, rel=SAME, abs=0)
    assert all(answer.costs[budget.name] <= budget.limit for budget in problem.budgets)
    assert answer.dual_bound <= oracle.loss + SAME * abs(oracle.loss)
    check = verify_certificate(problem, answer)
    assert check, check.problems
    assert check.verified_bound <= oracle.loss + SAME * abs(oracle.loss)
    return answer


@settings(max_examples=25, deadline=None)
@given(SEEDS, DECADES, st.integers(1, 2))
def test_several_budgets(seed, decade, extra):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 6)), int(rng.integers(2, 5))
    tables = [rng.integers(0, 50, (n, k)) for _ in range(extra + 1)]
    limits = [int(rng.integers(table.min(axis=1).sum(), table.max(axis=1).sum() + 1)) for table in tables]
    more = tuple(
        CostBudget(name=f"budget {b}", cost=table, limit=limit)
        for b, (table, limit) in enumerate(zip(tables[1:], limits[1:], strict=True))
    )
    problem = AllocationProblem(
        loss=rng.random((n, k)) * 10.0**decade,
        cost=tables[0],
        limit=limits[0],
        more_budgets=more,
        ties=rng.integers(-1, 2, n) if seed % 3 == 0 else None,
    )
    agrees_with_brute_force(problem)


@settings(max_examples=25, deadline=None)
@given(SEEDS, DECADES)
def test_a_slack_second_budget_changes_nothing(seed, decade):
    """P11: its multiplier is zero and it may be dropped."""
    rng = np.random.default_rng(seed)
    loss, cost = rng.random((5, 3)) * 10.0**decade, rng.integers(1, 50, (5, 3))
    limit = int((cost.min(axis=1).sum() + cost.max(axis=1).sum()) // 2)
    alone = solve(AllocationProblem(loss=loss, cost=cost, limit=limit))
    slack = CostBudget(name="slack", cost=rng.integers(0, 9, (5, 3)), limit=1000)
    both = solve(AllocationProblem(loss=loss, cost=cost, limit=limit, more_budgets=(slack,)))
    assert both.loss == pytest.approx(alone.loss, rel=SAME, abs=0)
    assert both.multipliers[1] * 1000 <= 1e-6 * both.loss


@st.composite
def layered(draw):
    """Up to three layers of a few channels, any combination of rules, convex channels or not."""
    rng = np.random.default_rng(draw(SEEDS))
    layers = int(rng.integers(1, 4))
    layer = np.repeat(np.arange(layers), rng.integers(1, 4, layers))
    k = 3 if len(layer) > 5 else int(rng.integers(2, 5))
    width = np.array(draw(st.sampled_from([[2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 4.0, 8.0], [2.0, 2.0, 4.0, 4.0]])))[:k]
    loss = rng.random((len(layer), k)) * 10.0 ** draw(DECADES)
    if draw(st.booleans()):
        loss = loss[:, :1] * 4.0**-width
    weights = rng.integers(1, 30, layers)[layer]
    cost = (weights[:, None] * width).astype(np.int64)
    rules = draw(
        st.sampled_from(
            [{}, {"average_step": 1}, {"average": 3.0}, {"average_min": 2.5, "average_max": 3.5}, {"average_step": 0.5}]
        )
    )
    if draw(st.booleans()):
        rules = rules | {"mixed_overhead": rng.integers(0, 20, layers)}
    if draw(st.booleans()):
        rules = rules | {"max_distinct": int(rng.integers(1, 3))}
    if draw(st.booleans()):
        rules = rules | {"max_widths": int(rng.integers(1, 3))}
    if draw(st.booleans()):
        rules = rules | {"choice_overhead": rng.integers(0, 9, (layers, k))}
    limit = int(rng.integers(cost.min(axis=1).sum(), cost.max(axis=1).sum() + 30))
    return AllocationProblem(loss=loss, cost=cost, limit=limit, layers=LayerRules(layer=layer, width=width, **rules))


@settings(max_examples=80, deadline=None)
@given(layered())
def test_layer_rules_in_two_levels(problem):
    """P10: two levels equal brute force over every channel."""
    agrees_with_brute_force(problem)


@settings(max_examples=40, deadline=None)
@given(layered())
def test_a_false_claim_under_layer_rules_is_found_out(problem):
    """The second-best map of a small problem, called optimal, is refused; the optimum is proven again, not believed."""
    try:
        best = solve(problem)
    except InfeasibleBudgetError:
        return
    assert verify_certificate(problem, best).proof in ("dual", "search", "weaker")
    if problem.n_choices**problem.n_items > 3000:
        return
    assert verify_certificate(problem, best).proof != "weaker"
    grid = np.stack(np.meshgrid(*[np.arange(problem.n_choices)] * problem.n_items, indexing="ij"), -1).reshape(
        -1, problem.n_items
    )
    for choice in grid:
        loss, costs = problem.evaluate(choice)
        if problem.permits(choice) and costs[0] <= problem.limit and loss > best.loss * (1 + 1e-9):
            forged = replace(
                best,
                choice=choice.astype(np.int32),
                loss=loss,
                cost=costs[0],
                costs={"cost": costs[0]},
                lower_bound=loss,
            )
            assert not verify_certificate(problem, forged)
            return


def test_layer_rules_of_many_channels_are_proven_again_from_the_tables():
    """Far too many assignments to try: curves of the layers, one enumeration; a larger claim is refused."""
    rng = np.random.default_rng(4)
    layer, width = np.repeat(np.arange(6), [30, 50, 20, 40, 60, 10]), np.arange(2.0, 9.0)
    weights = rng.integers(10, 90, 6)[layer]
    loss = (rng.lognormal(0, 1, layer.size) * weights)[:, None] * 4.0**-width
    cost = (weights[:, None] * width).astype(np.int64)
    rules = LayerRules(layer=layer, width=width, average_step=1)
    problem = AllocationProblem(loss=loss, cost=cost, limit=int(4.4 * weights.sum()), layers=rules)
    answer = solve(problem)
    assert answer.status == "optimal"
    check = verify_certificate(problem, answer)
    assert check, check.problems
    assert check.proof == "search"
    assert check.verified_bound == answer.lower_bound > answer.dual_bound
    worse = solve(replace(problem, limit=problem.limit - int(weights.min()) * 20))
    assert worse.loss > answer.loss
    assert not verify_certificate(problem, replace(worse, multipliers=answer.multipliers, dual_bound=answer.dual_bound))
    tagged = replace(problem, layers=LayerRules(layer=layer, width=width, mixed_overhead=200))
    mixed = solve(tagged)
    check = verify_certificate(tagged, mixed)
    assert check, check.problems
    assert check.proof in ("dual", "search")


def test_a_bound_that_leaves_no_witness_is_called_weaker():
    """Pairs: what the multipliers prove is stated beside what the convex relaxation claims."""
    rng = np.random.default_rng(1)
    n, bits = 30, np.arange(2, 7)
    errors = rng.normal(size=(n, 1, 6)) * np.sqrt(rng.lognormal(0, 1, (n, 1, 1)) * 4.0 ** -bits[None, :, None])
    first, second = np.triu_indices(n, 1)
    value = 0.4 * np.einsum("par,pbr->pab", errors[first], errors[second])
    weights = rng.integers(10, 90, n)
    problem = AllocationProblem(
        loss=(errors**2).sum(axis=2),
        cost=weights[:, None] * bits,
        limit=int(3.4 * weights.sum()),
        pairwise=PairwiseTerms(first=first, second=second, value=value),
    )
    answer = solve(problem, gap_tolerance=1e-2)
    check = verify_certificate(problem, answer)
    assert check, check.problems
    assert check.proof == "weaker"
    assert check.verified_bound == check.dual_bound < answer.lower_bound


@settings(max_examples=15, deadline=None)
@given(layered())
def test_layer_rules_in_an_integer_program(problem):
    """The monolithic model is the second opinion."""
    agrees_with_brute_force(problem, solver="highs")


@settings(max_examples=60, deadline=None)
@given(layered(), SEEDS, st.booleans())
def test_layer_rules_beside_other_budgets_pins_masks_and_ties(problem, seed, tied):
    """Every combination is one problem: BOPs that follow the width, a latency that does not, overrides, masks, ties."""
    rng = np.random.default_rng(seed)
    layer, width, n = problem.layers.layer, problem.layers.width, problem.n_items
    bops = (rng.integers(1, 9, layer.max() + 1)[layer][:, None] * width * 3).astype(np.int64)
    tables = [("bops", bops), ("latency", rng.integers(0, 9, problem.cost.shape))][: int(rng.integers(1, 3))]
    more = tuple(
        CostBudget(name=name, cost=table, limit=int(rng.integers(table.min(axis=1).sum(), table.max(axis=1).sum() + 1)))
        for name, table in tables
    )
    allowed = rng.random(problem.loss.shape) < 0.8
    fixed = {0: int(rng.integers(problem.n_choices))} if rng.random() < 0.5 else {}
    allowed[np.arange(n), rng.integers(0, problem.n_choices, n)] = True
    for item, choice in fixed.items():
        allowed[item, choice] = True
    labels = rng.integers(-1, 2, n) if tied else None
    agrees_with_brute_force(replace(problem, more_budgets=more, allowed=allowed, fixed=fixed, ties=labels))


@settings(max_examples=20, deadline=None)
@given(SEEDS, DECADES)
def test_a_choice_may_be_anything_that_has_a_loss_and_a_cost(seed, decade):
    """Formats with group sizes of their own, and mixtures of channels inside a layer, each with its own stored cost."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 40, 4) * 64
    formats = [(2, 32), (2, 128), (3, 64), (4, 64)]  # bits, group size
    cost = np.array([[w * bits + w // group * 16 for bits, group in formats] for w in weights])
    loss = rng.random((4, 1)) * np.array([4.0**-bits * (1 + group / 256) for bits, group in formats]) * 10.0**decade
    mixture_cost = cost[:, 0] + weights // 10 + 3 * 64  # a tenth of the channels one bit up, and their tags
    mixture_loss = 0.8 * loss[:, 0]
    cost, loss = np.column_stack([cost, mixture_cost]), np.column_stack([loss, mixture_loss])
    limit = int(rng.integers(cost.min(axis=1).sum(), cost.max(axis=1).sum() + 1))
    agrees_with_brute_force(AllocationProblem(loss=loss, cost=cost, limit=limit))


@st.composite
def coupled(draw):
    """Squared sums of error vectors: pairwise terms of either sign."""
    rng = np.random.default_rng(draw(SEEDS))
    n, k = int(rng.integers(2, 6)), int(rng.integers(2, 4))
    errors = rng.normal(size=(n, k, 3)) * 2.0 ** -np.arange(k)[:, None]
    first, second = np.triu_indices(n, 1)
    value = 2 * np.einsum("par,pbr->pab", errors[first], errors[second])
    scale = 10.0 ** draw(DECADES)
    cost = rng.integers(1, 20, (n, 1)) * np.arange(1, k + 1)
    limit = int(rng.integers(cost.min(axis=1).sum(), cost.max(axis=1).sum() + 1))
    return AllocationProblem(
        loss=(errors**2).sum(axis=2) * scale,
        cost=cost,
        limit=limit,
        pairwise=PairwiseTerms(first=first, second=second, value=value * scale),
        ties=[[0, 1]] if draw(st.booleans()) else None,
    )


@settings(max_examples=25, deadline=None)
@given(coupled())
def test_pairwise_terms(problem):
    oracle = solve(problem, solver="exhaustive")
    answer = solve(problem)
    assert answer.loss == pytest.approx(oracle.loss, rel=1e-9, abs=1e-12 * float(problem.loss.max()))
    assert answer.lower_bound <= oracle.loss + 1e-9 * float(problem.loss.max())
    check = verify_certificate(problem, answer)
    assert check, check.problems


@settings(max_examples=15, deadline=None)
@given(coupled(), SEEDS)
def test_pairwise_terms_beside_other_budgets_and_layer_rules(problem, seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 9, problem.cost.shape)
    more = (
        CostBudget(
            name="latency", cost=table, limit=int(rng.integers(table.min(axis=1).sum(), table.max(axis=1).sum() + 1))
        ),
    )
    layers = None
    if seed % 2:
        layers = LayerRules(
            layer=np.arange(problem.n_items) // 2, width=np.arange(problem.n_choices) + 2.0, max_distinct=1
        )
    asked = replace(problem, more_budgets=more, layers=layers)
    try:
        oracle = solve(asked, solver="exhaustive")
    except InfeasibleBudgetError:
        with pytest.raises(InfeasibleBudgetError):
            solve(asked)
        return
    answer = solve(asked)
    assert answer.loss == pytest.approx(oracle.loss, rel=1e-9, abs=1e-12 * float(problem.loss.max()))
    assert answer.lower_bound <= oracle.loss + 1e-9 * float(problem.loss.max())
    check = verify_certificate(asked, answer)
    assert check, check.problems


@pytest.mark.parametrize(("coupling", "most"), [(0.2, 0.05), (1.0, np.inf)])
def test_many_pairwise_terms_beside_two_binding_budgets(coupling, most):
    """Far too many products for an integer program: within both budgets, better than without the terms, and with a
    bound."""
    rng = np.random.default_rng(3)
    n, bits = 40, np.arange(2, 7)
    errors = rng.normal(size=(n, 1, 6)) * np.sqrt(rng.lognormal(0, 1, (n, 1, 1)) * 4.0 ** -bits[None, :, None])
    first, second = np.triu_indices(n, 1)
    value = 2 * coupling * np.einsum("par,pbr->pab", errors[first], errors[second])
    weights, macs = rng.integers(10, 90, n), rng.integers(10, 90, n)
    cost, bops = weights[:, None] * bits, macs[:, None] * bits
    problem = AllocationProblem(
        loss=(errors**2).sum(axis=2),
        cost=cost,
        limit=int(3.9 * weights.sum()),
        pairwise=PairwiseTerms(first=first, second=second, value=value),
        more_budgets=(CostBudget(name="bops", cost=bops, limit=int(3.9 * macs.sum())),),
    )
    assert value.size > dispatch.LINEARIZED_PRODUCTS
    answer = solve(problem, gap_tolerance=1e-3)
    apart = solve(replace(problem, pairwise=None))
    assert min(apart.multipliers) > 0, "both budgets bind"
    assert answer.costs["cost"] <= problem.limit
    assert answer.costs["bops"] <= problem.more_budgets[0].limit
    assert answer.loss <= problem.evaluate(apart.choice)[0] * (1 + SAME)
    assert answer.gap < most  # at 1.0 the relaxation lets all errors cancel: no useful bound, and the status says so
    assert answer.status == ("feasible" if answer.gap < 1 else "heuristic")
    check = verify_certificate(problem, answer)
    assert check, check.problems
    layers = LayerRules(layer=np.arange(n) // 2, width=bits.astype(float), max_distinct=1)
    with pytest.raises(ConfigError, match="too many for an integer program"):
        crowded = replace(
            problem,
            pairwise=PairwiseTerms(
                first=np.tile(first, 30), second=np.tile(second, 30), value=np.tile(value, (30, 1, 1))
            ),
        )
        solve(replace(crowded, layers=layers))


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_alternatives_are_the_best_that_differ_enough(seed, distance):
    rng = np.random.default_rng(seed)
    n, k = 4, 3
    loss, cost = rng.random((n, k)), rng.integers(1, 20, (n, k))
    limit = int((cost.min(axis=1).sum() + cost.max(axis=1).sum()) // 2)
    problem = AllocationProblem(loss=loss, cost=cost, limit=limit)
    found = solve_alternatives(problem, 4, min_distance=distance)
    assume(len(found) > 1)
    grid = np.stack(np.meshgrid(*[np.arange(k)] * n, indexing="ij"), axis=-1).reshape(-1, n)
    losses, costs = loss[np.arange(n), grid].sum(axis=1), cost[np.arange(n), grid].sum(axis=1)
    for number, answer in enumerate(found):
        far = np.ones(len(grid), dtype=bool)
        for earlier in found[:number]:
            far &= (grid != earlier.choice).sum(axis=1) >= distance
        assert answer.loss == pytest.approx(losses[far & (costs <= limit)].min(), rel=SAME)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_the_repair_ends_within_every_budget(seed):
    """Started from minimizers over the budgets, the repair returns an admissible choice or nothing."""
    rng = np.random.default_rng(seed)
    loss = rng.random((30, 4))
    tables = tuple(rng.integers(0, 100, (30, 4)) for _ in range(2))
    limits = tuple(int(table.mean(axis=1).sum() * 0.9) for table in tables)
    rates = np.zeros(2)
    start = budgets.evaluate_dual(loss, tables, limits, rates)
    penalty = loss - loss.min(axis=1, keepdims=True)
    assume(bool((start.used > np.array(limits)).any()))
    repaired = budgets._repaired(tables, limits, start, penalty, np.arange(30))
    assert repaired is not None
    rows = np.arange(30)
    assert all(table[rows, repaired].sum() <= limit for table, limit in zip(tables, limits, strict=True))
