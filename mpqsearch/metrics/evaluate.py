"""Values of samples against the full-precision samples of the same noise, and against data; batch by batch, each
dropped once it was measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpqsearch.core import MetricValue
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.metrics.extractors import FeatureExtractor
from mpqsearch.metrics.frechet import FeatureStatistics, frechet_distance, kernel_distance, paired_kernel_distance
from mpqsearch.metrics.reference import DataReference
from mpqsearch.metrics.scorers import FULL_PRECISION, PSNR, Scorer
from mpqsearch.metrics.store import SampleStore
from mpqsearch.models.runner import Drawn
from mpqsearch.pareto import DROP

if TYPE_CHECKING:
    from pandas import DataFrame

BOOTSTRAP = 48
"""Resamples behind every interval."""

ANY = (-math.inf, math.inf)
"""Bounds of kernel distances: their estimates are unbiased and may be negative."""

POSITIVE = (0.0, math.inf)
"""Bounds of other distances and of errors."""


Measure = tuple[bool, tuple[float, float]]
"""Of a metric: whether it is better when it is higher, and its bounds."""


def measures(
    extractor: FeatureExtractor | None, scorers: Sequence[Scorer] = (), *, data: bool = False
) -> dict[str, Measure]:
    """What `evaluate` measures with these, by key; without an extractor, of samples that are no pictures."""
    found: dict[str, Measure] = {"paired_mse": (False, POSITIVE)}
    if extractor is None:
        return found
    for s in (PSNR, *extractor.scorers, *scorers):
        found[s.key] = (s.higher_is_better, s.bounds)
        if s.against != FULL_PRECISION:
            found[s.key + DROP] = (False, ANY)
    for against in ("fp", "data") if data else ("fp",):
        found |= {f"fd_{against}": (False, POSITIVE), f"{extractor.kernel.key}_{against}": (False, ANY)}
    return found


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """Metric values by key; the features ``[rows, d]`` behind them, one row a picture or frame (None without pictures);
    and the first pictures, as many as were to be kept."""

    metrics: dict[str, MetricValue]
    features: Tensor | None
    images: Tensor | None = None

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


class Tally:
    """What stays of samples once they were measured: errors and scores ``[N]``, and features.

    Of a video every frame is a sample of features and is scored by itself; its score is the mean over frames, and
    intervals come from resampling whole videos.
    """

    def __init__(self, extractor: FeatureExtractor, scorers: Sequence[Scorer] = (), *, keep: int = 0) -> None:
        self.extractor = extractor
        self.seeds: list[int] = []
        self._scorers = tuple(scorers)
        self._all_scorers = (PSNR, *extractor.scorers, *scorers)
        self._keep = keep
        self._errors = _Rows()
        self._features = _Rows()
        self._images: list[Tensor] = []
        self._scores: dict[str, _Rows] = {}

    def empty(self, keep: int = 0) -> Tally:
        """Another one that measures the same and keeps the first pictures."""
        return Tally(self.extractor, self._scorers, keep=keep)

    def add(self, batch: Drawn, full: Drawn | None = None) -> None:
        """Measure a batch, beside the full-precision one of the same seeds where there is one.

        Raises `ConfigError` for other seeds, `NumericsError` when features are not finite.
        """
        if full is not None:
            if full.seeds != batch.seeds:
                raise ConfigError(
                    f"samples of the seeds {seeds_label(batch.seeds)} cannot be compared with those of "
                    f"{seeds_label(full.seeds)}: their noise differs"
                )
            self._errors.add((batch.latents.cpu().double() - full.latents.double()).square().flatten(1).mean(1))
        if batch.images is not None:
            self._look(batch, batch.images.cpu(), None if full is None else full.images)
        self.seeds.extend(batch.seeds)

    def _look(self, batch: Drawn, images: Tensor, full: Tensor | None) -> None:
        features = self.extractor(images)
        _require_finite(features, batch, "the features of")
        self._features.add(features)
        if len(self.seeds) < self._keep:
            self._images.append(images[: self._keep - len(self.seeds)].clone())
        n_frames = len(features) // len(images)
        labels = [label for label in batch.labels for _ in range(n_frames)]
        shown, expected = _frames(images), None if full is None else _frames(full)
        for scorer in self._all_scorers:
            paired = scorer.against == FULL_PRECISION
            if paired and expected is None:
                continue
            scores = scorer.score(shown, labels, expected if paired else None).cpu().double()
            if scores.shape != (len(shown),):
                raise ConfigError(f"{scorer.name} gave {tuple(scores.shape)} numbers for {len(shown)} pictures")
            _require_finite(scores.masked_fill(scores.isnan(), 0.0)[:, None], batch, f"{scorer.name} of")
            self._scores.setdefault(scorer.key, _Rows()).add(scores.view(-1, n_frames).nanmean(1))

    @property
    def features(self) -> Tensor | None:
        """``[rows, d]``; None when there were no pictures."""
        return self._features.all()

    def evaluation(self, full: Tally | None = None, data: DataReference | None = None) -> Evaluation:
        """The metrics, given what stayed of full precision and the statistics of data: see `evaluate`."""
        sheet, features = _Sheet(self), self.features
        if (errors := self._errors.all()) is not None:
            sheet.put_mean("paired_mse", "MSE vs FP, same noise", FULL_PRECISION, errors, bounds=POSITIVE)
        for s in self._all_scorers:
            if s.key in self._scores and (scores := self._scores[s.key].all()) is not None:
                by, higher = s.weights or self.extractor.label, s.higher_is_better
                sheet.put_mean(s.key, s.name, s.against, scores, bounds=s.bounds, higher=higher, by=by)
                if full is not None and s.key in full._scores and (others := full._scores[s.key].all()) is not None:
                    lost = (others - scores) if higher else (scores - others)
                    name = f"{s.name}, lost against FP, same noise"
                    sheet.put_mean(s.key + DROP, name, FULL_PRECISION, lost, bounds=ANY, by=by)
        if features is not None:
            sheet.put_distances(features, None if full is None else full.features, data)
        images = torch.cat(self._images) if self._images else None
        return Evaluation(metrics=sheet.values, features=features, images=images)


@dataclass(frozen=True, kw_only=True, repr=False)
class Reference:
    """Full-precision samples: on disk, with their features in memory, for paired comparison."""

    store: SampleStore
    tally: Tally
    data: DataReference | None = None

    @classmethod
    def of(
        cls,
        store: SampleStore,
        extractor: FeatureExtractor,
        data: DataReference | None = None,
        scorers: Sequence[Scorer] = (),
    ) -> Reference:
        """Read a complete store once, for features and scores."""
        tally = Tally(extractor, scorers)
        for batch in store.batches():
            tally.add(batch)
        return cls(store=store, tally=tally, data=data)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of all samples, in their order."""
        return self.store.seeds

    @property
    def features(self) -> Tensor | None:
        """``[rows, d]``; None without pictures."""
        return self.tally.features

    def evaluation(self) -> Evaluation:
        """Full precision itself: ``fd_data``, ``kid_data`` and the scores that need no reference."""
        return self.tally.evaluation(data=self.data)

    def __repr__(self) -> str:
        against = "" if self.data is None else f", data {self.data.name}"
        shape = tuple(self.store.read(0, 1).latents.shape[1:])
        return f"Reference({len(self.seeds)} full-precision samples {shape}, seeds {seeds_label(self.seeds)}{against})"


