"""What an integer program is given is never the raw noise of a measurement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import Budget, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec, Programs, channel_losses
from mpqsearch.methods.shrinkage import FLOOR, estimated_shrinkage, posterior_effects, posterior_sensitivity
from tests.support import tiny_profile, tiny_table

TABLE = tiny_table()


def measured(first: np.ndarray, second: np.ndarray | None) -> SensitivityProfile:
    base = tiny_profile(TABLE)
    arrays = {**base.arrays, "sensitivity": first.astype(np.float32)}
    if second is not None:
        arrays["context_sensitivity"] = second.astype(np.float32)
    return replace(base, arrays=arrays)


def draws(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True sensitivities, and two measurements of them with independent relative errors."""
    rng, n = np.random.default_rng(seed), sum(tiny_profile(TABLE).channels)
    true = np.exp(rng.normal(size=n))
    first, second = (true * rng.gamma(1 / noise**2, noise**2, size=n) for _ in range(2))
    return true, first, second


def test_a_channel_that_seemed_dead_is_priced() -> None:
    true, first, second = draws(0.3)
    dead = np.arange(0, len(true), 3)
    first[dead] = second[dead] = 0.0
    profile = measured(first, second)
    mean = np.repeat(profile.layer_sum(first) / np.array(profile.channels), profile.channels)
    assert (posterior_sensitivity(profile) >= 0.999 * FLOOR * mean).all()
    assert (posterior_sensitivity(profile, 0.0)[dead] == 0).all(), "as measured"


def test_only_the_shares_inside_a_layer_change() -> None:
    _, first, second = draws(0.5)
    for profile in (measured(first, second), measured(first, None)):
        np.testing.assert_allclose(
            profile.layer_sum(posterior_sensitivity(profile)), profile.layer_sum(first), rtol=1e-6
        )
    even = posterior_sensitivity(measured(first, None), 1.0)
    assert np.ptp(even[measured(first, None).rows(TABLE.layers[0].name)]) == pytest.approx(0, abs=1e-9)


def test_shrinkage_grows_with_the_noise_and_helps() -> None:
    amounts = []
    for noise in (0.1, 0.5, 1.5):
        true, first, second = draws(noise)
        profile = measured(first, second)
        amounts.append(estimated_shrinkage(profile).mean())
        means = np.repeat(profile.layer_sum(true) / np.array(profile.channels), profile.channels)
        scale = np.repeat(profile.layer_sum(first) / np.array(profile.channels), profile.channels)
        after = (posterior_sensitivity(profile) / scale * means - true) ** 2
        before = (first / scale * means - true) ** 2
        if noise > 0.1:  # where there is next to none, the floor is an insurance that is paid for
            assert after.mean() < before.mean()
    assert FLOOR <= amounts[0] < amounts[1] < amounts[2] <= 1


def test_one_measurement_alone_gets_the_floor() -> None:
    _, first, _ = draws(0.3)
    assert (estimated_shrinkage(measured(first, None)) == FLOOR).all()


def test_a_layer_that_is_dead_at_full_precision_takes_its_level_from_the_contexts() -> None:
    _, first, second = draws(0.3)
    rows = tiny_profile(TABLE).rows(TABLE.layers[1].name)
    first[rows] = 0
    found = posterior_sensitivity(measured(first, second))[rows]
    assert found.mean() == pytest.approx(second[rows].mean(), rel=1e-5)


def test_a_total_of_nothing_is_not_believed() -> None:
    base = np.outer([1.0, 2.0, 3.0, 4.0], [4.0, 1.0])
    totals = 5 * base
    totals[2] = 0
    found = posterior_effects(totals, base, np.full(4, 0.2), ["conv"] * 4)
    assert (found[2] > 0).all()
    np.testing.assert_allclose(found[2], FLOOR * 5 * base[2], rtol=1e-6)
    assert (found[[0, 1, 3]] >= totals[[0, 1, 3]]).all(), "what is uncertain costs more, never less, at the mean"


def test_layers_are_shrunk_towards_their_role_by_their_own_error() -> None:
    base, effects = np.ones((6, 2)), np.exp(np.array([-1.0, -0.5, 0.0, 0.0, 0.5, 1.0]))
    totals = effects[:, None] * base
    sure, unsure = (posterior_effects(totals, base, np.full(6, error), ["linear"] * 6)[:, 0] for error in (0.01, 0.8))
    np.testing.assert_allclose(sure, effects, rtol=1e-3)
    assert np.ptp(np.log(unsure)) < 0.7 * np.ptp(np.log(effects))
    unknown = posterior_effects(totals, base, np.full(6, np.nan), ["linear"] * 6)
    np.testing.assert_allclose(unknown, totals, err_msg="no error is known: nothing to shrink by")


def test_no_loss_is_negative_and_a_program_spends_bits_on_silent_channels() -> None:
    _, first, second = draws(0.3)
    first[: len(first) // 2] = second[: len(first) // 2] = 0.0
    profile = measured(first, second)
    losses = channel_losses(profile, TABLE, "auto", "probe", bias_correction=True)
    assert (losses >= 0).all()
    programs = Programs(table=TABLE, profile=profile, policy=Policy(), format=QuantFormat())
    widths = {
        amount: programs.allocate(
            MethodSpec(name="m", allocator="ilp-channel", scheme="auto", shrinkage=amount), Budget.parse("uniform:4")
        ).bit_map
        for amount in (0.0, None)
    }
    least = [min(int(np.min(w)) for w in widths[amount].weights.values()) for amount in (0.0, None)]
    assert least[1] >= least[0]


@pytest.mark.parametrize("amount", [-0.1, 1.5])
def test_a_shrinkage_outside_its_range_is_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match=r"shrinkage must lie in 0\.\.1"):
        MethodSpec(name="m", allocator="ilp-channel", shrinkage=amount)
