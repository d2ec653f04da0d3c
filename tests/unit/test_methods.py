from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mpqsearch.allocate import solve
from mpqsearch.core import (
    BitMap,
    Budget,
    LayerTable,
    Policy,
    QuantFormat,
    bops,
    size_bits,
    uniform_map,
)
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, UnknownNameError
from mpqsearch.methods import ALLOCATORS, MethodSpec, Programs, channel_losses, predicted_loss, programs
from tests.support import tiny_profile, tiny_table

TABLE = tiny_table(n_layers=6, channels=20, fan_in=30)
PROFILE = tiny_profile(TABLE)
POLICY = Policy()
FORMAT = QuantFormat()
PROGRAMS = Programs(table=TABLE, profile=PROFILE, policy=POLICY, format=FORMAT)
SOLVED = [a for a in ALLOCATORS if a not in ("measured", "search", "map")]  # whose maps are no answer of one call


def run(allocator: str, budget: str, policy: Policy = POLICY, **kwargs: object) -> object:
    method = MethodSpec(name=allocator, allocator=allocator, **kwargs)  # type: ignore[arg-type]
    return Programs(table=TABLE, profile=PROFILE, policy=policy, format=FORMAT).allocate(method, Budget.parse(budget))


@pytest.mark.parametrize("allocator", SOLVED)
@pytest.mark.parametrize("budget", ["uniform:2", "uniform:3", "uniform:8", "5.1bit", "2100B"])
def test_maps_are_valid_and_costed_from_themselves(allocator: str, budget: str) -> None:
    made = run(allocator, budget)
    bit_map: BitMap = made.bit_map  # type: ignore[attr-defined]
    bit_map.validate(TABLE)
    assert made.size_bits == size_bits(TABLE, bit_map)  # type: ignore[attr-defined]
    assert int(bit_map.weights["block.0.linear"]) == 8
    if not allocator.startswith("omq"):  # OMQ cannot pay for its tags, and says so
        assert made.within_budget  # type: ignore[attr-defined]
    else:
        tags = 3 * sum(bit_map.weights[la.name].ndim * la.n_channels for la in TABLE)
        factors = 16 * sum(la.n_inputs for la in TABLE) if bit_map.format.smooth else 0
        more = (
            sum(2 * (la.weights_per_channel + 1) for la in TABLE if bit_map.weights[la.name].ndim)
            if allocator == "omq-plus"
            else 0
        )
        assert made.size_bits - tags - factors - more <= made.limit  # type: ignore[attr-defined]


def test_layer_program_equals_brute_force() -> None:
    policy = Policy(widths=(2, 3, 4, 6))
    made = run("ilp-layer", "uniform:3", policy, scheme="auto", bias_correction=True)
    losses = PROFILE.layer_sum(channel_losses(PROFILE, TABLE, "auto", "probe", bias_correction=True))
    searched = [la for la in TABLE if policy.fixed_width(la) is None]
    best = np.inf
    for widths in itertools.product(policy.widths, repeat=len(searched)):
        candidate = BitMap(
            model_digest=TABLE.digest,
            weights={
                **uniform_map(TABLE, policy, 2).weights,
                **{la.name: np.array(w) for la, w in zip(searched, widths, strict=True)},
            },
            format=QuantFormat(scheme="auto"),
        )
        if size_bits(TABLE, candidate) <= made.limit:  # type: ignore[attr-defined]
            loss = sum(
                losses[PROFILE.index[la.name], PROFILE.widths.index(w)] for la, w in zip(searched, widths, strict=True)
            )
            best = min(best, float(loss))
    assert made.result.status == "optimal"  # type: ignore[attr-defined]
    assert made.result.loss == pytest.approx(best, rel=1e-9)  # type: ignore[attr-defined]


