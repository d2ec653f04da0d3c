from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpqsearch.allocate import solve
from mpqsearch.core import BitMap, Budget, Policy, QuantFormat, SensitivityProfile, size_bits, uniform_map
from mpqsearch.core.budget import DEFAULT_STORAGE
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, UnknownNameError
from mpqsearch.methods import ALLOCATORS, MethodSpec, allocate, channel_losses, predicted_loss, program_of
from mpqsearch.testing import tiny_profile, tiny_table

TABLE = tiny_table(n_layers=6, channels=20, fan_in=30)
PROFILE = tiny_profile(TABLE)
POLICY = Policy()
FORMAT = QuantFormat()


def run(allocator: str, budget: str, policy: Policy = POLICY, **kwargs: object) -> object:
    method = MethodSpec(name=allocator, allocator=allocator, **kwargs)  # type: ignore[arg-type]
    return allocate(method, Budget.parse(budget), TABLE, PROFILE, policy, FORMAT)


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("budget", ["uniform:2", "uniform:3", "uniform:8", "5.1bit", "2100B"])
def test_maps_are_valid_and_costed_from_themselves(allocator: str, budget: str) -> None:
    made = run(allocator, budget)
    bit_map: BitMap = made.bit_map  # type: ignore[attr-defined]
    bit_map.validate(TABLE)
    assert made.size_bits == size_bits(TABLE, bit_map)  # type: ignore[attr-defined]
    assert int(bit_map.weights["block.0.linear"]) == 8
    if allocator != "omq":  # OMQ cannot pay for its tags, and says so
        assert made.within_budget  # type: ignore[attr-defined]
    else:
        tags = 3 * sum(bit_map.is_mixed(la.name) * la.n_channels for la in TABLE)
        assert made.size_bits - tags <= made.limit  # type: ignore[attr-defined]


def test_layer_program_equals_brute_force() -> None:
    policy = Policy(widths=(2, 3, 4, 6))
    made = run("ilp-layer", "uniform:3", policy, codebook="auto", bias_correction=True)
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
            format=QuantFormat(codebook="auto"),
        )
        if size_bits(TABLE, candidate) <= made.limit:  # type: ignore[attr-defined]
            loss = sum(losses[PROFILE.index[la.name], PROFILE.widths.index(w)] for la, w in zip(searched, widths, strict=True))
            best = min(best, float(loss))
    assert made.result.status == "optimal"  # type: ignore[attr-defined]
    assert made.result.loss == pytest.approx(best, rel=1e-9)  # type: ignore[attr-defined]


def test_channels_beat_layers_beat_uniform_in_predicted_loss() -> None:
    for budget in ("uniform:2", "uniform:3", "uniform:4"):
        losses = [run(a, budget, codebook="auto").predicted_loss for a in ("ilp-channel", "ilp-layer", "uniform")]  # type: ignore[attr-defined]
        assert losses[0] <= losses[1] * (1 + 1e-9) <= losses[2] * (1 + 1e-9)
        randoms = [run("random", budget, codebook="auto", seed=s).predicted_loss for s in range(20)]  # type: ignore[attr-defined]
        assert losses[1] <= min(randoms) * (1 + 1e-9)


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
            kurtosis = PROFILE.arrays["kurtosis_prescaled"][PROFILE.rows(layer.name)]
            assert kurtosis[widths == 4].min() >= kurtosis[widths != 4].max()
            assert kurtosis[widths == 2].max() <= kurtosis[widths != 2].min()
    assert mixed > 0


def test_omq_takes_the_split_with_the_least_output_error() -> None:
    made = run("omq", "uniform:3")
    for layer in TABLE:
        if POLICY.fixed_width(layer) is not None:
            continue
        rows = PROFILE.arrays["output_error/affine"][PROFILE.rows(layer.name)].astype(np.float64)
        order = np.argsort(-PROFILE.arrays["kurtosis_prescaled"][PROFILE.rows(layer.name)], kind="stable")
        errors = []
        for k in range(0, 11, 2):
            widths = np.full(20, 3)
            widths[order[:k]], widths[order[20 - k :]] = 4, 2
            errors.append(rows[np.arange(20), widths - 1].sum())
        got = made.bit_map.channel_widths(layer.name, 20).astype(int)  # type: ignore[attr-defined]
        assert rows[np.arange(20), got - 1].sum() == pytest.approx(min(errors), rel=1e-12)


def test_random_maps_follow_their_seed() -> None:
    a, b, c = (run("random", "uniform:3", seed=s).bit_map.digest for s in (0, 0, 1))  # type: ignore[attr-defined]
    assert a == b != c


def test_bops_budgets_hold() -> None:
    free = run("ilp-layer", "uniform:4").bops  # type: ignore[attr-defined]
    made = run("ilp-layer", f"{free}bops")
    assert made.bops <= free  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="ilp-layer"):
        run("ilp-channel", f"{free}bops")


def test_impossible_budgets_state_the_smallest_attainable() -> None:
    least = size_bits(TABLE, uniform_map(TABLE, POLICY, 1))
    with pytest.raises(InfeasibleBudgetError, match=str(least)) as caught:
        run("ilp-layer", "1bit")
    assert caught.value.exit_code == 3
    with pytest.raises(ConfigError, match="above full precision"):
        run("ilp-layer", "17bit")
    just = run("ilp-layer", f"{-(-least // 8)}B")
    assert set(map(int, (just.bit_map.weights[f"block.{i}.linear"] for i in range(1, 5)))) == {1}  # type: ignore[attr-defined]


