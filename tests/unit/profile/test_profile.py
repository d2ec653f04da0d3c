from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpqsearch.core import BitMap, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.methods import Programs
from mpqsearch.models import Denoiser, capture, discover
from mpqsearch.models.calls import Call
from mpqsearch.profile import CalibrationSpec, profile_model, statistics_of
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import RecordedRunner, each_call, latents, prediction_gains
from tests.support import tiny_denoiser
from tests.support.inputs import calibrated
from tests.support.pipelines import denoiser_of

SAMPLER = {"steps": 4, "guidance": 2.0, "batch": 4}
WIDTHS = (2, 4, 8)


def measure(kind: str, **kwargs: object) -> tuple[Denoiser, LayerTable, SensitivityProfile]:
    denoiser = tiny_denoiser(kind, **SAMPLER)
    table = discover(denoiser)
    settings = {"samples": 4, "probe_inputs": 4, "probes": 1, "sampler_seeds": 0, "schemes": ("asymmetric",), **kwargs}
    spec = CalibrationSpec(**settings)
    return (
        denoiser,
        table,
        profile_model(denoiser, table, Policy(widths=WIDTHS), spec, QuantFormat(n_candidates=20)),
    )


@pytest.fixture(scope="module")
def whole() -> tuple[LayerTable, SensitivityProfile]:
    """A U-Net in five formats, with one layer at a time."""
    _, table, profile = measure("unet", schemes=("asymmetric", "auto"), smooth=True, final_widths=(2,), final_seeds=2)
    return table, profile


@pytest.fixture(scope="module")
def transformer() -> tuple[Denoiser, LayerTable, SensitivityProfile]:
    """A transformer with its profile."""
    return measure("dit")


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_probes_predict_the_measured_change_of_the_output(kind: str) -> None:
    denoiser, table, profile = measure(kind, probe_inputs=16, probes=32)
    seeds = range(1_000_000, 1_000_004)
    calls: list[tuple[Call, torch.Tensor]] = []
    each_call(denoiser, seeds, lambda call, prediction: calls.append((call.kept(), prediction)))
    # Guidance 2 is 2 c - u: an error of the guided prediction has a fifth of the gain of both of its rows.
    runs = [prediction_gains(denoiser, [seed], probe_seed=seed) for seed in seeds[:2]]
    gains = [sum(float(rows.sum()) for rows in same) / 2 / 5 for same in zip(*runs, strict=True)]
    predicted, measured = [], []
    for i, layer in enumerate(table):
        weights = {la.name: np.array(8 if la is layer else 16) for la in table}
        one = quantize_model(
            denoiser.module,
            table,
            BitMap(model_digest=table.digest, weights=weights, format=QuantFormat(n_candidates=20)),
            statistics=statistics_of(profile),
            bias_correction=True,
        )
        change = 0.0
        for (call, prediction), gain in zip(calls, gains, strict=True):
            with torch.no_grad():
                unconditional, conditional = (call.replay(one.module) - prediction).chunk(2)
            guided = unconditional + 2.0 * (conditional - unconditional)
            change += gain * float(guided.square().mean())
        measured.append(change)
        predicted.append(float(profile.arrays["layer_probe_error_corrected/asymmetric"][i, WIDTHS.index(8)]))
    ratio = np.log(np.array(predicted) / np.array(measured))
    # At 8 bits the model is linear in the error; 512 probes leave a relative noise of sqrt(2 / 512) = 6 % on each
    # layer, the factor of two allows for layers whose effect sits in few directions.
    assert abs(float(np.median(ratio))) < 0.1
    assert float(np.abs(ratio).max()) < np.log(2)
    ranks = [np.argsort(np.argsort(v)) for v in (predicted, measured)]
    assert float(np.corrcoef(*ranks)[0, 1]) > 0.97