def evaluate(batches: Iterable[Drawn], reference: Reference, *, keep: int = 0) -> Evaluation:
    """Measure samples whose seeds are those of ``reference``, in the same order; the first ``keep`` pictures are kept.

    Keys: ``paired_mse`` (of latents), ``paired_psnr``, ``fd_fp``, ``kid_fp``, ``fd_data`` and ``kid_data`` (with data
    statistics; ``cmmd_`` of CLIP embeddings), those of the scorers, such as ``class_accuracy``, and with ``_drop``
    what each of these lost; without pictures ``paired_mse`` alone. Intervals
    are 95 % normal intervals from the standard deviation of a bootstrap over samples, cut where the metric has no
    values; pairs are resampled together.
    """
    tally = reference.tally.empty(keep)
    for batch in batches:
        done = len(tally.seeds)
        tally.add(batch, reference.store.read(done, done + len(batch.seeds)))
    if tuple(tally.seeds) != reference.seeds:
        raise ConfigError(f"{len(tally.seeds)} samples were given, the full-precision ones are {len(reference.seeds)}")
    return tally.evaluation(reference.tally, reference.data)


def features_of(batches: Iterable[Drawn], extractor: FeatureExtractor) -> Tensor:
    """Features ``[rows, d]`` of all pictures and frames; `ConfigError` when there are none."""
    rows = _Rows()
    for images in (batch.images for batch in batches):
        if images is not None:
            rows.add(extractor(images))
    features = rows.all()
    if features is None:
        raise ConfigError("these samples are no pictures, so they have no features: compare their paired error")
    return features


def distance_to_full_precision(batches: Iterable[Drawn], full: FeatureStatistics, extractor: FeatureExtractor) -> float:
    """``fd_fp`` of `evaluate` alone, without its interval: what trainings and choices are steered by. Samples that are
    not finite: infinite."""
    try:
        return frechet_distance(full, FeatureStatistics.of(features_of(batches, extractor)))
    except NumericsError:
        return math.inf


