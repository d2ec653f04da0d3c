"""The model's evaluator against the quantizer and the runner, one call at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpqsearch.core import Budget, Policy, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec
from mpqsearch.metrics import (
    FeatureStatistics,
    Reference,
    SampleStore,
    features_of,
    frechet_distance,
    load_extractor,
)
from mpqsearch.models import Denoiser, discover
from mpqsearch.profile import statistics_of
from mpqsearch.prompts import Prompts
from mpqsearch.prompts.reading import Prompt
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import latents, load_model, samples
from mpqsearch.search.measure import ModelEvaluator
from mpqsearch.search.surrogate import Candidate, Surrogate
from mpqsearch.specs import SamplerSpec
from tests.support.pipelines import TINY
from tests.support.tiny import tiny_denoiser, tiny_profile

POLICY = Policy(widths=(2, 3, 4, 8))
FORMAT = QuantFormat(n_candidates=12)

Parts = tuple[ModelEvaluator, Surrogate]


def evaluator_of(denoiser: Denoiser, folder: Path) -> Parts:
    """An evaluator and what finds maps for it; the profile is made of numbers."""
    table = discover(denoiser)
    profile = tiny_profile(table)
    method = MethodSpec(name="ilp", allocator="ilp-channel", loss="probe", scheme="auto", bias_correction=True)
    surrogate = Surrogate(table=table, profile=profile, policy=POLICY, format=FORMAT, method=method)
    extractor = load_extractor("random-conv")
    statistics = statistics_of(profile)
    store = SampleStore(folder, range(6), {})
    store.fill(samples(denoiser, range(6)))

    def quantized(candidate: Candidate) -> torch.nn.Module:
        corrected = candidate.bias_correction
        given = {"statistics": statistics, "bias_correction": corrected}
        return quantize_model(denoiser.module, table, candidate.bit_map, **given).module  # type: ignore[arg-type]

    evaluator = ModelEvaluator(
        denoiser=denoiser,
        quantized=quantized,
        calibration="tiny",
        reference=Reference.of(store, extractor),
        extractor=extractor,
    )
    return evaluator, surrogate


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    denoiser = tiny_denoiser("unet", steps=3, guidance=2.0, batch=8)
    return evaluator_of(denoiser, tmp_path_factory.mktemp("full"))


def test_errors_are_those_of_the_quantized_model_and_no_map_leaves_a_trace(parts: Parts) -> None:
    e, s = parts
    maps = [s.candidate({}, Budget.parse("uniform:3")), s.candidate({"bias_correction": "off"}, Budget.parse("3.5bit"))]
    for candidate in (*maps, maps[0]):
        made = latents(e.denoiser.with_module(e.quantized(candidate)), [7, 8]).double()
        expected = (made - latents(e.denoiser, [7, 8]).double()).square().flatten(1).mean(1)
        np.testing.assert_allclose(e.errors(candidate, [7, 8]), expected.numpy(), rtol=1e-6)
    assert e.forwards_per_sample == 3


def test_feature_errors_and_distance_are_those_of_the_extractor(parts: Parts) -> None:
    e, s = parts
    e = replace(e, error="features")
    assert e.extractor is not None
    candidate, seeds = s.candidate({}, Budget.parse("uniform:2")), list(range(10, 18))
    ours = features_of(samples(e.denoiser.with_module(e.quantized(candidate)), seeds), e.extractor)
    theirs = features_of(samples(e.denoiser, seeds), e.extractor)
    distance, *errors = e.distance(candidate, seeds)
    np.testing.assert_allclose(errors, (ours.double() - theirs.double()).square().sum(1).numpy(), rtol=1e-6)
    expected = frechet_distance(FeatureStatistics.of(theirs), FeatureStatistics.of(ours))
    assert distance == pytest.approx(expected, rel=1e-6)
    assert errors == e.errors(candidate, seeds)
    assert e.identity != parts[0].identity


def test_the_report_says_what_is_better_and_full_precision_is_perfect(parts: Parts) -> None:
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


def test_latents_are_compared_without_decoding_and_frames_of_a_video_are_averaged(tmp_path: Path) -> None:
    pipe, call = TINY["WanPipeline"]()
    pipe.save_pretrained(tmp_path / "wan")
    prompts = Prompts(splits={"report": tuple(Prompt(text=t) for t in ("a boat", "a tree"))})
    denoiser = load_model(str(tmp_path / "wan"), sampler=SamplerSpec(batch=2, call=call), prompts=prompts)
    e, s = evaluator_of(denoiser, tmp_path / "full")
    candidate = s.candidate({}, Budget.parse("uniform:2"))
    pipe = denoiser.runner.pipe(denoiser.module)  # type: ignore[attr-defined]
    decoded: list[int] = []
    pipe.vae.register_forward_pre_hook(lambda *_: decoded.append(1))
    real = pipe.vae.decode
    pipe.vae.decode = lambda *a, **k: (decoded.append(1), real(*a, **k))[1]
    assert min(e.errors(candidate, [0, 1])) > 0
    assert not decoded
    by_features = replace(e, error="features")
    assert by_features.extractor is not None
    ours = features_of(samples(denoiser.with_module(e.quantized(candidate)), [0, 1]), by_features.extractor)
    theirs = features_of(samples(denoiser, [0, 1]), by_features.extractor)
    each = (ours.double() - theirs.double()).square().sum(1).view(2, 9).mean(1)
    np.testing.assert_allclose(by_features.errors(candidate, [0, 1]), each.numpy(), rtol=1e-5)
    assert decoded


def test_a_map_is_quantized_once_while_it_is_kept(parts: Parts) -> None:
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


def test_features_need_an_extractor(parts: Parts) -> None:
    with pytest.raises(ConfigError, match="needs a feature extractor"):
        replace(parts[0], error="features", extractor=None)