@pytest.mark.parametrize("budget", ["uniform:3", "2900B"])
def test_channels_are_allocated_with_prescaling_and_its_factors_paid_for(budget: str) -> None:
    made = run("ilp-channel", budget, scheme="auto", smooth=True, bias_correction=True)
    bit_map: BitMap = made.bit_map  # type: ignore[attr-defined]
    assert bit_map.format == QuantFormat(scheme="auto", smooth=True)
    assert made.within_budget  # type: ignore[attr-defined]
    plain = replace(bit_map, format=QuantFormat(scheme="auto"))
    assert made.size_bits - size_bits(TABLE, plain) == 16 * sum(la.n_inputs for la in TABLE)  # type: ignore[attr-defined]
    losses = channel_losses(PROFILE, TABLE, "auto+smooth", "probe", bias_correction=True, rounding="nearest")
    searched = [la for la in TABLE if POLICY.fixed_width(la) is None]
    widths = [bit_map.channel_widths(la.name, la.n_channels) for la in searched]
    own = sum(
        losses[PROFILE.rows(la.name)][np.arange(len(w)), [PROFILE.widths.index(int(b)) for b in w]].sum()
        for la, w in zip(searched, widths, strict=True)
    )
    assert made.result.loss == pytest.approx(own, rel=1e-6), "priced by the errors of smoothed weights"  # type: ignore[attr-defined]


def test_channels_beat_layers_beat_uniform_in_predicted_loss() -> None:
    for budget in ("uniform:2", "uniform:3", "uniform:4"):
        losses = [run(a, budget, scheme="auto").predicted_loss for a in ("ilp-channel", "ilp-layer", "uniform")]  # type: ignore[attr-defined]
        assert losses[0] <= losses[1] * (1 + 1e-9) <= losses[2] * (1 + 1e-9)
        randoms = [run("random", budget, scheme="auto", seed=s).predicted_loss for s in range(20)]  # type: ignore[attr-defined]
        assert losses[1] <= min(randoms) * (1 + 1e-9)


