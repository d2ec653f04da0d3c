from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.allocate import PairwiseTerms
from mpqsearch.core import BitMap, Budget, SensitivityProfile, size_bits
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec, allocate, channel_losses
from mpqsearch.search.space import CATALOGUE, parse_space
from mpqsearch.search.surrogate import Surrogate

BUDGETS = [Budget.parse(t) for t in ("uniform:2", "uniform:3", "uniform:4", "4.5bit")]
ALL_DEFAULTS = {name: p.default for name, p in CATALOGUE.items()}


def with_final(s: Surrogate) -> Surrogate:
    """The surrogate with layer totals from final samples that rank layers in another order."""
    totals = s.profile.layer_sum(channel_losses(s.profile, s.table, "auto", "gain", bias_correction=True))
    arrays = {
        **s.profile.arrays,
        "layer_final_error/auto": (totals * np.arange(1, len(totals) + 1)[::-1, None] ** 2).astype(np.float32),
    }
    return replace(s, profile=replace(s.profile, arrays=arrays))


@pytest.mark.parametrize("allocator", ["ilp-layer", "ilp-channel"])
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.label())
def test_defaults_reproduce_the_plain_integer_program_exactly(
    make_surrogate: Callable[..., Surrogate], allocator: str, budget: Budget
) -> None:
    s = make_surrogate(allocator)
    plain = allocate(s.method, budget, s.table, s.profile, s.policy, s.format)
    assert plain.result is not None
    for theta in (
        {},
        ALL_DEFAULTS,
        parse_space({n: [p.low, p.high] for n, p in list(CATALOGUE.items())[5:10]}).default_point(),
    ):
        found = s.candidate(theta, budget)
        assert found.bit_map.digest == plain.bit_map.digest
        assert found.predicted == plain.predicted_loss
        own = channel_losses(s.profile, s.table, s.method.variant, s.method.loss, bias_correction=True)
        np.testing.assert_array_equal(s.losses_of(theta, s.method), own)  # the table itself, not one that is nearly so


@pytest.mark.parametrize("name", ["exponent", "row_exponent", "low_bits", "kurtosis", "depth", "role_linear"])
def test_every_shaping_parameter_changes_losses_and_stays_positive(
    make_surrogate: Callable[..., Surrogate], name: str
) -> None:
    s = make_surrogate()
    losses = s.losses_of({name: 0.7}, s.method)
    assert not np.allclose(losses, s.losses_of({}, s.method))
    assert np.isfinite(losses).all()
    assert (losses >= 0).all()


def test_parameters_do_what_their_meaning_says(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    own, p = s.losses_of({}, s.method), s.profile
    totals = p.layer_sum(own)
    widths = np.array(p.widths)

    squared = p.layer_sum(s.losses_of({"exponent": 2.0}, s.method))
    ratio = squared / totals**2
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-9)  # one constant for all: a power of the totals

    tilted = s.losses_of({"low_bits": 1.0}, s.method)
    np.testing.assert_allclose(tilted / own, np.broadcast_to(2.0 ** (4.0 - widths), own.shape), rtol=1e-9)

    doubled = p.layer_sum(s.losses_of({"role_linear": 3.0}, s.method)) / totals
    inner = [s.table[n].role == "linear" for n in p.names]
    np.testing.assert_allclose(doubled[inner], 3.0, rtol=1e-9)
    np.testing.assert_allclose(doubled[~np.array(inner)], 1.0, rtol=1e-9)

    even = s.losses_of({"row_exponent": 0.0}, s.method)
    np.testing.assert_allclose(p.layer_sum(even), totals, rtol=1e-9)
    np.testing.assert_allclose(even[p.rows(p.names[2])], np.broadcast_to(totals[2] / 12, (12, len(widths))), rtol=1e-9)

    heavy = s.losses_of({"kurtosis": 1.0}, s.method) / own
    np.testing.assert_allclose(heavy[:, 0], np.maximum(p.arrays["kurtosis_smoothed"], 0.1) / 3, rtol=1e-6)


def test_mixing_takes_a_geometric_mean_of_layer_totals(make_surrogate: Callable[..., Surrogate]) -> None:
    s = with_final(make_surrogate())
    p = s.profile
    own = p.layer_sum(s.losses_of({}, s.method))
    final = p.layer_sum(channel_losses(p, s.table, "auto", "final", bias_correction=True))
    for w in (0.25, 1.0):
        mixed = p.layer_sum(s.losses_of({"mix_final": w}, s.method))
        ratio = mixed / (own ** (1 - w) * final**w)
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-6)
    # A common factor of one loss cannot change a map, so mixing needs no units.
    scaled = {**p.arrays, "layer_final_error/auto": p.arrays["layer_final_error/auto"] * np.float32(1024)}
    other = replace(s, profile=replace(p, arrays=scaled))
    theta, budget = {"mix_final": 0.5}, BUDGETS[1]
    assert other.candidate(theta, budget).digest == s.candidate(theta, budget).digest


