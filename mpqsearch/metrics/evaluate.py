"""Values of one set of samples against the full-precision samples of the same noise, and against data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpqsearch.core import MetricValue
from mpqsearch.metrics.extractors import FeatureExtractor
from mpqsearch.metrics.frechet import (
    FeatureStatistics,
    KernelDistance,
    PairedKernelDistance,
    frechet_distance,
    frechet_from,
)
from mpqsearch.metrics.reference import DataReference
from mpqsearch.sampling import to_uint8

if TYPE_CHECKING:
    from pandas import DataFrame

BOOTSTRAP = 48
"""Resamples behind every interval."""

POSITIVE = (0.0, math.inf)
"""Bounds of distances and errors. Kernel distances have none: their estimates are unbiased and may be negative."""

PEAK = 2.0
"""Width of the value range [-1, 1], for PSNR."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Reference:
    """Full-precision samples ``[N, ...]`` with their features ``[N, d]``, for paired comparison; seeds and labels of
    all samples."""

    samples: Tensor
    features: Tensor
    seeds: tuple[int, ...]
    labels: Tensor | None
    data: DataReference | None = None

    def __repr__(self) -> str:
        against = "" if self.data is None else f", beside {self.data.name}"
        shape = tuple(self.samples.shape[1:])
        return f"Reference({len(self.seeds)} full-precision samples {shape}, seeds {seeds_label(self.seeds)}{against})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """Metric values by key, and the features behind them."""

    metrics: dict[str, MetricValue]
    features: Tensor

    def to_frame(self) -> DataFrame:
        """One row a metric: name, value, bounds of its interval, samples, reference."""
        import pandas as pd

        columns = ("name", "value", "low", "high", "n_samples", "reference")
        rows = {key: [getattr(value, c) for c in columns] for key, value in self.metrics.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns))

    def __repr__(self) -> str:
        return "\n".join(["Evaluation", *(f"  {value!r}" for value in self.metrics.values())])

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html())


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
    intervals from the standard deviation of a bootstrap over samples, cut where the metric has no values; pairs are
    resampled together.
    """
    samples = samples.cpu()  # one device for all statistics, whatever the samples and the extractor are on
    images = to_uint8(samples)
    features = extractor(images)
    sheet = _Sheet(n=len(samples), seeds=seeds_label(reference.seeds), extractor=extractor.label)
    if not is_reference:
        _put_pixels(sheet, samples, reference.samples.cpu())
        _put_full_precision(sheet, features, reference.features)
    if reference.data is not None:
        _put_data(sheet, features, reference.data, frechet_label(extractor, len(samples)))
    classes = extractor.classes(images)
    if classes is not None and reference.labels is not None:
        hit = (classes == reference.labels.cpu()).double()

        def share(weights: Tensor) -> float:
            return float(weights @ hit / weights.sum())

        sheet.put("class_accuracy", "asked class recognised", "labels", share, higher=True, bounds=(0.0, 1.0))
    return Evaluation(metrics=sheet.values, features=features)


class _Sheet:
    """Metric values of one set of samples, each with its bootstrap interval."""

    def __init__(self, *, n: int, seeds: str, extractor: str) -> None:
        self.values: dict[str, MetricValue] = {}
        self.n, self.seeds, self.extractor = n, seeds, extractor
        self._once = torch.ones(n, dtype=torch.float64)
        self._draws = _bootstrap_weights(n)

    def put(
        self,
        key: str,
        name: str,
        against: str,
        value_of: Callable[[Tensor], float],
        *,
        higher: bool = False,
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        """Add a metric; ``value_of`` computes it from multiplicities ``[N]`` of the samples, ``bounds`` are the least
        and the largest value that it can have."""
        value = value_of(self._once)
        spread = 1.96 * float(torch.tensor([value_of(w) for w in self._draws], dtype=torch.float64).std())
        self.values[key] = MetricValue(
            name=name,
            value=value,
            n_samples=self.n,
            seeds=self.seeds,
            extractor=self.extractor,
            reference=against,
            low=min(value, max(value - spread, bounds[0])),
            high=min(value + spread, bounds[1]),
            spread="bootstrap",
            higher_is_better=higher,
        )


def _put_pixels(sheet: _Sheet, samples: Tensor, reference: Tensor) -> None:
    error = (samples.double() - reference.double()).square().flatten(1).mean(1)

    def mse(weights: Tensor) -> float:
        return float(weights @ error / weights.sum())

    sheet.put("paired_mse", "MSE vs FP, same noise", "full precision", mse, bounds=POSITIVE)
    sheet.put(
        "paired_psnr", "PSNR vs FP, same noise", "full precision", lambda weights: _psnr(mse(weights)), higher=True
    )


def _put_full_precision(sheet: _Sheet, features: Tensor, reference: Tensor) -> None:
    def distance(weights: Tensor) -> float:
        return frechet_distance(FeatureStatistics.of(reference, weights), FeatureStatistics.of(features, weights))

    kernel = PairedKernelDistance(reference, features)
    sheet.put("fd_fp", f"FD[{sheet.extractor}]-{sheet.n} vs FP", "full precision", distance, bounds=POSITIVE)
    sheet.put("kid_fp", f"KD[{sheet.extractor}]-{sheet.n} vs FP", "full precision", kernel)


def _put_data(sheet: _Sheet, features: Tensor, data: DataReference, name: str) -> None:
    distance, kernel = frechet_from(data.statistics), KernelDistance(data.features, features)

    def value_of(weights: Tensor) -> float:
        return distance(FeatureStatistics.of(features, weights))

    sheet.put("fd_data", name, data.name, value_of, bounds=POSITIVE)
    sheet.put("kid_data", f"KD[{sheet.extractor}]-{sheet.n} vs data", data.name, kernel)


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
        if int((weights > 0).sum()) > 1:  # one sample drawn again and again has no spread: it happens with a handful
            draws.append(weights)
    return draws
