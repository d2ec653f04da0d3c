from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpqsearch.core import Budget, Policy, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec
from mpqsearch.metrics import Reference, load_extractor
from mpqsearch.models import discover
from mpqsearch.profile import CalibrationSpec, InputMoments, calibrate_activations, input_statistics, profile_model
from mpqsearch.quant import quantize_model, weight_of
from mpqsearch.quant.apply import bias_shift
from mpqsearch.sampling import SamplerSpec, sample, to_uint8
from mpqsearch.search.evaluator import ModelEvaluator
from mpqsearch.search.surrogate import Surrogate
from tests.support.tiny import tiny_denoiser

SAMPLER = SamplerSpec(steps=3, guidance=2.0, batch=8)
POLICY = Policy(widths=(2, 3, 4, 8))
FORMAT = QuantFormat(n_candidates=12)
MOMENT_SEEDS = range(1_000_000, 1_000_004)


@pytest.fixture(scope="module")
def parts() -> tuple[ModelEvaluator, Surrogate]:
    denoiser = tiny_denoiser("unet")
    table = discover(denoiser)
    spec = CalibrationSpec(samples=2, probe_inputs=4, probes=1, schemes=("asymmetric", "auto"), smooth=True)
    profile = profile_model(denoiser, table, POLICY, SAMPLER, spec, FORMAT)
    method = MethodSpec(name="ilp", allocator="ilp-channel", scheme="auto", bias_correction=True)
    surrogate = Surrogate(table=table, profile=profile, policy=POLICY, format=FORMAT, method=method)
    seeds = tuple(range(6))
    full = sample(denoiser, seeds, SAMPLER)
    extractor = load_extractor("random-conv")
    reference = Reference(samples=full, features=extractor(to_uint8(full)), seeds=seeds, labels=None)
    evaluator = ModelEvaluator(
        denoiser=denoiser,
        table=table,
        profile=profile,
        sampler=SAMPLER,
        input_seeds=(100, 101),
        inputs=4,
        reference=reference,
        extractor=extractor,
        moments=InputMoments(
            denoiser=denoiser,
            table=table,
            sampler=SAMPLER,
            seeds=MOMENT_SEEDS,
            limit=40 * max(la.groups * la.weights_per_channel**2 for la in table),
        ),
    )
    return evaluator, surrogate


@pytest.mark.parametrize(
    ("theta", "act_bits"),
    [
        ({}, 16),
        ({"granularity": "layer", "bias_correction": "off"}, 16),
        ({"smooth": 0.5}, 16),
        ({}, 4),
        ({"smooth": 0.5}, 6),
        ({"rounding": "gptq"}, 16),
        ({"rounding": "gptq", "bias_correction": "off"}, 16),
        ({"rounding": "gptq", "smooth": 0.5}, 6),
    ],
)
def test_maps_from_the_bank_are_those_of_the_quantizer(
    parts: tuple[ModelEvaluator, Surrogate], theta: dict[str, object], act_bits: int
) -> None:
    e, s = parts
    candidate = replace(s, act_bits=act_bits).candidate(theta, Budget.parse("uniform:3"))
    assert bool(candidate.bit_map.activations) == (act_bits < 16)
    seeds = [7, 8, 9]
    found = e.sample_errors(candidate, seeds)

    tensors = {
        k: {n: torch.from_numpy(np.array(v)) for n, v in d.items()}
        for k, d in (("m", e.profile.means), ("x", e.profile.input_max))
    }
    moments = None
    if theta.get("rounding"):
        stats = input_statistics(e.denoiser, e.table, SAMPLER, MOMENT_SEEDS)
        moments, own = ({n: getattr(x, k) for n, x in stats.items()} for k in ("second_moment", "mean"))
        tensors["m"] |= own
    activations = None
    if act_bits < 16:
        activations = calibrate_activations(
            e.denoiser, e.table, candidate.bit_map, SAMPLER, seeds=e.input_seeds, input_max=tensors["x"]
        )
    module = quantize_model(
        e.denoiser.module,
        e.table,
        candidate.bit_map,
        means=tensors["m"] if candidate.bias_correction else None,
        input_max=tensors["x"],
        activations=activations,
        moments=moments,
    ).module
    made = sample(e.denoiser.with_module(module), seeds, SAMPLER).double()
    expected = (made - sample(e.denoiser, seeds, SAMPLER).double()).square().flatten(1).mean(1)
    # The same rows up to rounding of the same sums; of compensated ones the scales' last bits depend on what else is in
    # the layer.
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=0.1 if theta.get("rounding") else 1e-5)
    assert found.forwards == 3 * 3 * 2


