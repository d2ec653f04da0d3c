"""The exact engine: relaxation by bracketing against the full sort, closing, both backends."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.allocate import AllocationProblem, closing, infeasible, mckp, passes, solve
from mpqsearch.allocate import backend as backend_module
from mpqsearch.allocate.backend import has_numba, use_backend
from mpqsearch.errors import InfeasibleBudgetError


@pytest.fixture(params=["numpy", pytest.param("numba", marks=pytest.mark.skipif(not has_numba(), reason="no numba"))])
def backend(request):
    previous = use_backend(request.param)
    yield request.param
    use_backend(previous)


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
def test_bracketing_finds_the_rate_of_the_full_sort(backend, kind, average):
    loss, cost, weights = tables(9000, kind=kind)
    limit = int(weights * average)
    bracketed = mckp.relax(loss, cost, limit)
    sorted_once = mckp._relax_by_hulls(loss, cost, limit, 0.0, None)
    assert bracketed.rate == pytest.approx(sorted_once.rate, rel=1e-12)
    assert bracketed.bound == pytest.approx(sorted_once.bound, rel=1e-12)
    assert bracketed.slack >= 0


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layout_and_precision_do_not_change_the_optimum(backend, order, dtype):
    loss, cost, weights = tables(6000, kind="noisy", dtype=np.float32)
    limit = int(weights * 3.5)
    reference = mckp.solve_table(loss.astype(np.float64), cost, limit)
    answer = mckp.solve_table(np.array(loss, dtype=dtype, order=order), np.array(cost, order=order), limit)
    assert answer.proven
    assert answer.loss == pytest.approx(reference.loss, rel=1e-14)


def test_backends_agree():
    if not has_numba():
        pytest.skip("no numba")
    loss, cost, weights = tables(6000, kind="noisy")
    losses = []
    for name in ("numpy", "numba"):
        previous = use_backend(name)
        losses.append(mckp.solve_table(loss, cost, int(weights * 2.9)).loss)
        use_backend(previous)
    assert losses[0] == pytest.approx(losses[1], rel=1e-14)


def test_more_than_127_choices(backend):
    """An int8 choice index would wrap around and break the budget."""
    rng = np.random.default_rng(1)
    loss, cost = np.sort(rng.random((30, 400)), axis=1)[:, ::-1], np.sort(rng.integers(0, 10**6, (30, 400)), axis=1)
    limit = int(cost[:, 300].sum())
    answer = mckp.solve_table(loss, cost, limit)
    assert answer.proven
    assert passes.totals(loss, cost, answer.choice)[1] <= limit
    assert answer.choice.max() > 127


def test_grain_of_the_sizes_tightens_the_slack(backend):
    """All sizes are multiples of 1000; 999 units of budget can never be used."""
    rng = np.random.default_rng(2)
    loss, cost = rng.random((8, 4)), rng.integers(1, 9, (8, 4)) * 1000
    limit = int(cost.min(axis=1).sum()) + 3000
    assert mckp.solve_table(loss, cost, limit + 999).loss == mckp.solve_table(loss, cost, limit).loss


def test_a_deadline_in_the_past_returns_a_certified_solution(backend):
    loss, cost, weights = tables(3000, kind="noisy")
    answer = mckp.solve_table(loss, cost, int(weights * 4.2), deadline=time.perf_counter())
    assert not answer.in_time
    assert not answer.proven
    assert answer.dual_bound <= answer.loss < answer.dual_bound * 1.01


def test_a_gap_tolerance_is_certified(backend):
    loss, cost, weights = tables(5000, kind="noisy")
    loose = mckp.solve_table(loss, cost, int(weights * 4.2), gap_tolerance=1e-5)
    tight = mckp.solve_table(loss, cost, int(weights * 4.2))
    assert loose.loss - loose.floor <= 1e-5 * loose.loss
    assert loose.floor <= tight.loss <= loose.loss


def test_a_full_history_ends_the_search_with_a_valid_bound(backend, monkeypatch):
    loss, cost, weights = tables(3000, kind="noisy")
    proven = mckp.solve_table(loss, cost, int(weights * 4.2))
    monkeypatch.setattr(closing, "MAX_HISTORY", 0)
    monkeypatch.setattr(mckp, "QUICK_WORK", 0)
    answer = mckp.solve_table(loss, cost, int(weights * 4.2))
    assert not answer.proven
    assert answer.in_time
    assert answer.dual_bound <= answer.floor <= proven.loss <= answer.loss


def test_dropped_states_end_the_proof_but_not_the_bound(backend, monkeypatch):
    loss, cost, weights = tables(300, kind="noisy")
    proven = mckp.solve_table(loss, cost, int(weights * 4.2))
    real = closing.close
    monkeypatch.setattr(mckp, "QUICK_WORK", 0)
    monkeypatch.setattr(closing, "close", lambda *args, **options: real(*args, **(options | {"max_states": 2})))
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


def test_too_small_a_budget_is_refused_for_large_tables_too(backend):
    loss, cost, _ = tables(9000)
    with pytest.raises(mckp.BudgetTooSmallError):
        mckp.solve_table(loss, cost, int(cost.min(axis=1).sum()) - 1)


@pytest.mark.parametrize("seed", range(40))
def test_bracketing_survives_odd_tables(backend, monkeypatch, seed):
    """Forbidden cells, zero and equal sizes, flat and rising losses, every budget; the bracket is forced on few
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
    monkeypatch.setattr(mckp, "DIRECT_ITEMS", 8)
    monkeypatch.setattr(mckp, "QUICK_DIRECT", 8)
    monkeypatch.setattr(mckp, "SAMPLE_POWER", 0.44)
    for limit, direct in zip(limits, expected, strict=True):
        bracketed = mckp.solve_table(loss, cost, limit)
        assert bracketed.loss == pytest.approx(direct.loss, rel=1e-12)
        assert passes.totals(loss, cost, bracketed.choice)[1] <= limit


