"""The exact core: relaxation by halving the rates against the full sort, and the search that closes the gap."""

from __future__ import annotations

import numpy as np
import pytest

from mpqsearch.allocate import closing, mckp
from mpqsearch.allocate.tables import total_cost


def tables(n, seed=0, dtype=np.float64, order="F", kind="decaying"):
    """Channel-like tables: rate-distortion losses over several decades, sizes that repeat in runs (layers)."""
    rng = np.random.default_rng(seed)
    weights = np.repeat(rng.integers(200, 9000, n // 50 + 1), 50)[:n]
    bits = np.arange(2, 9)
    loss = (rng.lognormal(0, 2, n) * weights)[:, None] * 4.0**-bits
    if kind == "noisy":
        loss = loss * rng.lognormal(0, 0.6, loss.shape)
    elif kind == "equal":
        loss = np.broadcast_to(4.0**-bits, loss.shape) * 1.0
        weights = np.full(n, 1000)
    cost = weights[:, None] * bits
    return np.array(loss, dtype=dtype, order=order), np.array(cost, order=order), int(weights.sum())


@pytest.mark.parametrize("average", [2.0, 2.013, 4.37, 7.9, 8.0, 9.0])
@pytest.mark.parametrize("kind", ["decaying", "noisy", "equal"])
def test_halving_finds_the_rate_of_the_full_sort(kind, average, monkeypatch):
    loss, cost, weights = tables(20_000, kind=kind)
    limit = int(weights * average)
    halved = mckp.relax(loss, cost, limit)
    assert kind == "equal" or len(halved.near) < len(loss)
    monkeypatch.setattr(mckp, "DIRECT_ROWS", len(loss))
    sorted_once = mckp.relax(loss, cost, limit)
    assert halved.rate == pytest.approx(sorted_once.rate, rel=1e-12)
    assert halved.bound == pytest.approx(sorted_once.bound, rel=1e-12)
    assert halved.slack >= 0


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layout_and_precision_do_not_change_the_optimum(order, dtype):
    loss, cost, weights = tables(6000, kind="noisy", dtype=np.float32)
    limit = int(weights * 3.5)
    reference = mckp.solve_table(loss.astype(np.float64), cost, limit)
    answer = mckp.solve_table(np.array(loss, dtype=dtype, order=order), np.array(cost, order=order), limit)
    assert answer.proven
    assert answer.loss == pytest.approx(reference.loss, rel=1e-14)


def test_more_than_127_choices():
    """An int8 choice index would wrap around and break the budget."""
    rng = np.random.default_rng(1)
    loss, cost = np.sort(rng.random((30, 400)), axis=1)[:, ::-1], np.sort(rng.integers(0, 10**6, (30, 400)), axis=1)
    limit = int(cost[:, 300].sum())
    answer = mckp.solve_table(loss, cost, limit)
    assert answer.proven
    assert total_cost(cost, answer.choice) <= limit
    assert answer.choice.max() > 127


def test_grain_of_the_sizes_tightens_the_slack():
    """All sizes are multiples of 1000; 999 units of budget can never be used."""
    rng = np.random.default_rng(2)
    loss, cost = rng.random((8, 4)), rng.integers(1, 9, (8, 4)) * 1000
    limit = int(cost.min(axis=1).sum()) + 3000
    assert mckp.solve_table(loss, cost, limit + 999).loss == mckp.solve_table(loss, cost, limit).loss


def test_a_full_history_ends_the_search_with_a_valid_bound(monkeypatch):
    loss, cost, weights = tables(3000, kind="noisy")
    proven = mckp.solve_table(loss, cost, int(weights * 4.2))
    monkeypatch.setattr(closing, "MAX_HISTORY", 0)
    answer = mckp.solve_table(loss, cost, int(weights * 4.2))
    assert not answer.proven
    assert answer.dual_bound <= answer.floor <= proven.loss <= answer.loss


def test_dropped_states_end_the_proof_but_not_the_bound(monkeypatch):
    loss, cost, weights = tables(300, kind="noisy")
    proven = mckp.solve_table(loss, cost, int(weights * 4.2))
    real = closing.close
    monkeypatch.setattr(mckp, "close", lambda *args, **options: real(*args, **(options | {"max_states": 2})))
    answer = mckp.solve_table(loss, cost, int(weights * 4.2))
    assert answer.floor <= proven.loss <= answer.loss
    assert answer.proven == (answer.loss == proven.loss == answer.floor)


@pytest.mark.parametrize("decade", [-15, -9, -4, 4, 9, 15])
def test_the_map_of_794_layers_does_not_depend_on_the_scale_of_the_losses(decade):
    """Losses over eight decades; the reference systems' maps change from 1e-4 down."""
    rng = np.random.default_rng(11)
    weights = rng.integers(10**5, 10**7, 794)
    loss = 10.0 ** rng.uniform(-8, 0, (794, 1)) * 4.0 ** -np.arange(7.0) * rng.lognormal(0, 0.3, (794, 7))
    cost = weights[:, None] * np.arange(2, 9)
    limit = int(4.4 * weights.sum())
    reference, scaled = mckp.solve_table(loss, cost, limit), mckp.solve_table(loss * 10.0**decade, cost, limit)
    assert reference.proven
    assert scaled.proven
    np.testing.assert_array_equal(scaled.choice, reference.choice)


def test_too_small_a_budget_is_refused_for_large_tables_too():
    loss, cost, _ = tables(20_000)
    with pytest.raises(mckp.BudgetTooSmallError):
        mckp.solve_table(loss, cost, int(cost.min(axis=1).sum()) - 1)


@pytest.mark.parametrize("seed", range(40))
def test_halving_survives_odd_tables(monkeypatch, seed):
    """Forbidden cells, zero and equal sizes, flat and rising losses, every budget; the halving is forced on few
    items."""
    rng = np.random.default_rng(seed)
    n, k = 60, 4
    loss = [rng.random((n, k)), np.round(rng.random((n, k)) * 2), np.ones((n, k))][seed % 3] * 10.0 ** rng.integers(
        -9, 9
    )
    cost = [rng.integers(0, 3, (n, k)), rng.integers(0, 10**12, (n, k)), np.tile([0, 5, 5, 9], (n, 1))][seed // 3 % 3]
    loss[rng.random((n, k)) < 0.2] = np.inf
    loss[np.arange(n), rng.integers(0, k, n)] = 0.5
    least, most = mckp.smallest_cost(loss, cost), int(np.where(np.isfinite(loss), cost, 0).max(axis=1).sum())
    limits = [least, most, *rng.integers(least, most + 1, 5).tolist()]
    expected = [mckp.solve_table(loss, cost, limit) for limit in limits]
    monkeypatch.setattr(mckp, "DIRECT_ROWS", 8)

    for limit, direct in zip(limits, expected, strict=True):
        halved = mckp.solve_table(loss, cost, limit)
        assert halved.loss == pytest.approx(direct.loss, rel=1e-12)
        assert total_cost(cost, halved.choice) <= limit


def test_strongly_correlated_tables_are_proven():
    """Loss = constant - cost: every choice lies on one line, the hardest class for branch and bound."""
    rng = np.random.default_rng(5)
    cost = np.sort(rng.integers(1, 1000, (60, 5)), axis=1)
    loss = (cost.max(axis=1, keepdims=True) + 10.0 - cost) * 1e-6
    answer = mckp.solve_table(loss, cost, int(cost[:, 2].sum()))
    assert answer.proven
    assert answer.loss >= answer.dual_bound
