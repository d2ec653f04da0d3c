from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpqsearch.core import LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser, discover
from mpqsearch.profile import (
    CalibrationSpec,
    SecondMoments,
    gptq_profile,
    in_formats,
    input_statistics,
    profile_model,
)
from mpqsearch.quant import quantize_weight, rows_of
from tests.support import tiny_denoiser
from tests.support.everything import ALL

SAMPLER = {"steps": 3, "guidance": 2.0, "batch": 4}
SEEDS = range(1_000_000, 1_000_004)
FORMAT = QuantFormat(scheme="auto", n_candidates=20)


def measured(denoiser: Denoiser) -> SensitivityProfile:
    spec = CalibrationSpec(
        samples=4,
        probe_inputs=4,
        probes=1,
        sampler_seeds=2,
        sampler_probes=1,
        context_seeds=3,
        context_widths=(2, 3, 4),
    )
    return profile_model(denoiser, discover(denoiser), Policy(), spec, QuantFormat(n_candidates=20))


def weighted(profile: SensitivityProfile, table: LayerTable) -> np.ndarray:
    """Sensitivity times output error with bias correction ``[C, W]``."""
    has_bias = np.repeat([table[n].has_bias for n in profile.names], profile.channels)[:, None]
    errors = (profile.arrays[f"output_error{suffix}/auto"].astype(float) for suffix in ("_corrected", ""))
    return profile.arrays["sensitivity"].astype(float)[:, None] * np.where(has_bias, *errors)


@pytest.mark.parametrize("kind", ["unet", "dit"] if ALL else ["dit"])
def test_errors_are_those_of_the_layers_that_are_deployed(kind: str) -> None:
    denoiser = tiny_denoiser(kind, **SAMPLER)
    table = discover(denoiser)
    before = measured(denoiser)
    stats = input_statistics(denoiser, table, SEEDS)
    after, rounded = gptq_profile(denoiser, table, before, stats, FORMAT), replace(FORMAT, rounding="gptq")
    for name in after.names:
        layer = table[name]
        weight = denoiser.module.get_submodule(name).weight
        moment = stats[name].covariance if layer.has_bias else stats[name].second_moment
        for j, bits in enumerate(after.widths):
            widths = torch.full((layer.n_channels,), bits, dtype=torch.uint8)
            stored = quantize_weight(weight, layer, widths, rounded, stats[name], bias_correction=layer.has_bias)
            error = (
                (stored.rows() - rows_of(weight.detach(), layer))
                .double()
                .reshape(layer.groups, -1, layer.weights_per_channel)
            )
            expected = (torch.bmm(error, moment) * error).sum(2).flatten().numpy()
            key = "output_error_corrected" if layer.has_bias else "output_error"
            found = after.arrays[f"{key}/auto"][after.rows(name), j]
            # Scales of a width that is alone in its layer may be rounded to storage with another exponent, by the last
            # of their 11 bits.
            assert np.allclose(found, expected, rtol=0.05, atol=1e-6 * float(moment.abs().max())), (name, bits)
    low = [before.widths.index(b) for b in (2, 3)]
    loss = [weighted(p, table)[:, low].sum() for p in (before, after)]
    assert loss[1] < 0.9 * loss[0]


def test_layer_totals_follow_their_rows_and_other_formats_stay() -> None:
    denoiser = tiny_denoiser(**SAMPLER)
    table = discover(denoiser)
    before = measured(denoiser)
    after = gptq_profile(denoiser, table, before, input_statistics(denoiser, table, SEEDS), FORMAT)
    sums = [p.layer_sum(weighted(p, table)) for p in (before, after)]
    plain = [
        p.layer_sum(p.arrays["sensitivity"].astype(float)[:, None] * p.arrays["output_error/auto"])
        for p in (before, after)
    ]
    for family in ("layer_probe_error", "layer_sampler_error"):
        for suffix, (old, new) in (("", plain), ("_corrected", sums)):
            totals = [p.arrays[f"{family}{suffix}/auto"].astype(float) for p in (before, after)]
            some = (old > 0) & (totals[0] > 0)
            np.testing.assert_allclose((totals[1] / totals[0])[some], (new / old)[some], rtol=1e-4)
    assert not any(k.startswith("layer_context") and k.endswith("/auto") for k in after.arrays)
    for key, value in before.arrays.items():
        if not key.endswith("/auto"):
            assert np.array_equal(value, after.arrays[key]), key
    with pytest.raises(ConfigError, match="GPTQ in the format 'symmetric' needs 'output_error/symmetric'"):
        gptq_profile(denoiser, table, before, {}, QuantFormat(scheme="symmetric"))