def test_widths_by_layer_are_taken_where_tags_cost_more_than_channels_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program over layers is left out only where its bound says that it cannot win: solving it always changes no
    map."""
    rng = np.random.default_rng(0)
    table = tiny_table(n_layers=8, channels=24, fan_in=6)  # small rows, so that tags cost much
    profile, notes = tiny_profile(table), []

    def maps() -> list[str]:
        notes.clear()
        digests = []
        for spread, bits in itertools.product((0.0, 0.5, 3.0), np.arange(2.0, 6.0, 0.5)):
            own = np.exp(spread * rng.normal(size=(sum(profile.channels), 1)) - 1.4 * np.array(profile.widths))
            method = MethodSpec(name="m", allocator="ilp-channel")
            made = Programs(table=table, profile=profile, policy=POLICY, format=FORMAT).allocate(
                method, Budget.parse(f"uniform:{bits}"), losses=own
            )
            digests.append(made.bit_map.digest)
            notes.append(made.notes)
            assert made.within_budget
            assert not made.notes or made.bit_map.granularity == "layer"
        return digests

    solves: list[int] = []
    monkeypatch.setattr(programs, "solve", lambda *a, **k: (solves.append(1), solve(*a, **k))[1])
    quick, taken = maps(), [*notes]
    assert {(), ("widths by layer predict a smaller loss than widths by channel with their tags",)} <= set(taken)
    assert len(solves) < 2 * len(quick), "not every budget takes two solves"
    rng = np.random.default_rng(0)
    monkeypatch.setattr(programs.dual, "evaluate", lambda *_: SimpleNamespace(value=float("-inf")))
    assert (maps(), notes) == (quick, taken)


def test_a_budget_that_the_tags_alone_exceed_gives_widths_by_layer() -> None:
    made = run("ilp-channel", "uniform:2", Policy(widths=(2, 4)))
    assert made.notes == ("the budget does not hold the channel tags; widths are by layer",)  # type: ignore[attr-defined]
    assert made.bit_map.granularity == "layer"  # type: ignore[attr-defined]


def test_predicted_loss_grows_when_the_budget_shrinks() -> None:
    losses = [run("ilp-channel", f"{b}bit").predicted_loss for b in np.arange(4.0, 8, 0.5)]  # type: ignore[attr-defined]
    assert losses == sorted(losses, reverse=True)


def test_omq_promotes_as_many_channels_as_it_demotes() -> None:
    made = run("omq", "uniform:3")
    mixed = 0
    for layer in TABLE:
        widths = made.bit_map.channel_widths(layer.name, layer.n_channels)  # type: ignore[attr-defined]
        if POLICY.fixed_width(layer) is not None:
            continue
        up, down = int((widths == 4).sum()), int((widths == 2).sum())
        assert up == down
        assert up % 2 == 0, "in steps of a tenth of 20 channels"
        assert up <= 10
        assert up + down + int((widths == 3).sum()) == 20
        mixed += up > 0
        if up:
            kurtosis = PROFILE.arrays["kurtosis_smoothed"][PROFILE.rows(layer.name)]
            assert kurtosis[widths == 4].min() >= kurtosis[widths != 4].max()
            assert kurtosis[widths == 2].max() <= kurtosis[widths != 2].min()
    assert mixed > 0


def test_omq_takes_the_split_with_the_least_output_error() -> None:
    made = run("omq", "uniform:3")
    for layer in TABLE:
        if POLICY.fixed_width(layer) is not None:
            continue
        rows = PROFILE.arrays["output_error/asymmetric"][PROFILE.rows(layer.name)].astype(np.float64)
        order = np.argsort(-PROFILE.arrays["kurtosis_smoothed"][PROFILE.rows(layer.name)], kind="stable")
        errors = []
        for k in range(0, 11, 2):
            widths = np.full(20, 3)
            widths[order[:k]], widths[order[20 - k :]] = 4, 2
            errors.append(rows[np.arange(20), widths - 1].sum())
        got = made.bit_map.channel_widths(layer.name, 20).astype(int)  # type: ignore[attr-defined]
        assert rows[np.arange(20), got - 1].sum() == pytest.approx(min(errors), rel=1e-12)


def widths_of(allocator: str, budget: str, table: LayerTable = TABLE, **arrays: object) -> dict[str, int]:
    """Widths of the searched layers by a rule, from the tiny profile with some arrays replaced."""
    profile = tiny_profile(table)
    profile = replace(profile, arrays={**profile.arrays, **arrays})  # type: ignore[dict-item]
    made = Programs(table=table, profile=profile, policy=POLICY, format=FORMAT).allocate(
        MethodSpec(name=allocator, allocator=allocator), Budget.parse(budget)
    )
    assert made.within_budget
    return {n: int(made.bit_map.weights[n]) for n in POLICY.resolve(table).searched}


@pytest.mark.parametrize("allocator", ["first-last-high", "k-quant", "sdnq-dynamic", "quant-probe", "apple-threshold"])
@pytest.mark.parametrize("budget", ["uniform:2", "5.1bit", "uniform:4"])
def test_rules_of_practice_use_the_budget_up(allocator: str, budget: str) -> None:
    made = run(allocator, budget)
    bit_map: BitMap = made.bit_map  # type: ignore[attr-defined]
    for name in (n for n in POLICY.resolve(TABLE).searched if bit_map.weights[n] < 8):
        wider = replace(bit_map, weights={**bit_map.weights, name: bit_map.weights[name] + np.uint8(1)})
        assert size_bits(TABLE, wider) > made.limit  # type: ignore[attr-defined]


def test_rules_by_position_name_and_kurtosis_widen_the_layers_that_they_name() -> None:
    table = tiny_table(n_layers=12, channels=20, fan_in=30)
    ends = list(widths_of("first-last-high", "uniform:4", table).values())
    assert (ends[0], ends[-1]) == (8, 8)
    assert set(ends[2:-2]) == {3}, "those between share one width"
    kurtosis = np.ones(table.n_channels, dtype=np.float32)
    kurtosis[5 * 20 : 6 * 20] = 9
    probed = list(widths_of("quant-probe", "uniform:4", table, kurtosis=kurtosis).values())
    assert probed[4] == 8 > max(probed[:4] + probed[5:])
    places = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
    names = ["in", *(f"blocks.{i}.{p}" for i in range(2) for p in places), "out"]
    named = tiny_table(n_layers=len(names), channels=32, fan_in=64)
    named = replace(named, layers=tuple(replace(la, name=n) for la, n in zip(named, names, strict=True)))
    mixed = widths_of("k-quant", "uniform:4.7", named)
    assert {n: w for n, w in mixed.items() if w > 4} == {
        f"blocks.{i}.{p}": 6 for i in range(2) for p in ("attn.to_v", "ff.net.2")
    }, "Q4_K_M: Q6_K for value projections and the second layers of feed-forwards"


@pytest.mark.parametrize("allocator", ["sdnq-dynamic", "apple-threshold"])
def test_threshold_rules_take_the_lowest_threshold_that_fits(allocator: str) -> None:
    if allocator == "sdnq-dynamic":
        rms = PROFILE.layer_sum(PROFILE.arrays["weight_rms"].astype(np.float64) ** 2)
        fan_in = np.array([la.weights_per_channel for la in TABLE])
        error = PROFILE.layer_sum(PROFILE.arrays["weight_error/asymmetric"]) / (rms * fan_in)[:, None]
    else:
        error = PROFILE.layer_sum(channel_losses(PROFILE, TABLE, "asymmetric", "probe", bias_correction=False))
    searched, made = POLICY.resolve(TABLE).searched, run(allocator, "uniform:3")
    chosen = {n: int(made.bit_map.weights[n]) for n in searched}  # type: ignore[attr-defined]
    base = uniform_map(TABLE, POLICY, 2)
    for threshold in np.sort(error.ravel()):
        least = {n: 1 + int(np.argmax(error[PROFILE.index[n]] <= threshold)) for n in searched}
        reached = all((error[PROFILE.index[n]] <= threshold).any() for n in searched)
        by_rule = replace(base, weights={**base.weights, **{n: np.array(w) for n, w in least.items()}})
        if reached and size_bits(TABLE, by_rule) <= made.limit:  # type: ignore[attr-defined]
            break
    assert sum(chosen.values()) > len(searched)
    assert all(chosen[n] >= least[n] for n in searched), "what is left of the budget only widens"


def test_one_layer_at_a_time_is_a_knapsack_of_the_output_error() -> None:
    same = run("ilp-layer", "uniform:3", loss="probe")
    assert run("mixed-gguf", "uniform:3").bit_map.weights == same.bit_map.weights  # type: ignore[attr-defined]


def test_random_maps_follow_their_seed() -> None:
    a, b, c = (run("random", "uniform:3", seed=s).bit_map.digest for s in (0, 0, 1))  # type: ignore[attr-defined]
    assert a == b != c


def test_bops_budgets_hold() -> None:
    free = run("ilp-layer", "uniform:4").bops  # type: ignore[attr-defined]
    by_layer = run("ilp-layer", f"{free}bops")
    assert by_layer.bops <= free  # type: ignore[attr-defined]
    by_channel = run("ilp-channel", f"{free}bops")
    assert by_channel.bops <= free  # type: ignore[attr-defined]
    assert by_channel.result.loss <= by_layer.result.loss  # type: ignore[attr-defined]


def test_impossible_budgets_state_the_smallest_attainable() -> None:
    least = size_bits(TABLE, uniform_map(TABLE, POLICY, 1))
    with pytest.raises(InfeasibleBudgetError, match=f"{-(-least // 8):,} bytes") as caught:
        run("ilp-layer", "1bit")
    assert caught.value.exit_code == 3
    with pytest.raises(ConfigError, match="above full precision"):
        run("ilp-layer", "17bit")
    just = run("ilp-layer", f"{-(-least // 8)}B")
    assert set(map(int, (just.bit_map.weights[f"block.{i}.linear"] for i in range(1, 5)))) == {1}  # type: ignore[attr-defined]


def test_unknown_names_and_missing_measurements_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ilp-layer'"):
        MethodSpec(name="x", allocator="ilp-layers")
    with pytest.raises(UnknownNameError, match="symmetric"):
        run("ilp-layer", "uniform:3", scheme="symmetric")
    with pytest.raises(ConfigError, match="final_widths"):
        run("ilp-layer", "uniform:3", loss="final")
    other = replace(PROFILE, model_digest="1" * 64)
    with pytest.raises(ConfigError, match="another model"):
        Programs(table=TABLE, profile=other, policy=POLICY, format=FORMAT).allocate(
            MethodSpec(name="u", allocator="uniform"), Budget.parse("3bit")
        )


def test_layer_totals_come_from_the_named_measurement() -> None:
    n_layers, n_widths = len(TABLE), len(PROFILE.widths)
    probe = np.random.default_rng(1).lognormal(size=(n_layers, n_widths)).astype(np.float32)
    final = np.full((n_layers, n_widths), np.nan, dtype=np.float32)
    final[:, 2] = 5 * probe[:, 2]
    arrays = {**PROFILE.arrays, "layer_probe_error/asymmetric": probe, "layer_final_error/asymmetric": final}
    profile = replace(PROFILE, arrays=arrays)
    by_probe = profile.layer_sum(channel_losses(profile, TABLE, "asymmetric", "probe", bias_correction=False))
    np.testing.assert_allclose(by_probe, probe, rtol=1e-5)
    by_final = profile.layer_sum(channel_losses(profile, TABLE, "asymmetric", "final", bias_correction=False))
    np.testing.assert_allclose(by_final, 5 * probe, rtol=1e-5)  # the ratio at the measured width carries to the others


def test_predicted_loss_is_the_sum_over_channels() -> None:
    bit_map = run("ilp-channel", "uniform:3").bit_map  # type: ignore[attr-defined]
    losses = channel_losses(PROFILE, TABLE, "asymmetric", "probe", bias_correction=False)
    total = 0.0
    for layer in TABLE:
        widths = bit_map.channel_widths(layer.name, layer.n_channels)
        total += sum(losses[PROFILE.rows(layer.name)][c, b - 1] for c, b in enumerate(widths.tolist()))
    assert predicted_loss(TABLE, PROFILE, bit_map, bias_correction=False) == pytest.approx(total, rel=1e-9)


def test_channel_tags_are_paid() -> None:
    made = run("ilp-channel", "uniform:4")
    tags = sum(3 * la.n_channels for la in TABLE if made.bit_map.weights[la.name].ndim)  # type: ignore[attr-defined]
    assert tags > 0
    assert made.size_bits <= made.limit  # type: ignore[attr-defined]


@pytest.mark.parametrize("allocator", ["ilp-layer", "ilp-channel"])
@pytest.mark.parametrize("budget", ["uniform:3", "5.1bit"])
def test_a_program_stands_for_the_map_that_is_made_of_it(allocator: str, budget: str) -> None:
    """Choice and map are the same thing, and the program's costs add up to the stored size of the whole model."""
    method = MethodSpec(name=allocator, allocator=allocator)
    made = PROGRAMS.allocate(method, Budget.parse(budget))
    program = PROGRAMS.program(method, Budget.parse(budget), by_layer=made.bit_map.granularity == "layer")
    choice = program.choice(made.bit_map)
    for name, widths in program.weights(choice).items():
        np.testing.assert_array_equal(np.asarray(made.bit_map.weights[name]), widths)
    loss, (cost,) = program.problem.evaluate(choice)
    assert cost + program.fixed_cost == made.size_bits
    assert made.result is not None
    assert loss == pytest.approx(made.result.loss, rel=1e-12)