def test_granularity_scheme_widths_and_range_search_reach_the_map(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    budget = BUDGETS[1]
    assert s.candidate({"granularity": "channel"}, budget).bit_map.granularity == "channel"
    assert s.candidate({"scheme": "asymmetric"}, budget).bit_map.format.scheme == "asymmetric"
    assert s.candidate({"smooth": 0.5}, budget).bit_map.format.smooth
    assert s.candidate({"criterion": "mse"}, budget).bit_map.format.criterion == "mse"
    assert s.candidate({"range_p": 3.0}, budget).bit_map.format.p == 3.0
    assert not s.candidate({"bias_correction": "off"}, budget).bias_correction
    narrow = s.candidate({"widths": "2,3,8"}, budget).bit_map
    assert {int(w) for w in narrow.weights.values()} <= {2, 3, 8}
    assert all(int(w) >= 2 for w in s.candidate({"min_bits": 2}, budget).bit_map.weights.values())
    with pytest.raises(ConfigError, match="not among the policy's"):
        s.candidate({"widths": "2,11"}, budget)


def test_rounds_measure_gains_at_the_present_map(make_surrogate: Callable[..., Surrogate]) -> None:
    seen: list[str] = []

    def remeasure(profile: SensitivityProfile, bit_map: object) -> SensitivityProfile:
        seen.append(bit_map.digest)
        gain = profile.arrays["sensitivity"][::-1].copy()
        return replace(profile, arrays={**profile.arrays, "sensitivity": gain})

    s = make_surrogate(remeasure=remeasure, operating_loss="gain")
    budget = BUDGETS[1]
    once = s.candidate({"rounds": 1}, budget)
    assert seen == [s.candidate({}, budget).bit_map.digest]
    assert once.digest != s.candidate({}, budget).digest
    twice = s.candidate({"rounds": 2}, budget)
    assert seen[-1] == once.bit_map.digest
    assert twice.digest == once.digest  # the gains do not depend on the map here, so the second round changes nothing
    with pytest.raises(ConfigError, match="needs the model at hand"):
        make_surrogate().candidate({"rounds": 1}, budget)


def test_timesteps_weigh_the_gains_of_their_bucket(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    with pytest.raises(ConfigError, match="step_sensitivity"):
        s.losses_of({"timestep": 1.0}, s.method)
    steps = np.ones((s.table.n_channels, 3), dtype=np.float32)
    steps[s.profile.rows(s.profile.names[2])] = [0, 0, 3]  # this layer matters at noise only
    timed = replace(s, profile=replace(s.profile, arrays={**s.profile.arrays, "step_sensitivity": steps}))
    ratio = timed.profile.layer_sum(timed.losses_of({"timestep": 2.0}, s.method)) / timed.profile.layer_sum(
        timed.losses_of({}, s.method)
    )
    weights = np.exp([-1.0, 0.0, 1.0])
    np.testing.assert_allclose(ratio[2], weights[2] / weights.mean(), rtol=1e-6)
    np.testing.assert_allclose(np.delete(ratio, 2, axis=0), 1.0, rtol=1e-6)


def test_pairwise_terms_move_the_map_with_their_strength(make_surrogate: Callable[..., Surrogate]) -> None:
    plain = make_surrogate()
    own = plain.losses_of({}, plain.method)
    totals = plain.profile.layer_sum(own)[1:-1]  # searched layers: first and last are fixed
    # Layers 0 and 1 of the searched ones make each other's errors much worse.
    value = 20 * np.sqrt(totals[0][:, None] * totals[1][None, :])[None]
    s = replace(plain, interactions=PairwiseTerms(first=np.array([0]), second=np.array([1]), value=value))
    budget = BUDGETS[1]
    assert s.candidate({"pairwise": 0.0}, budget).digest == plain.candidate({}, budget).digest
    strong = s.candidate({"pairwise": 1.0}, budget).bit_map
    weak = plain.candidate({}, budget).bit_map
    names = [la.name for la in s.table][1:3]
    assert sum(int(strong.weights[n]) for n in names) > sum(int(weak.weights[n]) for n in names)
    with pytest.raises(ConfigError, match="interactions"):
        plain.candidate({"pairwise": 1.0}, budget)


def test_a_method_without_an_integer_program_is_refused(make_surrogate: Callable[..., Surrogate]) -> None:
    with pytest.raises(ConfigError, match="ilp-layer or ilp-channel"):
        make_surrogate("uniform")


def test_activation_widths_by_role_are_paid_for(make_surrogate: Callable[..., Surrogate]) -> None:
    budget = BUDGETS[1]
    plain = make_surrogate().candidate({}, budget)
    assert not plain.bit_map.activations
    s = make_surrogate(act_bits=4)
    four = s.candidate({}, budget).bit_map
    searched = [la.name for la in s.table if s.policy.fixed_width(la) is None]
    assert {four.activations[n] for n in searched} == {4}
    assert [four.activations[la.name] for la in s.table if la.name not in searched] == [8, 8]
    mixed = s.candidate({"act_linear": 8}, budget).bit_map
    assert {mixed.activations[n] for n in searched} == {8}
    none = s.candidate({"act_linear": 16}, budget).bit_map
    assert not set(searched) & set(none.activations)
    for found in (four, mixed):
        limit = budget.limit_bits(s.table, s.policy, act_bits=max(found.activations[n] for n in searched))
        assert size_bits(s.table, found) <= limit


def test_scales_by_timestep_and_strengths_cost_no_more_than_the_plain_map(
    make_surrogate: Callable[..., Surrogate],
) -> None:
    s = make_surrogate("ilp-channel", act_bits=4)
    asked: list[str] = []

    def alphas(bit_map: BitMap) -> BitMap:
        asked.append(bit_map.digest)
        return replace(bit_map, formats={n: replace(bit_map.format, alpha=0.25) for n in bit_map.activations})

    profile = replace(s.profile, calibration={**s.profile.calibration, "sampler": {"steps": 10}})
    s = replace(s, profile=profile, alphas=alphas)
    budget = Budget.parse("uniform:3")
    plain = s.candidate({}, budget)
    found = s.candidate({"act_timesteps": "on"}, budget)
    assert found.bit_map.activation_steps == 10
    assert plain.bit_map.activation_steps == 1
    assert found.budget == plain.budget == budget
    limit = s.limit_bits(budget)
    assert size_bits(s.table, plain.bit_map) <= limit
    assert limit - 400 < size_bits(s.table, found.bit_map) <= limit  # the scales are paid for by fewer bits elsewhere

    assert not asked
    scaled = s.candidate({"smooth": "layers"}, budget)
    assert len(asked) == 1
    assert scaled.bit_map.format.smooth
    assert {f.alpha for f in scaled.bit_map.formats.values()} == {0.25}
    s.candidate({"smooth": "layers", "depth": 1.0}, budget)
    assert len(asked) == 1  # once a budget
    with pytest.raises(ConfigError, match="alphas"):
        replace(s, alphas=None).candidate({"smooth": "layers"}, budget)


def test_a_rounding_is_priced_with_the_errors_that_it_leaves(make_surrogate: Callable[..., Surrogate]) -> None:
    plain = make_surrogate("ilp-channel")
    half = replace(
        plain.profile,
        arrays={k: v / 2 if k.startswith("output_error") else v for k, v in plain.profile.arrays.items()},
        calibration={**plain.profile.calibration, "gptq": "auto"},
    )
    asked = []

    def priced(method: MethodSpec) -> SensitivityProfile:
        asked.append(method.rounding)
        return half

    s = replace(plain, priced=priced)
    budget = Budget.parse("uniform:3")
    assert s.candidate({}, budget).predicted == plain.candidate({}, budget).predicted
    assert not asked, "nearest rounding keeps the profile"
    found = s.candidate({"rounding": "gptq"}, budget)
    assert set(asked) == {"gptq"}
    assert found.bit_map.format.rounding == "gptq"
    np.testing.assert_allclose(
        s.losses_of({}, s.method_of({"rounding": "gptq"})), plain.losses_of({}, plain.method) / 2, rtol=1e-6
    )
    assert found.predicted == pytest.approx(s.measured_map(found.bit_map, budget, bias_correction=True).predicted)


def test_losses_kept_for_a_point_are_used_for_that_point_alone(make_surrogate: Callable[..., Surrogate]) -> None:
    budgets = (Budget.parse("uniform:2.5"), Budget.parse("uniform:3.5"))
    correction = np.random.default_rng(0).lognormal(size=(len(make_surrogate().profile.names), 1))

    def maps(s: Surrogate) -> list[str]:
        return [c.digest for d in (0.0, 2.0) for b in budgets for c in (s.candidate({"depth": d}, b),)]

    s = make_surrogate()
    plain = maps(s)
    corrected = maps(replace(s, correction=correction))
    assert corrected == maps(make_surrogate(correction=correction))
    assert corrected != plain
    assert (
        plain
        == maps(s)
        == [d for p in (0.0, 2.0) for b in budgets for d in (make_surrogate().candidate({"depth": p}, b).digest,)]
    )