def test_a_fine_tune_takes_the_sensitivities_of_its_base_and_its_own_errors() -> None:
    fmt, narrow = QuantFormat(n_candidates=4), Policy(widths=(2, 4))
    spec = CalibrationSpec(samples=2, probe_inputs=2, probes=1, sampler_seeds=1, sampler_probes=1, context_seeds=2)
    untuned = tiny_denoiser("unet", **SAMPLER)
    base = profile_model(untuned, discover(untuned), narrow, spec, fmt)
    tuned = tiny_denoiser("unet", **SAMPLER)
    with torch.no_grad():
        for parameter in tuned.module.parameters():
            parameter += 0.05 * parameter.std(correction=0) * torch.randn(parameter.shape)
    tuned = replace(tuned, digest="tuned")
    table = discover(tuned)
    own = profile_model(tuned, table, narrow, spec, fmt)
    taken = profile_model(tuned, table, narrow, spec, fmt, known=base)
    assert taken.calibration["sensitivities_of"] == base.model_digest != taken.model_digest == "tuned"
    for key in ("output_error/auto", "output_error_corrected/auto", "weight_error/auto", "kurtosis", "output_power"):
        assert np.array_equal(taken.arrays[key], own.arrays[key]), "measured on the model itself"
        assert not np.array_equal(taken.arrays[key], base.arrays[key])
    for key in ("sensitivity", "context_sensitivity", "step_sensitivity"):
        assert np.array_equal(taken.arrays[key], base.arrays[key]), "taken from the base"
    totals, before = taken.arrays["layer_probe_error_corrected/auto"], base.arrays["layer_probe_error_corrected/auto"]
    share = base.layer_sum(weighted(taken, table)) / base.layer_sum(weighted(base, table))
    assert np.allclose(totals, before * share, rtol=1e-4)
    assert "layer_context_slope" not in taken.families
    for wrong, model, widths in (("another structure", "dit", narrow), ("has widths", "unet", Policy())):
        denoiser = tiny_denoiser(model, **SAMPLER)
        with pytest.raises(ConfigError, match=wrong):
            profile_model(denoiser, discover(denoiser), widths, spec, fmt, known=base)


def test_groups_of_layers_have_the_statistics_of_all_at_once() -> None:
    denoiser = tiny_denoiser(**SAMPLER)
    table = discover(denoiser)
    whole = input_statistics(denoiser, table, SEEDS)
    sizes = sorted({la.groups * la.weights_per_channel**2 for la in table if la.name in whole})
    runs = []
    parts = SecondMoments(
        denoiser=denoiser,
        table=table,
        seeds=SEEDS,
        limit=40 * sizes[-2],
        progress=lambda _label, done, total: runs.append(done == total),
    )
    large = tuple(la.name for la in table if la.groups * la.weights_per_channel**2 == sizes[-1])
    assert parts.left_out == large
    for layer in table:
        assert (layer.name in parts) == (layer.name in whole and layer.name not in large)
        if layer.name in parts:
            assert torch.equal(parts[layer.name].second_moment, whole[layer.name].second_moment)
            assert torch.equal(parts[layer.name].mean, whole[layer.name].mean)
    assert 1 < sum(runs) < len(table), "some layers at a time, each group once"


def test_profiles_of_several_formats_are_joined_format_by_format() -> None:
    denoiser = tiny_denoiser("dit", **SAMPLER)
    table = discover(denoiser)
    spec = CalibrationSpec(samples=4, probe_inputs=2, probes=1, sampler_seeds=0, context_seeds=0, groups=(16,))
    before = profile_model(denoiser, table, Policy(widths=(2, 4)), spec, QuantFormat(n_candidates=20))
    stats = input_statistics(denoiser, table, SEEDS)
    formats = {f.name: f for f in (FORMAT, replace(FORMAT, group=16))}
    priced = {name: gptq_profile(denoiser, table, before, stats, fmt) for name, fmt in formats.items()}
    joined = in_formats(before, priced)
    for key, array in joined.arrays.items():
        owner = priced.get(key.partition("/")[2], before)
        assert np.array_equal(array, owner.arrays[key])
    for name in formats:
        assert not np.array_equal(joined.arrays[f"output_error/{name}"], before.arrays[f"output_error/{name}"])