def test_methods_without_a_program_say_so() -> None:
    with pytest.raises(ConfigError, match="solves no integer program"):
        PROGRAMS.program(MethodSpec(name="u", allocator="uniform"), Budget.parse("uniform:3"))
    for allocator, message in (("search", "run the stage 'search'"), ("map", "allocate.maps")):
        with pytest.raises(ConfigError, match=message):
            run(allocator, "uniform:3")


def fused_table() -> LayerTable:
    """Layers 1 and 2 of the table are projections of one input; so are 3 and 4, of which one has half the rows."""
    layers = list(TABLE)
    layers[1], layers[2] = (replace(la, fuse="a") for la in layers[1:3])
    layers[3], layers[4] = (replace(la, fuse="b") for la in layers[3:5])
    layers[4] = replace(layers[4], weight_shape=(10, layers[4].weight_shape[1]))
    return LayerTable(digest=TABLE.digest, layers=tuple(layers), kept=TABLE.kept)


@pytest.mark.parametrize("allocator", SOLVED)
@pytest.mark.parametrize("budget", ["uniform:2", "uniform:3", "5.1bit"])
def test_grouped_layers_have_the_same_widths_row_for_row(allocator: str, budget: str) -> None:
    table, policy = fused_table(), Policy(groups={"fused": ("qkv",)})
    made = Programs(table=table, profile=tiny_profile(table), policy=policy, format=FORMAT).allocate(
        MethodSpec(name="m", allocator=allocator), Budget.parse(budget)
    )
    made.bit_map.validate(table)
    widths = [made.bit_map.weights[la.name] for la in table]
    np.testing.assert_array_equal(widths[1], widths[2])
    assert widths[3].ndim == widths[4].ndim == 0  # twenty rows against ten: one width for both
    assert widths[3] == widths[4]
    assert made.within_budget or allocator.startswith("omq")


