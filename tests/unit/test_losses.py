from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import BitMap, Budget, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.methods import (
    CHOOSING,
    LOSSES,
    MethodSpec,
    Programs,
    available_losses,
    best_loss,
    channel_losses,
    predicted_loss,
)
from mpqsearch.methods.shrinkage import posterior_sensitivity
from tests.support import tiny_profile, tiny_table

TABLE = tiny_table()
TOTALS = np.outer([4.0, 3.0, 2.0, 1.0, 0.5], 4.0 ** -np.arange(8)).astype(np.float32)
SLOPE = np.outer([1.0, -1.0, 0.1, 3.0, 0.0], 2.0 ** -np.arange(8)).astype(np.float32)
FORMATS = ("asymmetric", "auto", "asymmetric+smooth")


def programs(profile: SensitivityProfile) -> Programs:
    return Programs(table=TABLE, profile=profile, policy=Policy(), format=QuantFormat())


def holding(*families: str, formats: tuple[str, ...] = FORMATS) -> SensitivityProfile:
    base = tiny_profile(TABLE)
    arrays = {k: a for k, a in base.arrays.items() if k != "layer_activation_error"}
    return replace(base, arrays={**arrays, **{f"{f}/{v}": TOTALS for f in families for v in formats}})


def with_slopes(
    base: SensitivityProfile, *, widths: tuple[int, ...] = (2, 3, 4), slope: np.ndarray = SLOPE
) -> SensitivityProfile:
    return replace(
        base,
        arrays={**base.arrays, "layer_context_slope/auto": slope},
        calibration={"spec": {"context_widths": list(widths)}},
    )


def uniform(bits: int) -> BitMap:
    return BitMap(
        model_digest=TABLE.digest,
        weights={la.name: np.array(bits) for la in TABLE},
        format=QuantFormat(scheme="auto"),
    )


def totals(profile: SensitivityProfile, loss: str, fmt: str = "auto", *, bias_correction: bool = True) -> np.ndarray:
    return profile.layer_sum(channel_losses(profile, TABLE, fmt, loss, bias_correction=bias_correction))


def test_auto_is_the_best_loss_that_was_measured() -> None:
    assert best_loss(holding()) == "probe"
    assert best_loss(holding("layer_final_error")) == "final"
    assert best_loss(holding("layer_final_error", "layer_sampler_error")) == "sampler"
    assert best_loss(holding("layer_sampler_error_corrected")) == "sampler"
    assert best_loss(with_slopes(holding("layer_sampler_error"))) == "sampler", "slopes choose no widths"
    weights = holding()
    weights = replace(
        weights, arrays={k: a for k, a in weights.arrays.items() if k.startswith(("weight_error", "kurtosis"))}
    )
    assert best_loss(weights) == "weight"
    assert available_losses(weights) == ("weight",)
    profile = holding("layer_sampler_error")
    np.testing.assert_array_equal(
        channel_losses(profile, TABLE, "auto", "auto", bias_correction=True),
        channel_losses(profile, TABLE, "auto", "sampler", bias_correction=True),
    )


@pytest.mark.parametrize("family", ["layer_probe_error", "layer_sampler_error", "layer_final_error"])
def test_totals_are_those_of_the_quantizer_that_will_be_used(family: str) -> None:
    """Totals are measured with bias correction and without; a method takes its own."""
    loss = next(name for name, spec in LOSSES.items() if spec.family == family)
    profile = holding(family)
    profile = replace(profile, arrays={**profile.arrays, f"{family}_corrected/auto": TOTALS / 3})
    np.testing.assert_allclose(totals(profile, loss, bias_correction=False), TOTALS, rtol=1e-6)
    np.testing.assert_allclose(totals(profile, loss, bias_correction=True), TOTALS / 3, rtol=1e-6)


def test_a_layer_with_a_constant_input_is_not_free_for_a_method_that_corrects_no_bias() -> None:
    """Its whole error is a shift of the mean: measured with bias correction alone, it seems to cost nothing."""
    base, name = holding(), TABLE.layers[2].name
    arrays = dict(base.arrays)
    for fmt in FORMATS:
        corrected = arrays[f"output_error_corrected/{fmt}"].copy()
        corrected[base.rows(name)] = 0
        arrays[f"output_error_corrected/{fmt}"] = corrected
        measured = TOTALS.copy()
        measured[2] = 0
        arrays[f"layer_probe_error_corrected/{fmt}"] = measured
    profile = replace(base, arrays=arrays)
    assert not totals(profile, "probe", bias_correction=True)[2].any()
    free, priced = (totals(profile, "probe", bias_correction=b) for b in (True, False))
    assert (priced[2] > 0).all()
    others = [0, 1, 3, 4]
    errors = {
        b: profile.layer_sum(channel_losses(profile, TABLE, "auto", "output", bias_correction=b)) for b in (True, False)
    }
    assert np.all(errors[False][others] > errors[True][others])
    assert np.all(priced[others] > free[others]), "without correction the shift of the mean costs too"
    method = MethodSpec(name="m", allocator="ilp-layer", scheme="auto", loss="probe")
    made = programs(profile).allocate(method, Budget.parse("uniform:3"))
    assert int(made.bit_map.weights[name]) > 1


