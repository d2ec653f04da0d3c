"""Finished samples batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from mpqsearch.models import Denoiser
from mpqsearch.models.runner import Drawn
from mpqsearch.sampling.sampler import labels_of, sample, to_uint8
from mpqsearch.specs import SamplerSpec


def samples(
    denoiser: Denoiser, seeds: Sequence[int], spec: SamplerSpec, *, progress: Callable[[int], Any] | None = None
) -> Iterator[Drawn]:
    """`sample`, one batch at a time. What has neither one nor three channels is no picture."""
    for start in range(0, len(seeds), spec.batch):
        part = tuple(seeds[start : start + spec.batch])
        made, labels = sample(denoiser, part, spec, progress=progress), labels_of(denoiser, part)
        yield Drawn(
            seeds=part,
            latents=made,
            images=to_uint8(made) if made.dim() == 4 and made.shape[1] in (1, 3) else None,
            labels=tuple(labels.tolist()) if isinstance(labels, Tensor) else (None,) * len(part),
        )