def test_candidates_leave_no_trace_on_the_next_one(parts: tuple[ModelEvaluator, Surrogate]) -> None:
    e, s = parts
    a, b = (
        s.candidate({}, Budget.parse("uniform:2")),
        s.candidate({"bias_correction": "off"}, Budget.parse("uniform:4")),
    )
    before = e.sample_errors(a, [1, 2]).values
    e.sample_errors(b, [1, 2])
    e.sample_errors(replace(s, act_bits=4).candidate({}, Budget.parse("uniform:4")), [1, 2])
    assert e.sample_errors(a, [1, 2]).values == before


def test_rungs_agree_on_what_is_better_and_full_precision_is_perfect(parts: tuple[ModelEvaluator, Surrogate]) -> None:
    e, s = parts
    coarse, fine = (s.candidate({}, Budget.parse(t)) for t in ("uniform:2", "uniform:8"))
    assert e.output_error(coarse).values[0] > e.output_error(fine).values[0] > 0
    report = e.report(coarse).values
    assert report["fd_fp"] > e.report(fine).values["fd_fp"]
    assert report["paired_psnr_low"] < report["paired_psnr"] < report["paired_psnr_high"]
    full = replace(
        coarse,
        bit_map=replace(coarse.bit_map, weights={n: np.array(16, dtype=np.uint8) for n in coarse.bit_map.weights}),
        bias_correction=False,
    )
    assert e.sample_errors(full, [3, 4]).values == (0.0, 0.0)
    assert e.output_error(full).values == (0.0,)
    assert e.output_error(fine).forwards == 4 * 2


@pytest.mark.parametrize(
    ("theta", "act_bits"),
    [({}, 16), ({"bias_correction": "off", "smooth": 0.5}, 16), ({"smooth": 0.5}, 6), ({"rounding": "gptq"}, 16)],
)
def test_slopes_are_those_of_small_steps(
    parts: tuple[ModelEvaluator, Surrogate], theta: dict[str, object], act_bits: int
) -> None:
    """Against finite differences: a hundredth of the way to the weights of another width, for one layer."""
    e, s = parts
    candidate = replace(s, act_bits=act_bits).candidate(theta, Budget.parse("uniform:4"))
    seeds = (3, 4)
    found = e.slopes(candidate, seeds, 1)
    assert found.rows.shape == (2, sum(e.profile.channels), len(e.profile.widths))
    assert found.forwards == 4 * 2 * 3 * 2
    assert found.error == pytest.approx(float(np.mean(e.sample_errors(candidate, seeds).values)), rel=1e-4)
    if act_bits < 16:
        return  # roundings of inputs have no finite differences; their gradients pass straight through
    name = next(la.name for la in e.table if s.policy.fixed_width(la) is None and la.n_channels > 1)
    layer, column = e.table[name], e.profile.widths.index(3)
    student = e._student(candidate)
    widths = torch.from_numpy(candidate.bit_map.channel_widths(name, layer.n_channels).copy())
    centred = candidate.bias_correction
    before = e._rows(name, widths, candidate.bit_map, centred=centred)
    after = e._quantized(name, 3, candidate.bit_map.format, centred=centred)
    module = dict(student.module.named_modules())[name]
    step = 0.01
    with torch.no_grad():
        rows = weight_of(step * (after - before), layer).to(module.weight.dtype)
        module.weight.add_(rows)
        if candidate.bias_correction and module.bias is not None:
            module.bias.sub_(
                bias_shift(step * (after - before), e._statistics(candidate)[0][name]).to(module.bias.dtype)
            )
    full = sample(e.denoiser, seeds, SAMPLER).double()
    moved = float((sample(student, seeds, SAMPLER).double() - full).square().mean())
    expected = (moved - found.error) / step
    assert 2 * float(found.rows.mean(0)[e.profile.rows(name), column].sum()) == pytest.approx(
        expected, rel=0.1, abs=1e-4 * found.error
    )


def test_without_input_moments_compensated_rounding_is_refused(parts: tuple[ModelEvaluator, Surrogate]) -> None:
    e, s = parts
    candidate = s.candidate({"rounding": "gptq"}, Budget.parse("uniform:3"))
    assert candidate.digest != s.candidate({}, Budget.parse("uniform:3")).digest
    with pytest.raises(ConfigError, match="has no input moments"):
        replace(e, moments=None).sample_errors(candidate, [1])
    assert e.report(candidate).values["error"] < e.report(s.candidate({}, Budget.parse("uniform:3"))).values["error"]