class _Rows:
    """Rows that come a few at a time, in one tensor that doubles: small tensors that stay between large ones that go
    would keep the memory of all from being used again."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._n = 0

    def add(self, rows: Tensor) -> None:
        n = self._n + len(rows)
        if self._rows is None or n > len(self._rows):
            grown = rows.new_empty((max(n, 2 * self._n), *rows.shape[1:]))
            if self._rows is not None:
                grown[: self._n] = self._rows[: self._n]
            self._rows = grown
        self._rows[self._n : n] = rows
        self._n = n

    def all(self) -> Tensor | None:
        return None if self._rows is None else self._rows[: self._n].clone()


class _Sheet:
    """Metric values of one set of samples, each with its bootstrap interval."""

    def __init__(self, tally: Tally) -> None:
        self.values: dict[str, MetricValue] = {}
        self._n, self._extractor = len(tally.seeds), tally.extractor
        self._seeds = seeds_label(tally.seeds)

    def put_mean(
        self,
        key: str,
        name: str,
        against: str,
        each: Tensor,
        *,
        bounds: tuple[float, float],
        higher: bool = False,
        by: str = "",
    ) -> None:
        """Add the mean of one number a sample; samples whose number is NaN are left out, and so is a metric of fewer
        than two."""
        each = each[~each.isnan()]
        if len(each) > 1:
            weights = _bootstrap_weights(len(each))
            values = weights @ each / len(each)
            self._put(key, name, against, values, bounds=bounds, higher=higher, n=len(each), by=by)

    def put_distances(self, features: Tensor, full: Tensor | None, data: DataReference | None) -> None:
        """Add the distances of features ``[rows, d]`` to those of full precision and to data."""
        n, features = len(features), features.double()
        weights = _bootstrap_weights(self._n).repeat_interleave(n // self._n, 1)
        full = None if full is None else full.double()
        to_full, to_data = [], []
        for w in weights:
            ours = FeatureStatistics.of(features, w)
            if full is not None:
                to_full.append(frechet_distance(FeatureStatistics.of(full, w), ours))
            if data is not None:
                to_data.append(frechet_distance(data.statistics, ours))
        label, kernel = self._extractor.label, self._extractor.kernel
        if full is not None:
            kernel_values = paired_kernel_distance(full, features, weights, kernel)
            self._put("fd_fp", f"FD[{label}]-{n} vs FP", FULL_PRECISION, _floats(to_full), bounds=POSITIVE)
            self._put(f"{kernel.key}_fp", f"{kernel.label}[{label}]-{n} vs FP", FULL_PRECISION, kernel_values)
        if data is not None:
            kernel_values = kernel_distance(data.features, features, weights, kernel)
            self._put("fd_data", frechet_label(self._extractor, n), data.name, _floats(to_data), bounds=POSITIVE)
            self._put(f"{kernel.key}_data", f"{kernel.label}[{label}]-{n} vs data", data.name, kernel_values)

    def _put(
        self,
        key: str,
        name: str,
        against: str,
        values: Tensor,
        *,
        bounds: tuple[float, float] = ANY,
        higher: bool = False,
        n: int = 0,
        by: str = "",
    ) -> None:
        """Add a metric from its value and those of all resamples, ``[1 + BOOTSTRAP]``."""
        value, spread = float(values[0]), 1.96 * float(values[1:].std())
        self.values[key] = MetricValue(
            name=name,
            value=value,
            n_samples=n or self._n,
            seeds=self._seeds,
            extractor=by or self._extractor.label,
            reference=against,
            low=min(value, max(value - spread, bounds[0])),
            high=min(value + spread, bounds[1]),
            spread="bootstrap",
            higher_is_better=higher,
        )


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


def _frames(images: Tensor) -> Tensor:
    return images.flatten(0, 1) if images.dim() == 5 else images


def _floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _require_finite(features: Tensor, batch: Drawn, what: str) -> None:
    bad = ~torch.isfinite(features).flatten(1).all(1).view(len(batch.seeds), -1).all(1)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        asked = "" if batch.labels[i] is None else f" ({batch.labels[i]!r})"
        raise NumericsError(f"{what} the sample of seed {batch.seeds[i]}{asked} are not finite: look at it")


def _bootstrap_weights(n: int) -> Tensor:
    """Multiplicities ``[1 + BOOTSTRAP, n]`` of samples: once each, then as drawn."""
    if n < 2:
        raise ConfigError(f"an interval needs at least two samples, got {n}")
    generator = torch.Generator().manual_seed(0)
    draws = [torch.ones(n, dtype=torch.float64)]
    while len(draws) <= BOOTSTRAP:
        weights = torch.bincount(torch.randint(0, n, (n,), generator=generator), minlength=n).double()
        if int((weights > 0).sum()) > 1:  # one sample drawn again and again has no spread: it happens with a handful
            draws.append(weights)
    return torch.stack(draws)
