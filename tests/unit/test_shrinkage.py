"""What an integer program is given is never the raw noise of a measurement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import Budget, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec, Programs, channel_losses
from mpqsearch.methods.shrinkage import FLOOR, believed_totals, estimated_shrinkage, posterior_sensitivity
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


def test_a_total_of_nothing_is_not_believed_and_others_stay() -> None:
    base = np.outer([1.0, 2.0, 3.0, 4.0, 5.0], [4.0, 1.0])
    totals = 5 * base
    totals[2] = 0
    totals[4] *= 100  # of another role
    found = believed_totals(totals, base, ["conv"] * 4 + ["time"])
    np.testing.assert_allclose(found[2], FLOOR * 5 * base[2], rtol=1e-9)
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], totals[[0, 1, 3, 4]])
    alone = believed_totals(totals, base, ["conv", "conv", "linear", "conv", "time"])
    assert (alone[2] > found[2]).all(), "without a peer of its role, all layers are its peers"
    silent = np.zeros_like(totals)
    np.testing.assert_array_equal(believed_totals(silent, base, ["conv"] * 5), silent)


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
    silent = {}
    for amount, bit_map in widths.items():
        rows = [np.broadcast_to(bit_map.weights[n], c) for n, c in zip(profile.names, profile.channels, strict=True)]
        silent[amount] = np.concatenate(rows)[: len(first) // 2].mean()
    assert silent[None] > silent[0.0], "bits go to channels that seemed dead"


@pytest.mark.parametrize("amount", [-0.1, 1.5])
def test_a_shrinkage_outside_its_range_is_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match=r"shrinkage must lie in 0\.\.1"):
        MethodSpec(name="m", allocator="ilp-channel", shrinkage=amount)
