"""The model's evaluator against the quantizer and the sampler, one call at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpqsearch.core import Budget, Policy, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec
from mpqsearch.metrics import FeatureStatistics, frechet_distance, load_extractor
from mpqsearch.models import discover
from mpqsearch.profile import profile_model
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import sample, to_uint8
from mpqsearch.search.measure import ModelEvaluator
from mpqsearch.search.surrogate import Candidate, Surrogate
from mpqsearch.specs import CalibrationSpec, SamplerSpec
from tests.support.drawn import reference_of
from tests.support.tiny import tiny_denoiser

SAMPLER = SamplerSpec(steps=3, guidance=2.0, batch=8)
POLICY = Policy(widths=(2, 3, 4, 8))
FORMAT = QuantFormat(n_candidates=12)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelEvaluator, Surrogate]:
    denoiser = tiny_denoiser("unet")
    table = discover(denoiser)
    spec = CalibrationSpec(samples=2, probe_inputs=4, probes=1)
    profile = profile_model(denoiser, table, POLICY, SAMPLER, spec, FORMAT)
    method = MethodSpec(name="ilp", allocator="ilp-channel", scheme="auto", bias_correction=True)
    surrogate = Surrogate(table=table, profile=profile, policy=POLICY, format=FORMAT, method=method)
    seeds = tuple(range(6))
    full, extractor = sample(denoiser, seeds, SAMPLER), load_extractor("random-conv")
    means = {n: torch.from_numpy(np.array(v)) for n, v in profile.means.items()}

    def quantized(candidate: Candidate) -> torch.nn.Module:
        corrected = means if candidate.bias_correction else None
        return quantize_model(denoiser.module, table, candidate.bit_map, means=corrected).module

    evaluator = ModelEvaluator(
        denoiser=denoiser,
        sampler=SAMPLER,
        quantized=quantized,
        calibration="tiny",
        reference=reference_of(full, extractor, tmp_path_factory.mktemp("full")),
        extractor=extractor,
    )
    return evaluator, surrogate


def test_errors_are_those_of_the_quantized_model_and_no_map_leaves_a_trace(
    parts: tuple[ModelEvaluator, Surrogate],
) -> None:
    e, s = parts
    maps = [s.candidate({}, Budget.parse("uniform:3")), s.candidate({"bias_correction": "off"}, Budget.parse("3.5bit"))]
    for candidate in (*maps, maps[0]):
        samples = sample(e.denoiser.with_module(e.quantized(candidate)), [7, 8], SAMPLER).double()
        expected = (samples - sample(e.denoiser, [7, 8], SAMPLER).double()).square().flatten(1).mean(1)
        np.testing.assert_allclose(e.errors(candidate, [7, 8]), expected.numpy(), rtol=1e-6)
    assert e.forwards_per_sample == 6  # three steps, guided


def test_feature_errors_and_distance_are_those_of_the_extractor(parts: tuple[ModelEvaluator, Surrogate]) -> None:
    e, s = parts
    e = replace(e, error="features")
    candidate, seeds = s.candidate({}, Budget.parse("uniform:2")), list(range(10, 18))
    ours = e.extractor(to_uint8(sample(e.denoiser.with_module(e.quantized(candidate)), seeds, SAMPLER)))
    theirs = e.extractor(to_uint8(sample(e.denoiser, seeds, SAMPLER)))
    distance, *errors = e.distance(candidate, seeds)
    np.testing.assert_allclose(errors, (ours.double() - theirs.double()).square().sum(1).numpy(), rtol=1e-6)
    expected = frechet_distance(FeatureStatistics.of(theirs), FeatureStatistics.of(ours))
    assert distance == pytest.approx(expected, rel=1e-6)
    assert errors == e.errors(candidate, seeds)
    assert e.identity != parts[0].identity


def test_the_report_says_what_is_better_and_full_precision_is_perfect(parts: tuple[ModelEvaluator, Surrogate]) -> None:
    e, s = parts
    coarse, fine = (s.candidate({}, Budget.parse(t)) for t in ("uniform:2", "uniform:8"))
    report = e.report(coarse)
    assert report["fd_fp"] > e.report(fine)["fd_fp"]
    assert report["paired_psnr_low"] < report["paired_psnr"] < report["paired_psnr_high"]
    assert report["error"] == pytest.approx(np.mean(e.errors(coarse, range(6))))
    full = replace(
        coarse,
        bit_map=replace(coarse.bit_map, weights={n: np.array(16, dtype=np.uint8) for n in coarse.bit_map.weights}),
        bias_correction=False,
    )
    assert e.errors(full, [3, 4]) == [0.0, 0.0]
    assert replace(e, reference=None).report(coarse) == {}


def test_a_map_is_quantized_once_while_it_is_kept(parts: tuple[ModelEvaluator, Surrogate]) -> None:
    e, s = parts
    calls: list[str] = []

    def counted(candidate: Candidate) -> torch.nn.Module:
        calls.append(candidate.digest)
        return quantized(candidate)

    quantized = e.quantized
    e = replace(e, quantized=counted, keep=2)
    a, b, c = (s.candidate({}, Budget.parse(f"uniform:{k}")) for k in (3, 4, 8))
    for candidate in (a, b, a, b, c, b, a):
        e.errors(candidate, [1])
    assert calls == [x.digest for x in (a, b, c, a)]


def test_features_need_an_extractor(parts: tuple[ModelEvaluator, Surrogate]) -> None:
    with pytest.raises(ConfigError, match="needs a feature extractor"):
        replace(parts[0], error="features", extractor=None)