def test_fused_layers_are_free_unless_the_policy_groups_them() -> None:
    table = fused_table()
    made = Programs(table=table, profile=tiny_profile(table), policy=POLICY, format=FORMAT).allocate(
        MethodSpec(name="m", allocator="ilp-channel"), Budget.parse("uniform:3")
    )
    assert not np.array_equal(made.bit_map.weights["block.1.linear"], made.bit_map.weights["block.2.linear"])
    assert "fused share their widths" in Policy(groups={"fused": ("qkv",)}).describe()


def test_a_channel_program_of_groups_equals_brute_force() -> None:
    """Two fused layers of three rows: nine free choices of pairs of rows, tried one by one."""
    small = tiny_table(n_layers=4, channels=3, fan_in=10)
    layers = [replace(la, fuse="t") if i in (1, 2) else la for i, la in enumerate(small)]
    table = LayerTable(digest=small.digest, layers=tuple(layers), kept=small.kept)
    profile, policy = tiny_profile(table, seed=3), Policy(widths=(2, 4, 8), groups={"fused": ("qkv",)})
    made = Programs(table=table, profile=profile, policy=policy, format=FORMAT).allocate(
        MethodSpec(name="m", allocator="ilp-channel", loss="output"), Budget.parse("uniform:3")
    )
    losses = channel_losses(profile, table, "asymmetric", "output", bias_correction=False)
    rows = np.stack([losses[profile.rows(layers[i].name)] for i in (1, 2)]).sum(0)
    best = np.inf
    for widths in itertools.product(policy.widths, repeat=3):
        weights = {**uniform_map(table, policy, 2).weights, **{layers[i].name: np.array(widths) for i in (1, 2)}}
        if size_bits(table, BitMap(model_digest=table.digest, weights=weights)) <= made.limit:
            best = min(best, sum(float(rows[r, profile.widths.index(w)]) for r, w in enumerate(widths)))
    assert made.result is not None
    found = made.bit_map.channel_widths(layers[1].name, 3)
    assert sum(float(rows[r, profile.widths.index(int(w))]) for r, w in enumerate(found)) == pytest.approx(
        best, rel=1e-9
    )


