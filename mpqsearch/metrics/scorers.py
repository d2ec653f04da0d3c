"""Scores of single samples: one number a picture, of which a metric is the mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
    None. ``bounds``: the least and the largest value that there can be. ``weights``: which ones it computes with, as
    its values carry it; empty for none.
    """

    key: str
    name: str
    against: str
    score: Callable[[Tensor, Sequence[Label], Tensor | None], Tensor]
    higher_is_better: bool = True
    bounds: tuple[float, float] = (-math.inf, math.inf)
    weights: str = ""


def _psnr(images: Tensor, _labels: Sequence[Label], reference: Tensor | None) -> Tensor:
    assert reference is not None  # its ``against`` says so
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return (10 * (255**2 / error).log10()).clamp_max(IDENTICAL_DB)


PSNR = Scorer(
    key="paired_psnr",
    name="PSNR of 8-bit pictures (peak 255) vs FP, same noise",
    against=FULL_PRECISION,
    score=_psnr,
    bounds=(0.0, IDENTICAL_DB),
)
"""Peak signal-to-noise ratio of each picture, in dB; the mean over pictures is what the field reports."""


def _ssim(images: Tensor, _labels: Sequence[Label], reference: Tensor | None) -> Tensor:
    assert reference is not None
    x, y = (F.pad(t.double(), (5, 5, 5, 5), mode="reflect") for t in (images, reference))
    ramp = torch.arange(-5, 6, dtype=torch.float64)
    bell = torch.exp(-((ramp / 1.5) ** 2) / 2)
    window = torch.outer(bell, bell) / bell.sum() ** 2
    n, channels = x.shape[:2]
    averaged = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window.expand(channels, 1, 11, 11), groups=channels)
    mx, my, xx, yy, xy = averaged.view(5, n, *averaged.shape[1:])
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    shape = (2 * (xy - mx * my) + c2) / ((xx - mx**2).clamp_min(0) + (yy - my**2).clamp_min(0) + c2)
    each: Tensor = (light * shape).flatten(1).mean(1)
    return each


SSIM = Scorer(
    key="ssim",
    name="SSIM of 8-bit pictures vs FP, same noise",
    against=FULL_PRECISION,
    score=_ssim,
    bounds=(-1.0, 1.0),
)
"""Structural similarity (Wang et al. 2004) with a Gaussian window of 11 pixels (sigma 1.5) over padded pictures,
channel by channel, as torchmetrics has it. Pictures need at least 6 pixels a side."""
