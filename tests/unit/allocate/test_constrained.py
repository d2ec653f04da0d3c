"""Several budgets and limits on formats beyond the size of brute force: certified gaps and second opinions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.allocate import CostBudget, check_certificate, constrained, solve
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, SolverError
from tests.support.problems import changed, problem_of


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """What is proven must not depend on how busy the machine is."""
    monkeypatch.setattr(constrained, "PATIENCE_S", 900.0)


def layers(n=60, seed=0):
    """Layers with losses over six decades, and a BOPs budget beside the bits; both bind."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([320, 640, 1280], n) * rng.choice([320, 1280, 2880], n)
    loss = 10.0 ** rng.uniform(-6, 0, (n, 1)) * 4.0 ** -np.arange(7.0) * rng.lognormal(0, 0.3, (n, 7))
    cost = weights[:, None] * np.arange(2, 9)
    bops = cost * rng.integers(1, 64, (n, 1)) * 8
    more = (CostBudget(name="BOPs", cost=bops, limit=int(bops.min(axis=1).sum() * 1.8)),)
    return problem_of(loss=loss, cost=cost, limit=int(3.8 * weights.sum()), more=more)


def channels(n=30_000, seed=0):
    """Output channels of layers of one hundred."""
    rng = np.random.default_rng(seed)
    weights = np.repeat(rng.choice([320, 640, 1280], n // 100), 100)
    loss = (rng.lognormal(0, 2, n) * weights)[:, None] * 4.0 ** -np.arange(2.0, 9) * rng.lognormal(0, 0.1, (n, 7))
    cost = weights[:, None] * np.arange(2, 9)
    return problem_of(loss=loss, cost=cost, limit=int(4.1 * weights.sum()))


def valid(problem, result):
    check = check_certificate(result.certificate(problem), problem, result.choice)
    assert check.valid, check
    return check


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"max_formats": 3},
        {"max_formats": 2, "more": ()},
        {"max_formats_per_layer": 2, "layer": np.arange(60) // 6, "more": ()},
    ],
)
def test_two_solvers_agree_on_sixty_layers(rules):
    problem = changed(layers(), **rules)
    highs, cbc = solve(problem), solve(problem, solver="cbc")
    assert highs.status == cbc.status == "optimal"
    assert highs.loss == pytest.approx(cbc.loss, rel=1e-8)
    assert valid(problem, highs).bound <= highs.loss


@pytest.mark.parametrize("decade", [-12, 12])
def test_the_scale_of_the_losses_does_not_matter(decade):
    problem = layers()
    scaled = changed(problem, loss=problem.loss * 10.0**decade)
    assert solve(scaled).loss == pytest.approx(solve(problem).loss * 10.0**decade, rel=1e-9, abs=0)


def test_costs_that_float_solvers_confuse_stay_within_their_limit():
    """BOPs of 1e12 and a limit of one less than an attainable total."""
    rng = np.random.default_rng(3)
    loss = np.sort(rng.random((12, 3)), axis=1)[:, ::-1]
    cost, bops = (np.sort(rng.integers(10**9, 10**12, (12, 3)), axis=1) for _ in range(2))
    other = CostBudget(name="BOPs", cost=bops, limit=int(bops[:, 1].sum()) - 1)
    result = solve(problem_of(loss=loss, cost=cost, limit=int(cost[:, 1].sum()) - 1, more=(other,)))
    assert all(
        result.costs[name] <= limit for name, limit in (("cost", int(cost[:, 1].sum()) - 1), ("BOPs", other.limit))
    )


def test_many_channels_under_two_budgets_are_certified():
    problem = channels()
    latency = problem.budgets[0].cost // 2 * np.random.default_rng(5).integers(1, 20, (problem.n_items, 1)) + 3
    more = (CostBudget(name="latency", cost=latency, limit=int(latency.min(axis=1).sum() * 1.7)),)
    result = solve(changed(problem, more=more))
    assert result.status in ("optimal", "feasible")
    assert result.gap <= 1e-4
    assert valid(changed(problem, more=more), result).gap <= 1e-4


def test_many_channels_with_few_formats_a_layer_are_certified():
    problem = changed(channels(), max_formats_per_layer=2, layer=np.arange(30_000) // 100)
    result = solve(problem)
    assert result.gap <= 1e-4
    assert valid(problem, result).gap <= 1e-4


def test_what_is_too_large_for_a_proof_keeps_its_gap(monkeypatch):
    problem = layers()
    proven = solve(problem)
    monkeypatch.setattr(constrained, "MAX_CELLS", 0)
    quick = solve(problem)
    assert quick.status == "feasible"
    assert 0 < quick.gap < 0.05
    assert quick.lower_bound <= proven.loss


def test_the_proof_says_whose_word_it_is():
    problem = layers()
    assert solve(problem).proof == "solver"
    assert solve(problem).gap > 0, "an integer programming solver's word is no bound"
    assert solve(changed(problem, limit=10**12)).proof == "search", "the other budget is solved exactly by itself"
    assert solve(changed(problem, more=())).proof == "search"
    assert solve(changed(problem, more=(), limit=10**12)).proof == "bound"


def test_refusals():
    problem = layers()
    with pytest.raises(ConfigError, match="one budget"):
        solve(problem, solver="core")
    with pytest.raises(SolverError, match="too many for highs"):
        solve(channels(), solver="highs")
    wide = problem_of(loss=np.ones((2, 30)), cost=np.ones((2, 30), dtype=int), limit=9, max_formats=15)
    with pytest.raises(ConfigError, match="Offer fewer formats"):
        solve(wide)
    with pytest.raises(InfeasibleBudgetError, match="limit on BOPs is 5"):
        solve(changed(problem, more=(replace(problem.budgets[1], limit=5),)))
