"""Values of one set of samples against the full-precision samples of the same noise, and against data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqsearch.core import MetricValue
from mpqsearch.metrics.extractors import FeatureExtractor
from mpqsearch.metrics.frechet import FeatureStatistics, frechet_distance, kernel_distance
from mpqsearch.metrics.reference import DataReference
from mpqsearch.sampling import to_uint8

BOOTSTRAP = 48
"""Resamples behind every interval."""

PEAK = 2.0
"""Width of the value range [-1, 1], for PSNR."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Full-precision samples ``[N, ...]`` with their features ``[N, d]``, for paired comparison; seeds and labels of
    all samples."""

    samples: Tensor
    features: Tensor
    seeds: tuple[int, ...]
    labels: Tensor | None
    data: DataReference | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metric values by key, and the features behind them."""

    metrics: dict[str, MetricValue]
    features: Tensor


def distance_to_full_precision(samples: Tensor, reference: Reference, extractor: FeatureExtractor) -> float:
    """``fd_fp`` of `evaluate` alone, without its interval: what trainings and choices are steered by. Samples that are
    not finite: infinite."""
    if not bool(torch.isfinite(samples).all()):
        return math.inf
    features = extractor(to_uint8(samples))
    return frechet_distance(FeatureStatistics.of(reference.features), FeatureStatistics.of(features))


def evaluate(
    samples: Tensor, reference: Reference, extractor: FeatureExtractor, *, is_reference: bool = False
) -> Evaluation:
    """Measure samples ``[N, ...]`` whose noise and labels are those of ``reference``.

    Keys: ``paired_mse``, ``paired_psnr``, ``fd_fp``, ``kid_fp`` (not for the reference itself), ``fd_data``,
    ``kid_data`` (with data statistics), ``class_accuracy`` (when the extractor classifies). Intervals are 95 % normal
    intervals from the standard deviation of a bootstrap over samples; pairs are resampled together.
    """
    images = to_uint8(samples)
    features = extractor(images)
    n = len(samples)
    seeds = seeds_label(reference.seeds)
    draws = _bootstrap_weights(n)
    values: dict[str, MetricValue] = {}

    def put(
        key: str, name: str, against: str, value: float, resampled: Callable[[Tensor], float], *, higher: bool = False
    ) -> None:
        spread = 1.96 * float(torch.tensor([resampled(w) for w in draws], dtype=torch.float64).std())
        values[key] = MetricValue(
            name=name,
            value=value,
            n_samples=n,
            seeds=seeds,
            extractor=extractor.label,
            reference=against,
            low=value - spread,
            high=value + spread,
            spread="bootstrap",
            higher_is_better=higher,
        )

    if not is_reference:
        each = (samples.double() - reference.samples.double()).square().flatten(1).mean(1)
        put("paired_mse", "MSE vs FP, same noise", "full precision", float(each.mean()), lambda w: float(w @ each / n))
        put(
            "paired_psnr",
            "PSNR vs FP, same noise",
            "full precision",
            _psnr(float(each.mean())),
            lambda w: _psnr(float(w @ each / n)),
            higher=True,
        )
        base = FeatureStatistics.of(reference.features)
        put(
            "fd_fp",
            f"FD[{extractor.label}]-{n} vs FP",
            "full precision",
            frechet_distance(base, FeatureStatistics.of(features)),
            lambda w: frechet_distance(FeatureStatistics.of(reference.features, w), FeatureStatistics.of(features, w)),
        )
        kid = kernel_distance(reference.features, features, paired=True)
        put(
            "kid_fp",
            f"KD[{extractor.label}]-{n} vs FP",
            "full precision",
            kid,
            lambda w: _kernel_resampled(reference.features, features, w),
        )
    if reference.data is not None:
        data = reference.data
        put(
            "fd_data",
            frechet_label(extractor, n),
            data.name,
            frechet_distance(data.statistics, FeatureStatistics.of(features)),
            lambda w: frechet_distance(data.statistics, FeatureStatistics.of(features, w)),
        )
        put(
            "kid_data",
            f"KD[{extractor.label}]-{n} vs data",
            data.name,
            kernel_distance(data.features, features),
            lambda w: kernel_distance(data.features, _repeat(features, w)),
        )
    if extractor.classify is not None and reference.labels is not None:
        hit = (extractor.classify(images) == reference.labels).double()
        put(
            "class_accuracy",
            "asked class recognised",
            "labels",
            float(hit.mean()),
            lambda w: float(w @ hit / n),
            higher=True,
        )
    return Evaluation(metrics=values, features=features)


def frechet_label(extractor: FeatureExtractor, n: int) -> str:
    """Name of a Fréchet distance to data. ``FID-50k`` only for the Inception weights of 2015 and at least 10,000
    samples."""
    if extractor.official_fid and n >= 10_000:
        return f"FID-{n // 1000}k"
    return f"FD[{extractor.label}]-{n} vs data"


def seeds_label(seeds: Sequence[int]) -> str:
    """``first..last`` of consecutive seeds, else their number and a digest."""
    values = list(seeds)
    if values == list(range(values[0], values[0] + len(values))):
        return f"{values[0]}..{values[-1]}"
    return f"{len(values)} seeds {hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"


def _psnr(mse: float) -> float:
    # Identical samples would give infinity, which no artifact may hold; 200 dB is beyond what float32 resolves.
    return 200.0 if mse <= 0 else min(200.0, 10 * math.log10(PEAK**2 / mse))


def _bootstrap_weights(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws: list[Tensor] = []
    while len(draws) < BOOTSTRAP:
        weights = torch.bincount(torch.randint(0, n, (n,), generator=generator), minlength=n).double()
        if (
            int((weights > 0).sum()) > 1
        ):  # one sample alone, drawn again and again, has no spread: of a handful that does happen
            draws.append(weights)
    return draws


def _repeat(features: Tensor, weights: Tensor) -> Tensor:
    return features.repeat_interleave(weights.long(), dim=0)


def _kernel_resampled(x: Tensor, y: Tensor, weights: Tensor) -> float:
    # Duplicates would enter the U-statistic as pairs of themselves, so rows are drawn once and weighted in or out.
    keep = weights > 0
    return kernel_distance(x[keep], y[keep], paired=True)