def test_what_was_not_measured_in_a_format_is_carried_over_by_its_own_errors() -> None:
    some = holding("layer_sampler_error", formats=("asymmetric", "auto"))
    own, other = (
        some.layer_sum(
            channel_losses(some, TABLE, fmt, "output", bias_correction=False) * posterior_sensitivity(some)[:, None]
        )
        for fmt in ("asymmetric+smooth", "asymmetric")
    )
    found = totals(some, "sampler", "asymmetric+smooth", bias_correction=False)
    np.testing.assert_allclose(found, TOTALS * own / other, rtol=1e-5)
    probes = {
        f"layer_probe_error/{fmt}": (TOTALS * factor).astype(np.float32)
        for fmt, factor in (("asymmetric", 2.0), ("asymmetric+smooth", 10.0))
    }
    probed = replace(some, arrays={**some.arrays, **probes})
    found = totals(probed, "sampler", "asymmetric+smooth", bias_correction=False)
    np.testing.assert_allclose(found, TOTALS * 5, rtol=1e-5, err_msg="by the probes where both formats have them")


def test_one_layer_at_a_time_fills_in_the_widths_between() -> None:
    final = np.full_like(TOTALS, np.nan)
    final[:4, 2] = 5 * TOTALS[:4, 2]  # at three bits, and nothing of the last layer
    final[0, 4] = 20 * TOTALS[0, 4]
    base = holding("layer_probe_error")
    profile = replace(base, arrays={**base.arrays, "layer_final_error/auto": final})
    found = totals(profile, "final", bias_correction=False) / TOTALS
    np.testing.assert_allclose(found[1:], 5, rtol=1e-5, err_msg="the last layer takes the median")
    np.testing.assert_allclose(found[0], [5, 5, 5, 10, 20, 20, 20, 20], rtol=1e-5)


def test_predictions_of_all_formats_are_in_one_unit() -> None:
    everywhere = holding("layer_sampler_error")
    for fmt in (QuantFormat(scheme="auto"), QuantFormat(smooth=True)):
        bit_map = replace(uniform(3), format=fmt)
        assert predicted_loss(TABLE, everywhere, bit_map, bias_correction=False) == pytest.approx(
            float(TOTALS[:, 2].sum()), rel=1e-5
        )
    acts = replace(everywhere, arrays={**everywhere.arrays, "layer_activation_error": TOTALS})
    plain = predicted_loss(TABLE, acts, uniform(3), bias_correction=True)
    assert plain == pytest.approx(predicted_loss(TABLE, acts, uniform(3), bias_correction=True, loss="probe"))
    quantized = replace(uniform(3), activations={TABLE.layers[0].name: 2})
    assert predicted_loss(TABLE, acts, quantized, bias_correction=True) == pytest.approx(plain + float(TOTALS[0, 1]))


def test_a_slope_predicts_what_was_measured_and_is_split_over_the_channels() -> None:
    profile = with_slopes(holding())
    np.testing.assert_allclose(totals(profile, "slope"), SLOPE, rtol=1e-5, atol=1e-9)
    assert predicted_loss(TABLE, profile, uniform(3), bias_correction=True, loss="slope") == pytest.approx(
        SLOPE[:, 2].sum(), rel=1e-5
    )
    found = totals(profile, "slope", "asymmetric")
    assert (np.sign(found) == np.sign(SLOPE)).all(), "another format takes them in the ratio of its errors"


def test_what_predicts_a_map_goes_by_its_mean_width() -> None:
    both = with_slopes(holding("layer_sampler_error"))
    assert best_loss(holding(), mean_width=3) == "probe"
    assert [best_loss(both, mean_width=bits) for bits in (2.0, 4.4, 4.6, 8.0)] == [
        "slope",
        "slope",
        "sampler",
        "sampler",
    ]
    assert best_loss(with_slopes(holding("layer_sampler_error"), widths=(4, 6, 8)), mean_width=8.0) == "slope"
    acts = replace(both, arrays={**both.arrays, "layer_activation_error": TOTALS})
    assert best_loss(acts, mean_width=3) == "probe"


