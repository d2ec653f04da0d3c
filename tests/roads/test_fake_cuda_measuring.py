"""Features, metrics and the measurements of a search on a GPU give what they give on the CPU, and mix no devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpqsearch.core import BitMap, Budget, QuantFormat
from mpqsearch.metrics import (
    EXTRACTORS,
    FeatureExtractor,
    FeatureStatistics,
    Scorer,
    distance_to_full_precision,
    evaluate,
    frechet_distance,
    load_extractor,
    module_extractor,
)
from mpqsearch.metrics.frechet import kernel_distance, paired_kernel_distance
from mpqsearch.models import Denoiser, discover
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import latents
from mpqsearch.search.measure import ModelEvaluator
from mpqsearch.search.surrogate import Candidate
from tests.support import tiny_denoiser
from tests.support.drawn import batches_of, reference_of
from tests.support.everything import ALL
from tests.support.fake_cuda import FakeCudaTensor, fake_cuda, on_gpu
from tests.support.inputs import known

SEEDS = (0, 1, 2)
SAMPLER: dict[str, Any] = {"steps": 1, "guidance": 2.0, "batch": 2}


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with fake_cuda():
        yield


class Classifier(nn.Module):
    """Features of pixels, and four classes of them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 64, generator=generator), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, :8, :8].flatten(1) @ self.weight.T


def extractor_of(network: nn.Module) -> FeatureExtractor:
    base = module_extractor(network, "pixels")

    def right(images: torch.Tensor, labels: Sequence[Any], _reference: torch.Tensor | None) -> torch.Tensor:
        return (base.features(images.to(base.device)).argmax(1).cpu() == torch.tensor(labels)).double()

    return replace(base, scorers=(Scorer(key="class_accuracy", name="right", against="labels", score=right),))


def labels(denoiser: Denoiser) -> list[int]:
    return [int(label) for label in denoiser.runner.labels(SEEDS) if label is not None]


@pytest.mark.parametrize("name", ["random-conv", "fmnist-cnn"])
def test_an_extractor_computes_on_its_device(name: str) -> None:
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected, moved = load_extractor(name), load_extractor(name, device="cuda")
    assert moved.device.type != "cpu"
    assert moved.label == expected.label
    for given in (images, on_gpu(images)):
        features = moved(given, batch=2)
        assert features.device.type == "cpu"
        torch.testing.assert_close(features, expected(images))
        for ours, theirs in zip(moved.scorers, expected.scorers, strict=True):
            assert torch.equal(ours.score(given, [1] * 5, None), theirs.score(images, [1] * 5, None))
    assert set(EXTRACTORS) >= {"random-conv", "fmnist-cnn"}


def test_metrics_are_those_of_the_cpu(tmp_path: Path) -> None:
    network, denoiser = Classifier(), tiny_denoiser("unet", **SAMPLER)
    extractor, asked = extractor_of(network), labels(denoiser)
    full = latents(denoiser, SEEDS)
    reference = reference_of(full, extractor, tmp_path, labels=asked)
    samples = full + 0.1 * torch.randn(full.shape, generator=torch.Generator().manual_seed(1))
    expected = evaluate(batches_of(samples, labels=asked), reference)
    assert {"paired_mse", "fd_fp", "kid_fp", "class_accuracy"} <= set(expected.metrics)
    moved = extractor_of(on_gpu(network))
    for one, given in ((moved, samples), (extractor, on_gpu(samples)), (moved, on_gpu(samples))):
        made = list(batches_of(given, labels=asked))
        found = evaluate(made, reference_of(full, one, tmp_path, labels=asked))
        for key, value in expected.metrics.items():
            assert found.metrics[key].value == pytest.approx(value.value, rel=1e-6), key
            assert found.metrics[key].high == pytest.approx(value.high, rel=1e-6), key
        assert found.features is not None
        assert found.features.device.type == "cpu"
        assert reference.features is not None
        distance = distance_to_full_precision(made, FeatureStatistics.of(reference.features), one)
        assert distance == pytest.approx(expected.metrics["fd_fp"].value, rel=1e-6)


def test_distances_of_features_that_lie_on_a_device() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator) + 1
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    for w in (None, weights):
        on_device = None if w is None else on_gpu(w)
        statistics = FeatureStatistics.of(x), FeatureStatistics.of(y, w)
        moved = FeatureStatistics.of(on_gpu(x)), FeatureStatistics.of(on_gpu(y), on_device)
        assert frechet_distance(*moved) == frechet_distance(*statistics)
        draws, moved_draws = (None, None) if w is None else (w[None], on_gpu(w[None]))
        for distance in (kernel_distance, paired_kernel_distance):
            assert distance(on_gpu(x), on_gpu(y), moved_draws) == distance(x, y, draws)


@pytest.mark.parametrize("kind", ["unet", "dit"] if ALL else ["dit"])
def test_measurements_of_a_search_are_those_of_the_cpu(kind: str, tmp_path: Path) -> None:
    denoiser, network = tiny_denoiser(kind, **SAMPLER), Classifier()
    table = discover(denoiser)
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(3, dtype=np.uint8) for la in table},
        format=QuantFormat(n_candidates=4),
    )
    means = {la.name: torch.ones(la.groups, la.weights_per_channel) for la in table}
    candidate = Candidate(
        bit_map=bit_map,
        budget=Budget.parse("uniform:3"),
        bias_correction=True,
        predicted=1.0,
        size_bytes=1,
        average_bits=3.0,
    )

    def evaluator(where: str, denoiser: Denoiser, network: nn.Module, **given: Any) -> ModelEvaluator:
        extractor, full = extractor_of(network), latents(denoiser, SEEDS)
        return ModelEvaluator(
            denoiser=denoiser,
            quantized=lambda c: quantize_model(denoiser.module, table, c.bit_map, **given).module,
            calibration="tiny",
            reference=reference_of(full, extractor, tmp_path / where, labels=labels(denoiser)),
            extractor=extractor,
        )

    expected = evaluator("cpu", denoiser, network, statistics=known(means=means), bias_correction=True)
    found = evaluator(
        "gpu",
        denoiser.with_module(on_gpu(denoiser.module)),
        on_gpu(network),
        statistics=known(means={n: on_gpu(m) for n, m in means.items()}),
        bias_correction=True,
    )
    assert all(isinstance(p, FakeCudaTensor) for p in found.quantized(candidate).parameters())
    assert found.identity == expected.identity
    assert found.report(candidate) == pytest.approx(expected.report(candidate), rel=1e-3)
    for error in ("latents", "features"):
        ours, theirs = replace(found, error=error), replace(expected, error=error)
        np.testing.assert_allclose(ours.distance(candidate, SEEDS), theirs.distance(candidate, SEEDS), rtol=1e-3)
        assert ours.errors(candidate, SEEDS) == ours.distance(candidate, SEEDS)[1:]
