from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import BitMap, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.methods import CAUTION, available_losses, best_loss, channel_losses, predicted_loss, prediction_loss
from tests.support import tiny_profile, tiny_table

TABLE = tiny_table()
TOTALS = np.outer([4.0, 3.0, 2.0, 1.0, 0.5], 4.0 ** -np.arange(8)).astype(np.float32)


def holding(
    *families: str, variants: tuple[str, ...] = ("asymmetric", "auto", "asymmetric+smooth")
) -> SensitivityProfile:
    base = tiny_profile(TABLE)
    arrays = {k: a for k, a in base.arrays.items() if k != "layer_activation_error"}
    return replace(base, arrays={**arrays, **{f"{f}/{v}": TOTALS for f in families for v in variants}})


def test_auto_is_the_best_loss_that_was_measured() -> None:
    assert best_loss(holding(), "auto") == "probe"
    assert best_loss(holding("layer_final_error"), "auto") == "final"
    assert best_loss(holding("layer_final_error", "layer_sampler_error"), "auto") == "sampler"
    assert best_loss(holding("layer_operating_error", "layer_operating_std_error"), "auto") == "probe"
    only = holding()
    only = replace(only, arrays={k: a for k, a in only.arrays.items() if k.startswith(("weight_error", "kurtosis"))})
    assert best_loss(only, "auto") == "weight"
    assert available_losses(only, "auto") == ("weight",)
    with pytest.raises(ConfigError, match="sampler_seeds"):
        channel_losses(holding(), TABLE, "auto", "sampler", bias_correction=True)


def test_sampler_totals_are_spread_over_the_channels_and_auto_is_the_same() -> None:
    profile = holding("layer_sampler_error")
    losses = channel_losses(profile, TABLE, "auto", "sampler", bias_correction=True)
    np.testing.assert_allclose(profile.layer_sum(losses), TOTALS, rtol=1e-6)
    np.testing.assert_array_equal(losses, channel_losses(profile, TABLE, "auto", "auto", bias_correction=True))


def test_changes_at_an_operating_point_count_as_worse_than_measured() -> None:
    rng = np.random.default_rng(0)
    change = rng.normal(size=(5, 8)).astype(np.float32)
    doubt = rng.random((5, 8)).astype(np.float32)
    base = holding()
    profile = replace(
        base, arrays={**base.arrays, "layer_operating_error/auto": change, "layer_operating_std_error/auto": doubt}
    )
    totals = profile.layer_sum(channel_losses(profile, TABLE, "auto", "operating", bias_correction=True))
    careful = change + CAUTION * doubt
    # A constant a layer is left open; what counts is the difference between two widths of a layer.
    np.testing.assert_allclose(totals, careful - careful.min(1, keepdims=True), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="remeasure"):
        channel_losses(base, TABLE, "auto", "operating", bias_correction=True)


def test_predictions_of_all_variants_are_in_one_unit() -> None:
    maps = [
        BitMap(model_digest=TABLE.digest, weights={la.name: np.array(3) for la in TABLE}, format=f)
        for f in (QuantFormat(scheme="auto"), QuantFormat(smooth=True))
    ]
    everywhere = holding("layer_sampler_error")
    for bit_map in maps:
        assert predicted_loss(TABLE, everywhere, bit_map, bias_correction=True) == pytest.approx(
            float(TOTALS[:, 2].sum()), rel=1e-5
        )
    # A variant that was not probed takes the ratio to gain x error, layer by layer and width by width, from one that
    # was.
    some = holding("layer_sampler_error", variants=("asymmetric", "auto"))
    losses = channel_losses(some, TABLE, "asymmetric+smooth", "sampler", bias_correction=True)
    own, other = (
        some.layer_sum(channel_losses(some, TABLE, v, "gain", bias_correction=True))
        for v in ("asymmetric+smooth", "asymmetric")
    )
    np.testing.assert_allclose(some.layer_sum(losses), TOTALS * own / other, rtol=1e-5)
    acts = replace(some, arrays={**some.arrays, "layer_activation_error": TOTALS})
    assert predicted_loss(TABLE, acts, maps[0], bias_correction=True) == pytest.approx(
        predicted_loss(TABLE, acts, maps[0], bias_correction=True, loss="probe")
    )


def test_the_loss_among_others_adds_slopes_and_never_makes_an_error_a_gain() -> None:
    slope = np.outer([1.0, -1.0, 0.1, -9.0, 0.0], 2.0 ** -np.arange(8)).astype(np.float32)
    base = holding("layer_sampler_error")
    variants = ("asymmetric", "auto")
    profile = replace(
        base,
        arrays={**base.arrays, **{f"layer_context_slope/{v}": slope for v in variants}},
        calibration={"spec": {"context_widths": [2, 3, 4]}},
    )
    assert "context" in available_losses(profile, "auto")
    assert best_loss(profile, "auto") == "sampler"  # a program leaves the maps at which slopes hold
    found = profile.layer_sum(channel_losses(profile, TABLE, "auto", "context", bias_correction=True))
    # Totals fall by 4 a bit, so above 3 bits the slope is halved with every bit; widths are 1..8.
    share = np.minimum(1.0, 2.0 ** (2.0 - np.arange(8)))
    np.testing.assert_allclose(found, np.maximum(TOTALS + share * slope, 0.1 * TOTALS), rtol=1e-5)
    np.testing.assert_allclose(found[3], 0.1 * TOTALS[3], rtol=1e-5)
    three = BitMap(
        model_digest=TABLE.digest, weights={la.name: np.array(3) for la in TABLE}, format=QuantFormat(scheme="auto")
    )
    predicted = predicted_loss(TABLE, profile, three, bias_correction=True, loss="context")
    assert predicted == pytest.approx(float(found[:, 2].sum()), rel=1e-5)
    # A variant without slopes takes those of another in the ratio of the two losses.
    own = profile.layer_sum(channel_losses(profile, TABLE, "asymmetric+smooth", "sampler", bias_correction=True))
    other = profile.layer_sum(channel_losses(profile, TABLE, "asymmetric+smooth", "context", bias_correction=True))
    share = np.minimum(1.0, np.sqrt(own.sum(0) / own.sum(0)[2]))
    np.testing.assert_allclose(other, np.maximum(own + share * slope * own / TOTALS, 0.1 * own), rtol=1e-4)
    with pytest.raises(ConfigError, match="context_seeds"):
        channel_losses(base, TABLE, "auto", "context", bias_correction=True)