@pytest.mark.parametrize(
    ("allocator", "array", "groups"),
    [
        ("omq-paper", "quantized_input_error/asymmetric+smooth@a4", 6),
        ("omq-released", "output_error/asymmetric+smooth+minmax", 2),
    ],
)
def test_variants_of_omq_search_their_own_splits_under_their_own_error(allocator: str, array: str, groups: int) -> None:
    made = run(allocator, "uniform:3", act_bits=4)
    bit_map: BitMap = made.bit_map  # type: ignore[attr-defined]
    assert bit_map.format == QuantFormat(smooth=True)
    assert bit_map.activations == POLICY.activations_of(TABLE, 4)
    splits = set()
    for layer in TABLE:
        if POLICY.fixed_width(layer) is not None:
            continue
        rows = PROFILE.rows(layer.name)
        got = bit_map.channel_widths(layer.name, 20).astype(int)
        error = PROFILE.arrays[array][rows].astype(np.float64)
        ranked = np.argsort(-PROFILE.arrays["kurtosis_smoothed"][rows], kind="stable")
        tried = []
        for k in range(0, 2 * groups, 2):
            widths = np.full(20, 3)
            widths[ranked[:k]], widths[ranked[20 - k :]] = 4, 2
            tried.append((error[np.arange(20), widths - 1].sum(), k))
            if (widths == got).all():
                splits.add(k)
        assert error[np.arange(20), got - 1].sum() == pytest.approx(min(tried)[0], rel=1e-12)
    assert splits