def test_errors_fall_with_bits_and_arrays_are_complete(whole: tuple[LayerTable, SensitivityProfile]) -> None:
    table, profile = whole
    assert profile.formats == ("asymmetric", "asymmetric+smooth", "asymmetric+smooth+minmax", "auto", "auto+smooth")
    for fmt in profile.formats:
        layers = profile.layer_sum(profile.arrays[f"output_error/{fmt}"])
        assert bool((np.diff(layers, axis=1) < 0).all())
        centred = profile.arrays[f"output_error_corrected/{fmt}"]
        assert bool((centred <= profile.arrays[f"output_error/{fmt}"] * (1 + 1e-5)).all())
    assert bool((profile.arrays["sensitivity"] > 0).all())
    assert bool((profile.arrays["kurtosis"] > 0.5).all())  # at least 1 for many weights; rows here have as few as 8
    assert set(profile.means) == {la.name for la in table}


def test_the_mean_shift_is_the_part_of_an_error_that_centring_takes_off(
    whole: tuple[LayerTable, SensitivityProfile],
) -> None:
    table, profile = whole
    share = profile.shift_share("asymmetric")
    assert share.shape == (len(table), len(WIDTHS))
    assert float(share.min()) >= 0
    assert float(share.max()) < 1
    i = profile.index["conv_in"]
    rows = profile.rows("conv_in")
    full, centred = (profile.arrays[f"output_error{k}/asymmetric"][rows, 0].sum() for k in ("", "_corrected"))
    assert float(share[i, 0]) == pytest.approx(1 - centred / full, rel=1e-4)
    # The time embedding of four timesteps hardly varies, a normalized input varies from position to position.
    varies, still = (
        float(share[profile.index[n]].mean()) for n in ("mid_block.attentions.0.to_q", "time_embedding.linear_2")
    )
    assert varies < still
    with pytest.raises(ConfigError, match="share of the mean shift"):
        profile.shift_share("symmetric")


def test_one_layer_at_a_time_fills_only_what_was_asked(whole: tuple[LayerTable, SensitivityProfile]) -> None:
    table, profile = whole
    has_bias = np.array([la.has_bias for la in table])
    final = {s: profile.arrays[f"layer_final_error{s}/auto"] for s in ("", "_corrected")}
    for values in final.values():
        assert np.isfinite(values[:, 0]).all()
        assert np.isnan(values[:, 1:]).all()
        assert float(values[:, 0].min()) > 0
    assert (final[""][has_bias, 0] != final["_corrected"][has_bias, 0]).all()
    assert (final[""][~has_bias, 0] == final["_corrected"][~has_bias, 0]).all()
    with pytest.raises(ConfigError, match="3 bits"):
        measure("unet", final_widths=(3,), final_seeds=1)