@pytest.mark.skipif(not has_numba(), reason="no numba")
@pytest.mark.parametrize("gap", [0.0, 1e-6])
@pytest.mark.parametrize("average", [2.0, 2.4, 3.7, 5.3, 7.9, 9.0])
@pytest.mark.parametrize("kind", ["decaying", "noisy", "equal"])
def test_one_call_and_many_come_to_the_same(monkeypatch, kind, average, gap):
    """The engine in one compiled call against its parts, with the bracket and without."""
    loss, cost, weights = tables(9000, kind=kind, dtype=np.float32)
    limit = int(weights * average)
    previous = use_backend("numba")
    at_once = mckp.solve_table(loss, cost, limit, gap_tolerance=gap)
    with monkeypatch.context() as patched:
        patched.setattr(mckp, "QUICK_DIRECT", 10_000)
        directly = mckp.solve_table(loss, cost, limit, gap_tolerance=gap)
    monkeypatch.setattr(mckp, "QUICK_WORK", 0)
    in_parts = mckp.solve_table(loss, cost, limit, gap_tolerance=gap)
    use_backend(previous)
    assert at_once.dual_bound == pytest.approx(in_parts.dual_bound, rel=1e-12)
    assert directly.dual_bound == pytest.approx(in_parts.dual_bound, rel=1e-12)
    for answer in (at_once, directly):
        assert answer.proven >= (gap == 0)
        assert passes.totals(loss, cost, answer.choice) == (
            pytest.approx(answer.loss, rel=1e-12),
            int(cost[np.arange(9000), answer.choice].sum()),
        )
        assert passes.totals(loss, cost, answer.choice)[1] <= limit
        assert answer.loss - answer.floor <= gap * answer.loss
        assert answer.loss == pytest.approx(in_parts.loss, rel=max(gap, 1e-12))


@pytest.mark.skipif(not has_numba(), reason="no numba")
def test_a_search_that_one_call_cannot_end_is_ended_in_parts(monkeypatch):
    loss, cost, weights = tables(6000, kind="noisy")
    previous = use_backend("numba")
    expected = mckp.solve_table(loss, cost, int(weights * 3.1))
    monkeypatch.setattr(mckp, "QUICK_WORK", 1)
    answer = mckp.solve_table(loss, cost, int(weights * 3.1))
    use_backend(previous)
    assert answer.proven
    assert answer.loss == pytest.approx(expected.loss, rel=1e-14)


@pytest.mark.parametrize("average", [2.1, 4.37, 7.7])
def test_the_sample_encloses_the_rate(backend, average):
    loss, cost, weights = tables(20_000)
    limit = int(weights * average)
    low, high = mckp._sampled_bracket(loss, cost, limit, 0.0, np.inf)
    rate = mckp.relax(loss, cost, limit).rate
    assert low <= rate <= high
    assert passes.bracket(loss, cost, low, high).unsettled.size < 0.4 * len(loss)