def test_omq_plus_promotes_the_top_tenth_and_demotes_nobody() -> None:
    made = run("omq-plus", "uniform:3")
    for layer in TABLE:
        if POLICY.fixed_width(layer) is not None:
            continue
        widths = made.bit_map.channel_widths(layer.name, layer.n_channels)  # type: ignore[attr-defined]
        assert sorted(widths.tolist()) == [3] * 18 + [4] * 2
        kurtosis = PROFILE.arrays["kurtosis_smoothed"][PROFILE.rows(layer.name)]
        assert kurtosis[widths == 4].min() >= kurtosis[widths == 3].max()
    assert not made.within_budget  # type: ignore[attr-defined]
    top = run("omq-plus", "uniform:8").bit_map  # type: ignore[attr-defined]
    assert all(set(np.atleast_1d(w).tolist()) == {8} for w in top.weights.values()), "there is no width above 8"


def test_missing_measurements_of_omq_are_named() -> None:
    with pytest.raises(UnknownNameError, match=r"asymmetric\+smooth@a6.*activation_bits"):
        run("omq-paper", "uniform:3", act_bits=6)


def test_activation_widths_leave_the_weights_their_uniform_budget() -> None:
    for allocator in ("uniform", "ilp-layer", "ilp-channel"):
        made = run(allocator, "uniform:3", act_bits=6)
        assert made.within_budget  # type: ignore[attr-defined]
        assert dict(made.bit_map.activations) == POLICY.activations_of(TABLE, 6)  # type: ignore[attr-defined]
    assert {
        int(w) for n, w in run("uniform", "uniform:3", act_bits=6).bit_map.weights.items() if n != "block.0.linear"
    } >= {3}  # type: ignore[attr-defined]


def test_activation_scales_are_one_for_each_step_of_the_profile() -> None:
    profile = replace(PROFILE, calibration={"timesteps": 7})
    method = MethodSpec(name="u", allocator="uniform", act_bits=4, act_scales="timestep")
    made = Programs(table=TABLE, profile=profile, policy=POLICY, format=FORMAT).allocate(
        method, Budget.parse("uniform:3")
    )
    assert made.bit_map.activation_steps == 7
    assert made.within_budget
    with pytest.raises(ConfigError, match="act_scales"):
        Programs(table=TABLE, profile=PROFILE, policy=POLICY, format=FORMAT).allocate(method, Budget.parse("uniform:3"))