def test_profiling_leaves_the_model_as_it_was(
    transformer: tuple[Denoiser, LayerTable, SensitivityProfile],
) -> None:
    denoiser, _, _ = transformer
    fresh = tiny_denoiser("dit")
    for (name, a), b in zip(denoiser.module.named_parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not a.requires_grad
        assert a.grad is None
    assert not any(m._forward_hooks for m in denoiser.module.modules())


def test_recorded_calls_measure_what_our_own_sampler_measures() -> None:
    """But for what errors do to the final sample: without a sampler all predictions weigh the same."""
    denoiser = tiny_denoiser("unet", steps=4, batch=1)
    table = discover(denoiser)
    spec = CalibrationSpec(samples=4, probe_inputs=4, probes=1, sampler_seeds=0, schemes=("asymmetric",), smooth=False)
    settings = (table, Policy(widths=WIDTHS), spec, QuantFormat(n_candidates=20))
    own = profile_model(denoiser, *settings)
    with capture(denoiser.module) as calls:
        latents(denoiser, range(1_000_000, 1_000_004))
    assert [c.index for c in calls] == [0, 1, 2, 3] * 4
    replayed = replace(denoiser, runner=RecordedRunner(calls))
    recorded = profile_model(replayed, *settings)
    assert recorded.arrays.keys() == own.arrays.keys()
    # The same sixteen inputs in the same order: not one number differs.
    for key, array in own.arrays.items():
        if "sensitivity" not in key and not key.startswith("layer_probe"):
            np.testing.assert_array_equal(recorded.arrays[key], array, err_msg=key)
    assert recorded.calibration["recorded_calls"] == 16
    assert recorded.calibration["timesteps"] == own.calibration["timesteps"] == 4
    with pytest.raises(ConfigError, match="final_widths compares .* which bring no sampler"):
        profile_model(replayed, table, Policy(), CalibrationSpec(final_widths=(2,)), QuantFormat())


def test_a_profile_names_what_it_was_measured_with(
    transformer: tuple[Denoiser, LayerTable, SensitivityProfile],
) -> None:
    denoiser, _, profile = transformer
    assert profile.calibration["runner"] == denoiser.runner.identity
    other = tiny_denoiser("dit", steps=4, guidance=3.0, batch=4)
    assert other.runner.identity != profile.calibration["runner"]


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_quantized_inputs_are_priced_as_the_layer_computes_them(kind: str) -> None:
    denoiser, table, profile = measure(kind, smooth=True, activation_bits=(4,), probe_inputs=2, probes=1)
    seeds = range(1_000_000, 1_000_004)
    fmt = QuantFormat(n_candidates=20, smooth=True)
    statistics = statistics_of(profile)
    seen: dict[str, list[torch.Tensor]] = {}
    modules = dict(denoiser.module.named_modules())
    handles = [
        modules[la.name].register_forward_pre_hook(lambda _m, args, n=la.name: seen.setdefault(n, []).append(args[0]))
        for la in table
    ]
    latents(denoiser, seeds)
    for handle in handles:
        handle.remove()
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(2) for la in table},
        activations={la.name: 4 for la in table},
        format=fmt,
    )
    activations = calibrated(denoiser, table, bit_map, seeds=seeds, statistics=statistics)
    made = dict(
        quantize_model(
            denoiser.module, table, bit_map, statistics=statistics, activations=activations
        ).module.named_modules()
    )
    priced = profile.arrays["quantized_input_error/asymmetric+smooth@a4"]
    for layer in table:
        with torch.no_grad():
            errors = torch.cat([made[layer.name](x) - modules[layer.name](x) for x in seen[layer.name]])
        by_channel = errors.movedim(-1 if layer.kind == "Linear" else 1, 0).flatten(1).square().mean(1)
        np.testing.assert_allclose(
            priced[profile.rows(layer.name)][:, WIDTHS.index(2)], by_channel, rtol=2e-3, atol=1e-7
        )
    assert profile.arrays["layer_activation_error"].shape == (len(table), 3)
    assert bool((np.diff(profile.arrays["layer_activation_error"], axis=1) <= 0).all()), "more bits, less error"


def test_a_layer_that_sees_one_timestep_is_held_at_eight_bits() -> None:
    """SDXL turbo at one step: nothing tells what an error of its time embedding would do at another."""
    denoiser = denoiser_of("StableDiffusionXLPipeline:turbo", num_inference_steps=1)
    table, policy = discover(denoiser), Policy(widths=(2, 4))
    spec = CalibrationSpec(samples=2, probe_inputs=2, probes=1, sampler_seeds=1, context_seeds=0, schemes=("auto",))
    profile = profile_model(denoiser, table, policy, spec, QuantFormat(n_candidates=4))
    time = {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert time <= set(profile.constant_inputs)
    assert not any(name.startswith("add_embedding") for name in profile.constant_inputs), "prompts differ"
    programs = Programs(table=table, profile=profile, policy=policy, format=QuantFormat(scheme="auto"))
    assert {programs.rules.fixed[name] for name in time} == {8}


def test_two_denoisers_are_profiled_as_one_model() -> None:
    denoiser = denoiser_of("WanPipeline:2.2")
    table = discover(denoiser)
    spec = CalibrationSpec(
        samples=2, probe_inputs=6, probes=1, sampler_seeds=2, sampler_probes=1, context_seeds=2, schemes=("auto",)
    )
    profile = profile_model(denoiser, table, Policy(widths=(3, 4)), spec, QuantFormat(n_candidates=4))
    for part in ("transformer.", "transformer_2."):
        mine = [i for i, name in enumerate(profile.names) if name.startswith(part)]
        assert mine
        for family in ("probe", "sampler"):
            assert (profile.arrays[f"layer_{family}_error/auto"][mine] > 0).all(), (part, family)
    assert np.isfinite(profile.arrays["layer_context_slope/auto"]).all()