def test_strongly_correlated_tables_are_proven(backend):
    """Loss = constant - cost: every choice lies on one line, the hardest class for branch and bound."""
    rng = np.random.default_rng(5)
    cost = np.sort(rng.integers(1, 1000, (60, 5)), axis=1)
    loss = (cost.max(axis=1, keepdims=True) + 10.0 - cost) * 1e-6
    answer = mckp.solve_table(loss, cost, int(cost[:, 2].sum()))
    assert answer.proven
    assert answer.loss >= answer.dual_bound


@pytest.mark.parametrize("low", [0.0, 0.3, -np.inf])
def test_both_hull_walks_agree(backend, monkeypatch, low):
    """The chain over sorted choices against gift wrapping: unsorted costs, duplicates, forbidden cells."""
    rng = np.random.default_rng(8)
    loss, cost = rng.random((40, 9)) * 5, rng.integers(0, 12, (40, 9))
    loss[rng.random(loss.shape) < 0.2] = np.inf
    loss[:, 4] = 2.5
    wrapped = passes.hull_steps(loss, cost, None, low)
    monkeypatch.setattr(passes, "WIDE_CHOICES", 1)
    walked = passes.hull_steps(loss, cost, None, low)
    np.testing.assert_array_equal(np.sort(walked.item), np.sort(wrapped.item))
    np.testing.assert_allclose(walked.rate, wrapped.rate, rtol=1e-12)
    assert walked.size.sum() == wrapped.size.sum()
    assert walked.rate.size > 20


def awkward(seed):
    """A small table with ties, equal and zero costs, dominated and forbidden choices, and a limit from below the least
    cost to the largest."""
    rng = np.random.default_rng([seed, 3])
    n, k = int(rng.integers(1, 25)), int(rng.integers(1, 9))
    loss = (
        rng.random((n, k)),
        rng.integers(0, 5, (n, k)) * 1.0,
        rng.lognormal(0, 2, (n, 1)) * 4.0 ** -np.arange(k),
        rng.normal(size=(n, k)),
    )[seed % 4]
    cost = (
        rng.integers(0, 6, (n, k)),
        rng.integers(1, 9**9, (n, k)),
        rng.integers(1, 5, (n, 1)) * np.arange(1, k + 1) * 48,
    )[seed % 3]
    if seed % 5 == 0:
        loss[rng.random((n, k)) < 0.3] = np.inf
        loss[np.arange(n), rng.integers(0, k, n)] = 1.0
    low, high = int(np.where(np.isfinite(loss), cost, 10**12).min(1).sum()), int(cost.max(1).sum())
    return loss, cost, int(rng.choice([low - 1, low, high, rng.integers(low, high + 1)], p=[0.1, 0.1, 0.1, 0.7]))


def test_few_items_and_few_states_are_taken_as_many_are_to_the_bit(monkeypatch):
    monkeypatch.setattr(backend_module, "_chosen", ["numpy"])

    def answers():
        for seed in range(150):
            loss, cost, limit = awkward(seed)
            for low in (0.0, 0.2, -np.inf):
                yield passes.hull_steps(loss, cost, None, low)
            moves = passes.collect_moves(loss, cost, passes.cheapest(loss, cost), 0.0, 1e9)
            for exact in (False, True):
                most = 9 if seed % 2 else 999
                yield closing.close(
                    moves, limit // 2, 1e-3, excess=1.0, tolerance=0.0, exact_fill=exact, max_states=most
                )
            with contextlib.suppress(mckp.BudgetTooSmallError):
                yield mckp.solve_table(loss, cost, limit)

    few = list(answers())
    monkeypatch.setattr(passes, "PAIRED_CELLS", 0)
    monkeypatch.setattr(closing, "FEW_STATES", 0)
    for a, b in zip(few, answers(), strict=True):
        for name in a.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