SLOPE = np.outer([1.0, -1.0, 0.1, 3.0, 0.0], 2.0 ** -np.arange(8)).astype(np.float32)


def with_slopes(
    base: SensitivityProfile, *, widths: tuple[int, ...] = (2, 3, 4), variants: tuple[str, ...] = ("auto",)
) -> SensitivityProfile:
    return replace(
        base,
        arrays={**base.arrays, **{f"layer_context_slope/{v}": SLOPE for v in variants}},
        calibration={"spec": {"context_widths": list(widths)}},
    )


def only_slopes(base: SensitivityProfile) -> SensitivityProfile:
    kept = ("kurtosis", "weight_error", "layer_context_slope")
    return replace(base, arrays={k: a for k, a in base.arrays.items() if k.split("/")[0] in kept})


def test_a_slope_predicts_what_was_measured_and_is_split_over_the_channels() -> None:
    for profile in (with_slopes(holding()), only_slopes(with_slopes(holding()))):
        rows = channel_losses(profile, TABLE, "auto", "slope", bias_correction=True)
        np.testing.assert_allclose(profile.layer_sum(rows), SLOPE, rtol=1e-5, atol=1e-9)
        three = BitMap(
            model_digest=TABLE.digest, weights={la.name: np.array(3) for la in TABLE}, format=QuantFormat(scheme="auto")
        )
        assert predicted_loss(TABLE, profile, three, bias_correction=True, loss="slope") == pytest.approx(
            SLOPE[:, 2].sum(), rel=1e-5
        )
        # A variant without slopes takes those of another in the ratio of their errors, layer by layer.
        by = "weight" if profile.prediction_only else "gain"
        own, other = (
            profile.layer_sum(channel_losses(profile, TABLE, v, by, bias_correction=True))
            for v in ("asymmetric", "auto")
        )
        found = profile.layer_sum(channel_losses(profile, TABLE, "asymmetric", "slope", bias_correction=True))
        np.testing.assert_allclose(found, SLOPE * own / other, rtol=1e-5, atol=1e-9)


def test_what_predicts_a_given_map_goes_by_its_mean_width() -> None:
    through = holding("layer_sampler_error")
    both = with_slopes(through)
    assert prediction_loss(holding()) == "probe"
    assert prediction_loss(through) == "sampler"
    assert [prediction_loss(both, bits) for bits in (2.0, 4.4, 4.6, 8.0)] == ["slope", "slope", "context", "context"]
    assert prediction_loss(with_slopes(through, widths=(4, 6, 8)), 8.0) == "slope"
    alone = only_slopes(both)
    assert alone.prediction_only
    assert not alone.weights_only
    assert prediction_loss(alone, 8.0) == "slope"
    assert available_losses(alone, "auto") == ("weight", "slope")
    weights = replace(alone, arrays={k: a for k, a in alone.arrays.items() if not k.startswith("layer_")})
    assert prediction_loss(weights) == "weight"
    assert prediction_loss(replace(both, arrays={**both.arrays, "layer_activation_error": TOTALS})) == "probe"
    for bits, loss in ((3, "slope"), (6, "context")):
        bit_map = BitMap(
            model_digest=TABLE.digest,
            weights={la.name: np.array(bits) for la in TABLE},
            format=QuantFormat(scheme="auto"),
        )
        found = predicted_loss(TABLE, both, bit_map, bias_correction=True)
        assert found == predicted_loss(TABLE, both, bit_map, bias_correction=True, loss=loss)
        assert found != predicted_loss(TABLE, both, bit_map, bias_correction=True, loss="sampler")


def test_a_profile_for_predictions_does_not_choose_widths_unasked() -> None:
    alone = only_slopes(with_slopes(holding()))
    with pytest.raises(ConfigError, match=r"made for predictions alone.*--prediction-only.*\(weight, slope\)"):
        best_loss(alone, "auto")
    with pytest.raises(ConfigError, match="made for predictions alone"):
        channel_losses(alone, TABLE, "auto", "gain", bias_correction=True)


@pytest.mark.parametrize("loss", ["sampler", "slope", "context", "final"])
def test_a_loss_of_final_samples_that_recorded_calls_cannot_give_says_so(loss: str) -> None:
    profile = replace(holding(), calibration={"recorded_calls": 7})
    with pytest.raises(
        ConfigError, match=rf"'{loss}' was asked for.*measured on 7 recorded calls.*allows weight, output, gain, probe"
    ):
        channel_losses(profile, TABLE, "auto", loss, bias_correction=True)
    with pytest.raises(ConfigError, match=r"needs calibration\.\w+ in the profile.*profile again"):
        channel_losses(holding(), TABLE, "auto", loss, bias_correction=True)
