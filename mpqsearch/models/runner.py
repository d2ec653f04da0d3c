"""The seam between a denoiser and the way its users run it: what every room may ask of a runner."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Label = int | str | None
"""What a sample was asked to show: a class, a prompt, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One batch of finished samples.

    latents
        ``[N, ...]``, float32 on the CPU: what the last step of the scheduler gave. Of pixel models the samples
        themselves, in [-1, 1].
    images
        uint8 ``[N, C, H, W]`` with 1 or 3 channels, or video ``[N, F, C, H, W]``. None when they were not decoded, and
        for pipelines that make sound.
    """

    seeds: tuple[int, ...]
    latents: Tensor
    images: Tensor | None
    labels: tuple[Label, ...]