def test_pairs_of_weight_and_activation_widths_equal_brute_force_under_bops() -> None:
    policy, acts = Policy(widths=(2, 4)), (4, 6, 8)
    limit = run("uniform", "uniform:4", policy, act_bits=6).bops * 0.8  # type: ignore[attr-defined]
    made = run("ilp-layer", f"{limit}bops", policy, act_choices=acts)
    searched = [la for la in TABLE if policy.fixed_width(la) is None]
    weights = PROFILE.layer_sum(channel_losses(PROFILE, TABLE, "asymmetric", "probe", bias_correction=False))
    inputs = PROFILE.arrays["layer_activation_error"].astype(np.float64)
    best = np.inf
    for chosen in itertools.product(itertools.product(policy.widths, acts), repeat=len(searched)):
        base = uniform_map(TABLE, policy, 2, act_bits=8)
        named = dict(zip((la.name for la in searched), chosen, strict=True))
        candidate = BitMap(
            model_digest=TABLE.digest,
            weights={**base.weights, **{n: np.array(w) for n, (w, _) in named.items()}},
            activations={**base.activations, **{n: a for n, (_, a) in named.items()}},
        )
        if bops(TABLE, candidate) <= made.limit:  # type: ignore[attr-defined]
            rows = [(PROFILE.index[n], PROFILE.widths.index(w), PROFILE.widths.index(a)) for n, (w, a) in named.items()]
            best = min(best, float(sum(weights[i, w] + inputs[i, a] for i, w, a in rows)))
    assert made.result.loss == pytest.approx(best, rel=1e-9)  # type: ignore[attr-defined]
    assert made.bops <= limit  # type: ignore[attr-defined]
    assert len(set(made.bit_map.activations.values())) > 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="BOPs"):
        run("ilp-layer", "uniform:3", policy, act_choices=acts)
    with pytest.raises(ConfigError, match="ilp-layer and ilp-channel"):
        MethodSpec(name="x", allocator="uniform", act_choices=acts)


def test_a_map_by_channel_keeps_the_inputs_that_the_program_over_layers_chose() -> None:
    policy = Policy(widths=(2, 3, 4, 6))
    operations = Budget.parse(f"{run('uniform', 'uniform:3', policy, act_bits=5).bops}bops")  # type: ignore[attr-defined]
    programs = Programs(table=TABLE, profile=PROFILE, policy=policy, format=FORMAT)
    size = [Budget.parse("uniform:4")]
    layers, channels = (
        programs.allocate(MethodSpec(name="m", allocator=a, act_choices=(4, 6, 8)), operations, size)
        for a in ("ilp-layer", "ilp-channel")
    )
    assert channels.bit_map.activations == layers.bit_map.activations
    assert len(set(channels.bit_map.activations.values())) > 1
    assert channels.bit_map.granularity == "channel"
    assert channels.within_budget
    assert channels.bops == channels.totals[0].cost
    assert channels.predicted_loss < layers.predicted_loss


def test_the_predicted_loss_of_a_map_is_the_sum_over_its_channels() -> None:
    rng = np.random.default_rng(0)
    losses = channel_losses(PROFILE, TABLE, "asymmetric", "output", bias_correction=False)
    for _ in range(20):
        weights = {
            la.name: np.array(
                rng.choice([2, 3, 16]) if rng.random() < 0.4 else rng.choice([2, 3, 4, 16], la.n_channels)
            )
            for la in reversed(TABLE.layers)
        }
        made = BitMap(model_digest=TABLE.digest, weights=weights)
        expected = sum(
            losses[PROFILE.rows(n)][i, PROFILE.widths.index(int(b))]
            for n in weights
            for i, b in enumerate(made.channel_widths(n, TABLE[n].n_channels))
            if b != 16
        )
        assert predicted_loss(TABLE, PROFILE, made, bias_correction=False, loss="output") == pytest.approx(
            expected, rel=1e-12
        )
