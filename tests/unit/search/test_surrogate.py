from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import Budget, bops, size_bits
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec, Programs
from mpqsearch.search.space import PARAMETERS, parse_space
from mpqsearch.search.surrogate import Surrogate

Make = Callable[..., Surrogate]
BUDGETS = [Budget.parse(t) for t in ("uniform:2", "uniform:3", "uniform:4", "4.5bit")]
ALL_DEFAULTS = {name: p.default for name, p in PARAMETERS.items()}
SHAPING = ("exponent", "low_bits", "kurtosis", "depth", "role_linear")


@pytest.mark.parametrize("allocator", ["ilp-layer", "ilp-channel"])
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.label())
def test_defaults_reproduce_the_plain_integer_program_exactly(
    make_surrogate: Make, allocator: str, budget: Budget
) -> None:
    s = make_surrogate(allocator)
    plain = Programs(table=s.table, profile=s.profile, policy=s.policy, format=s.format).allocate(s.method, budget)
    start = parse_space({n: [PARAMETERS[n].low, PARAMETERS[n].high] for n in SHAPING}).starts()[0]
    for theta in ({}, ALL_DEFAULTS, start):
        candidate = s.candidate(theta, budget)
        assert candidate.bit_map.digest == plain.bit_map.digest
        assert candidate.predicted == plain.predicted_loss
        assert candidate.size_bytes == -(-plain.size_bits // 8)


@pytest.mark.parametrize("name", SHAPING)
def test_every_shaping_parameter_changes_losses_and_stays_positive(make_surrogate: Make, name: str) -> None:
    s = make_surrogate()
    losses = s.losses_of({name: 0.7}, s.method)
    assert not np.allclose(losses, s.losses_of({}, s.method))
    assert np.isfinite(losses).all()
    assert (losses >= 0).all()


def test_parameters_do_what_their_meaning_says(make_surrogate: Make) -> None:
    s = make_surrogate()
    losses, p = s.losses_of({}, s.method), s.profile
    totals, widths = p.layer_sum(losses), np.array(p.widths)

    squared = p.layer_sum(s.losses_of({"exponent": 2.0}, s.method))
    ratio = squared / totals**2
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-9)  # one constant for all: a power of the totals

    tilted = s.losses_of({"low_bits": 1.0}, s.method)
    np.testing.assert_allclose(tilted / losses, np.broadcast_to(2.0 ** (4.0 - widths), losses.shape), rtol=1e-9)

    tripled = p.layer_sum(s.losses_of({"role_linear": 3.0}, s.method)) / totals
    inner = np.array([s.table[n].role == "linear" for n in p.names])
    np.testing.assert_allclose(tripled[inner], 3.0, rtol=1e-9)
    np.testing.assert_allclose(tripled[~inner], 1.0, rtol=1e-9)

    even, raw = (s.losses_of({}, s.method_of({"shrinkage": amount})) for amount in (1.0, 0.0))
    sensitivity = p.arrays["sensitivity"][p.rows(p.names[2])]
    share = (raw / even)[p.rows(p.names[2]), 0]
    np.testing.assert_allclose(share / share.sum(), sensitivity / sensitivity.sum(), rtol=1e-5)

    heavy = s.losses_of({"kurtosis": 1.0}, s.method) / losses
    np.testing.assert_allclose(heavy[:, 0], np.maximum(p.arrays["kurtosis_smoothed"], 0.1) / 3, rtol=1e-6)

    deep = p.layer_sum(s.losses_of({"depth": 2.0}, s.method)) / totals
    np.testing.assert_allclose(deep[[0, -1], 0], [0.5, 2.0], rtol=1e-9)


def test_choices_reach_the_map(make_surrogate: Make) -> None:
    s, budget = make_surrogate(), BUDGETS[1]
    assert s.candidate({"granularity": "channel"}, budget).bit_map.granularity == "channel"
    assert s.candidate({"scheme": "asymmetric"}, budget).bit_map.format.scheme == "asymmetric"
    assert s.candidate({"smooth": "on"}, budget).bit_map.format.smooth
    assert s.candidate({"rounding": "gptq"}, budget).bit_map.format.rounding == "gptq"
    assert not s.candidate({"bias_correction": "off"}, budget).bias_correction
    weight = Programs(table=s.table, profile=s.profile, policy=s.policy, format=s.format).allocate(
        replace(s.method, loss="weight"), budget
    )
    assert s.candidate({"loss": "weight"}, budget).bit_map.digest == weight.bit_map.digest


@pytest.mark.parametrize(
    ("theta", "act_bits"),
    [({"end_bits": 4}, 16), ({"end_bits": 6}, 4), ({"act_scales": "timestep"}, 4), ({"act_scales": "layer"}, 4)],
)
def test_no_choice_changes_the_size_that_a_budget_allows(
    make_surrogate: Make, theta: dict[str, object], act_bits: int
) -> None:
    s = make_surrogate("ilp-channel")
    profile = replace(s.profile, calibration={**s.profile.calibration, "timesteps": 10})
    s = replace(s, profile=profile, method=replace(s.method, act_bits=act_bits))
    for budget in BUDGETS[1:3]:
        plain, other = s.candidate({}, budget).bit_map, s.candidate(theta, budget).bit_map
        limit = budget.limit_bits(s.table, s.policy, act_bits=act_bits, activation_steps=10, token_scales=True)
        assert size_bits(s.table, plain) <= limit
        assert 0.97 * limit < size_bits(s.table, other) <= limit
        assert other.activation_steps == (1 if act_bits == 16 or theta.get("act_scales") == "layer" else 10)
        assert other.token_scales == (act_bits == 4 and "act_scales" not in theta)
        if "end_bits" in theta:
            ends = [la.name for la in s.table if la.role in ("first", "last")]
            assert ends
            assert all(np.all(other.weights[n] == theta["end_bits"]) for n in ends)


def test_a_budget_of_operations_is_kept(make_surrogate: Make) -> None:
    s = make_surrogate("ilp-layer")
    budget = Budget.parse(f"{3 * 8 * sum(la.macs for la in s.table)}bops")
    s = replace(s, method=replace(s.method, act_bits=8))
    assert bops(s.table, s.candidate({"exponent": 1.5}, budget).bit_map) <= budget.limit


def test_a_rounding_is_priced_with_the_errors_that_it_leaves(make_surrogate: Make) -> None:
    plain = make_surrogate("ilp-channel")
    half = replace(
        plain.profile,
        arrays={k: v / 2 if k.startswith("output_error") else v for k, v in plain.profile.arrays.items()},
        calibration={**plain.profile.calibration, "gptq": "auto"},
    )
    asked = []

    def priced(method: MethodSpec) -> object:
        asked.append(method.rounding)
        return half

    s, budget = replace(plain, priced=priced), Budget.parse("uniform:3")
    assert s.candidate({}, budget).predicted == plain.candidate({}, budget).predicted
    assert not asked, "nearest rounding keeps the profile"
    assert s.candidate({"rounding": "gptq"}, budget).bit_map.format.rounding == "gptq"
    assert set(asked) == {"gptq"}
    theta = {"rounding": "gptq", "loss": "output"}
    np.testing.assert_allclose(
        s.losses_of(theta, s.method_of(theta)), plain.losses_of({}, replace(plain.method, loss="output")) / 2, rtol=1e-6
    )


def test_a_method_without_an_integer_program_is_refused(make_surrogate: Make) -> None:
    with pytest.raises(ConfigError, match="integer program"):
        make_surrogate("uniform")