def test_a_prediction_is_a_loss_or_absent() -> None:
    """Slopes of either sign may sum to less than nothing; that is never handed out as a loss."""
    below = with_slopes(holding("layer_sampler_error"), slope=-np.abs(SLOPE) - 1)
    assert predicted_loss(TABLE, below, uniform(3), bias_correction=True) == pytest.approx(
        predicted_loss(TABLE, below, uniform(3), bias_correction=True, loss="sampler")
    )


def test_a_loss_for_predicting_is_refused_for_choosing() -> None:
    with pytest.raises(ConfigError, match="'slope' predicts what a given map loses.*Choose by 'auto' or one of weight"):
        MethodSpec(name="m", allocator="ilp-layer", loss="slope")
    with pytest.raises(UnknownNameError, match="unknown loss 'gain'.*sampler"):
        MethodSpec(name="m", allocator="ilp-layer", loss="gain")
    assert set(CHOOSING) == set(LOSSES) - {"slope"}


@pytest.mark.parametrize("loss", ["sampler", "slope", "final"])
def test_a_loss_of_final_samples_that_recorded_calls_cannot_give_says_so(loss: str) -> None:
    profile = replace(holding(), calibration={"recorded_calls": 7})
    with pytest.raises(
        ConfigError, match=rf"'{loss}' was asked for.*measured on 7 recorded calls.*allows weight, output, probe"
    ):
        channel_losses(profile, TABLE, "auto", loss, bias_correction=True)
    with pytest.raises(ConfigError, match=r"needs calibration\.\w+ in the profile.*profile again"):
        channel_losses(holding(), TABLE, "auto", loss, bias_correction=True)


def test_a_bias_is_corrected_only_where_there_is_one() -> None:
    layers = tuple(replace(la, has_bias=i != 1) for i, la in enumerate(TABLE))
    table = LayerTable(digest=TABLE.digest, layers=layers, kept=TABLE.kept)
    profile = holding()
    error = channel_losses(profile, table, "auto", "output", bias_correction=True)
    for i, name in enumerate(profile.names):
        family = "output_error_corrected" if i != 1 else "output_error"
        np.testing.assert_array_equal(
            error[profile.rows(name)], profile.arrays[f"{family}/auto"][profile.rows(name)].astype(np.float64)
        )


def test_a_profile_of_layers_alone_chooses_widths_of_layers() -> None:
    """Whole layers have totals and nothing is known of their channels: by layer as a full profile, by channel not."""
    full = holding("layer_probe_error", "layer_probe_error_corrected")
    arrays = {k: a for k, a in full.arrays.items() if k.startswith("layer_probe_error")}
    alone = replace(full, arrays=arrays)
    assert alone.layers_only
    assert not alone.weights_only
    assert available_losses(alone) == ("probe",)
    np.testing.assert_allclose(totals(alone, "auto"), TOTALS, rtol=1e-6)
    budget = Budget.parse("uniform:3")
    method = MethodSpec(name="m", allocator="ilp-layer", scheme="auto", bias_correction=True)
    made, same = (programs(p).allocate(method, budget) for p in (alone, full))
    assert made.bit_map.digest == same.bit_map.digest
    assert made.predicted_loss == pytest.approx(same.predicted_loss)
    for allocator in ("ilp-channel", "omq"):
        with pytest.raises(ConfigError, match="chooses for output channels.*ilp-layer, or profile by channel"):
            programs(alone).allocate(MethodSpec(name="m", allocator=allocator), budget)
    with pytest.raises(ConfigError, match="made for layers alone.*'probe' works"):
        channel_losses(alone, TABLE, "auto", "output", bias_correction=True)
    mixed = replace(uniform(3), weights={**uniform(3).weights, TABLE.layers[0].name: np.array([2, 3, 3, 3, 3, 3])})
    assert np.isnan(predicted_loss(TABLE, alone, mixed, bias_correction=True))


@pytest.mark.parametrize("loss", ["sampler", "probe", "output", "weight"])
def test_the_nearest_of_two_values_costs_more_than_it_does_alone(loss: str) -> None:
    """Where a program chooses by estimates that were made at full precision; measured errors stay what they are."""
    profile = holding("layer_sampler_error")
    plain = channel_losses(profile, TABLE, "auto", loss, bias_correction=True)
    for rounding in ("nearest", "gptq", "kfac"):
        priced = channel_losses(profile, TABLE, "auto", loss, bias_correction=True, rounding=rounding)
        doubted = rounding == "nearest" and loss in ("sampler", "probe")
        expected = np.where(np.array(profile.widths) == 1, 3.0 if doubted else 1.0, 1.0) * plain
        np.testing.assert_allclose(priced, expected, rtol=1e-12)
        assert 1 in profile.widths