def test_unknown_names_and_missing_measurements_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ilp-layer'"):
        MethodSpec(name="x", allocator="ilp-layers")
    with pytest.raises(UnknownNameError, match="midrise"):
        run("ilp-layer", "uniform:3", codebook="midrise")
    with pytest.raises(ConfigError, match="final_widths"):
        run("ilp-layer", "uniform:3", loss="final")
    other = SensitivityProfile(**{**_fields(PROFILE), "model_digest": "1" * 64})
    with pytest.raises(ConfigError, match="another model"):
        allocate(MethodSpec(name="u", allocator="uniform"), Budget.parse("3bit"), TABLE, other, POLICY, FORMAT)


def test_layer_totals_come_from_the_named_measurement() -> None:
    n_layers, n_widths = len(TABLE), len(PROFILE.widths)
    probe = np.random.default_rng(1).lognormal(size=(n_layers, n_widths)).astype(np.float32)
    final = np.full((n_layers, n_widths), np.nan, dtype=np.float32)
    final[:, 2] = 5 * probe[:, 2]
    arrays = {**PROFILE.arrays, "layer_probe_error/affine": probe, "layer_final_error/affine": final}
    profile = SensitivityProfile(**{**_fields(PROFILE), "arrays": arrays})
    by_probe = profile.layer_sum(channel_losses(profile, TABLE, "affine", "probe", bias_correction=False))
    np.testing.assert_allclose(by_probe, probe, rtol=1e-5)
    by_final = profile.layer_sum(channel_losses(profile, TABLE, "affine", "final", bias_correction=False))
    np.testing.assert_allclose(by_final, 5 * probe, rtol=1e-5)  # the ratio at the measured width carries to the others


def test_predicted_loss_is_the_sum_over_channels() -> None:
    bit_map = run("ilp-channel", "uniform:3").bit_map  # type: ignore[attr-defined]
    losses = channel_losses(PROFILE, TABLE, "affine", "probe", bias_correction=False)
    total = 0.0
    for layer in TABLE:
        widths = bit_map.channel_widths(layer.name, layer.n_channels)
        total += sum(losses[PROFILE.rows(layer.name)][c, b - 1] for c, b in enumerate(widths.tolist()))
    assert predicted_loss(TABLE, PROFILE, bit_map, bias_correction=False) == pytest.approx(total, rel=1e-9)


def test_channel_tags_are_paid() -> None:
    made = run("ilp-channel", "uniform:4")
    tags = sum(DEFAULT_STORAGE.tag_bits * la.n_channels for la in TABLE if made.bit_map.is_mixed(la.name))  # type: ignore[attr-defined]
    assert tags > 0
    assert made.size_bits <= made.limit  # type: ignore[attr-defined]


def _fields(profile: SensitivityProfile) -> dict[str, object]:
    from dataclasses import fields

    return {f.name: getattr(profile, f.name) for f in fields(profile)}


@pytest.mark.parametrize("allocator", ["ilp-layer", "ilp-channel"])
@pytest.mark.parametrize("budget", ["uniform:3", "5.1bit"])
def test_a_program_stands_for_the_map_that_is_made_of_it(allocator: str, budget: str) -> None:
    """Choice and map are the same thing, and the program's costs add up to the stored size of the whole model."""
    method = MethodSpec(name=allocator, allocator=allocator)
    made = allocate(method, Budget.parse(budget), TABLE, PROFILE, POLICY, FORMAT)
    program = program_of(method, Budget.parse(budget), TABLE, PROFILE, POLICY, FORMAT, by_layer=made.bit_map.granularity == "layer")
    choice = program.choice(made.bit_map)
    for name, widths in program.weights(choice).items():
        np.testing.assert_array_equal(np.asarray(made.bit_map.weights[name]), widths)
    loss, (cost,) = program.problem.evaluate(choice)
    assert cost + program.fixed_cost == made.size_bits
    assert made.result is not None
    assert loss == pytest.approx(made.result.loss, rel=1e-12)


def test_pins_enter_a_program_as_fixed_items_and_leave_its_optimum() -> None:
    method = MethodSpec(name="ilp-layer", allocator="ilp-layer")
    asked = (method, Budget.parse("uniform:3"), TABLE, PROFILE, POLICY, FORMAT)
    bare, pinned = solve(program_of(*asked).problem), solve(program_of(*asked, pins=True).problem)
    program = program_of(*asked, pins=True)
    extra = len(program.layers) - len(program_of(*asked).layers)
    assert extra == sum(POLICY.fixed_width(la) is not None for la in TABLE) > 0
    np.testing.assert_array_equal(pinned.choice[: len(bare.choice)], bare.choice)
    assert program.problem.limit + program.fixed_cost == program_of(*asked).problem.limit + program_of(*asked).fixed_cost
    assert size_bits(TABLE, allocate(*asked).bit_map) == pinned.cost + program.fixed_cost


def test_methods_without_a_program_say_so() -> None:
    with pytest.raises(ConfigError, match="solves no integer program"):
        program_of(MethodSpec(name="u", allocator="uniform"), Budget.parse("uniform:3"), TABLE, PROFILE, POLICY, FORMAT)