@pytest.mark.parametrize("solver", ["auto", "greedy", "highs"])
def test_costs_of_32_bits_beside_forbidden_choices(backend, solver):
    """The largest int64 stands for no cost at all; among int32 it would wrap to -1, and the forbidden choice be the
    cheapest."""
    allowed = np.array([[False, True, True]] * 3)
    cost = np.array([[1, 2, 3]] * 3, dtype=np.int32)
    asked = AllocationProblem(loss=np.array([[9.0, 4.0, 1.0]] * 3), cost=cost, limit=7, allowed=allowed, ties=[[0, 1]])
    assert solve(replace(asked, ties=None), solver=solver).loss == 9.0
    assert solve(asked, solver=solver).choice.tolist() == [1, 1, 2]
    assert infeasible.smallest_attainable(replace(asked, ties=None), 0) == 6
    with pytest.raises(InfeasibleBudgetError, match="smallest attainable value is 6"):
        solve(replace(asked, limit=5, ties=None), solver=solver)
    with pytest.raises(InfeasibleBudgetError, match="smallest attainable value is 6") as caught:
        solve(replace(asked, limit=5), solver=solver)
    assert "Ties" not in str(caught.value)


def test_loops_that_were_never_compiled_are_left_to_numpy_until_that_costs_as_much(monkeypatch):
    """Renting before buying: a first solve on a fresh machine must not wait for a compiler."""
    if not has_numba():
        pytest.skip("no numba")
    loaded = []
    monkeypatch.setattr(backend_module, "_loaded", loaded)
    monkeypatch.setattr(backend_module, "_passed", [0, 0])
    monkeypatch.setattr(backend_module, "_load", lambda: "compiled")
    monkeypatch.setattr(backend_module, "_compiled_before", lambda: False)
    cells = backend_module.COMPILED_CELLS
    passes_made = 0
    while backend_module.kernels(cells) is None:
        passes_made += 1
    assert passes_made == backend_module.UNCACHED_CELLS // (cells + backend_module.CALL_CELLS)
    assert backend_module.kernels(cells - 1) is None, "one small table asks for nothing"
    monkeypatch.setattr(backend_module, "_passed", [0, 0])
    monkeypatch.setattr(backend_module, "_compiled_before", lambda: True)
    assert backend_module.kernels(cells) == "compiled"


def test_many_small_problems_load_the_loops_once_numpy_has_taken_as_long(monkeypatch):
    """An outer search solves thousands in one process; a command that solves one never waits for numba."""
    if not has_numba():
        pytest.skip("no numba")
    monkeypatch.setattr(backend_module, "_loaded", [])
    monkeypatch.setattr(backend_module, "_load", lambda: "compiled")
    for compiled, most in ((True, backend_module.LOADED_CELLS), (False, backend_module.UNCACHED_CELLS)):
        monkeypatch.setattr(backend_module, "_passed", [0, 0])
        monkeypatch.setattr(backend_module, "_compiled_before", lambda compiled=compiled: compiled)
        passes_made = 0
        while backend_module.kernels(30_000) is None:
            passes_made += 1
        assert passes_made == most // (30_000 + backend_module.CALL_CELLS)


@pytest.mark.parametrize("seed", range(4))
def test_a_first_search_that_saw_every_move_needs_no_second(monkeypatch, seed):
    """In small tables the moves near the break are all there are; searching them again finds the same map, proven."""
    rng = np.random.default_rng([seed, 31])
    monkeypatch.setattr(mckp, "QUICK_WORK", 0)
    first, seconds = mckp._improve_near_break, []
    real = mckp._close
    monkeypatch.setattr(mckp, "_close", lambda *args: seconds.append(1) or real(*args))
    for _ in range(60):
        n, k = int(rng.integers(2, 12)), int(rng.integers(2, 8))
        loss = (rng.integers(0, 6, (n, k)) if seed % 2 else rng.lognormal(sigma=3, size=(n, k))).astype(np.float64)
        cost = np.cumsum(rng.integers(1, 9, (n, k)), axis=1)
        limit = int(rng.integers(cost.min(axis=1).sum(), cost.max(axis=1).sum() + 1))
        seconds.clear()
        once = mckp.solve_table(loss, cost, limit)
        assert not seconds
        with monkeypatch.context() as patched:
            patched.setattr(mckp, "_improve_near_break", lambda *args: (first(*args)[0], False))
            twice = mckp.solve_table(loss, cost, limit)
        assert once.choice.tolist() == twice.choice.tolist()
        assert (once.loss, once.floor, once.proven) == (twice.loss, twice.floor, twice.proven)
