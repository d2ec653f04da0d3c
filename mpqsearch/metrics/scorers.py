"""Scores of single samples: one number a picture, of which a metric is the mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mpqsearch.models.runner import Label

FULL_PRECISION = "full precision"

IDENTICAL_DB = 100.0
"""PSNR of a picture that equals its reference, and the largest of any."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One number a picture.

    ``score`` maps images ``uint8 [N, C, H, W]``, what each was asked to show, and the full-precision images of the same
    noise to ``[N]``; NaN for a picture of which nothing was asked that it can tell. ``against``: what the number
    compares with; scorers against `FULL_PRECISION` get its images and are left out for that model itself, others get
    None. ``bounds``: the least and the largest value that there can be.
    """

    key: str
    name: str
    against: str
    score: Callable[[Tensor, Sequence[Label], Tensor | None], Tensor]
    higher_is_better: bool = True
    bounds: tuple[float, float] = (-math.inf, math.inf)


def _psnr(images: Tensor, _labels: Sequence[Label], reference: Tensor | None) -> Tensor:
    assert reference is not None  # its ``against`` says so
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return (10 * (255**2 / error).log10()).clamp_max(IDENTICAL_DB)


PSNR = Scorer(
    key="paired_psnr", name="PSNR of 8-bit pictures (peak 255) vs FP, same noise", against=FULL_PRECISION, score=_psnr
)
"""Peak signal-to-noise ratio of each picture, in dB; the mean over pictures is what the field reports."""
