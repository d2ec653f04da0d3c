"""Batches and full-precision references of given samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mpqsearch.metrics import DataReference, FeatureExtractor, Reference, SampleStore, Scorer
from mpqsearch.models.runner import Drawn, Label
from mpqsearch.sampling import to_uint8


def batches_of(
    samples: Tensor, *, labels: Sequence[Label] | None = None, batch: int = 3, images: Tensor | None = None
) -> Iterator[Drawn]:
    """Samples ``[N, ...]`` of the seeds from 0 on, a few at a time; pictures are those of pixel models."""
    labels = labels or [None] * len(samples)
    images = to_uint8(samples) if images is None else images
    for i in range(0, len(samples), batch):
        part = slice(i, i + batch)
        seeds = tuple(range(len(samples)))[part]
        yield Drawn(seeds=seeds, latents=samples[part], images=images[part], labels=tuple(labels[part]))


def reference_of(
    samples: Tensor,
    extractor: FeatureExtractor,
    folder: Path,
    *,
    labels: Sequence[Label] | None = None,
    data: DataReference | None = None,
    scorers: Sequence[Scorer] = (),
) -> Reference:
    """Samples ``[N, ...]`` of the seeds from 0 on as full precision."""
    store = SampleStore(folder, range(len(samples)), {})
    if store.missing:
        store.fill(batches_of(samples, labels=labels, batch=4))
    return Reference.of(store, extractor, data, scorers)
