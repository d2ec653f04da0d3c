"""What the student learns from: trajectories of the full-precision model, run as they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqsearch.artifacts import digest_of
from mpqsearch.distill.trd import FeatureTap
from mpqsearch.errors import ConfigError
from mpqsearch.models import Condition, Denoiser
from mpqsearch.sampling import (
    SamplerSpec,
    condition_to,
    labels_of,
    noise_of,
    prediction_sensitivities,
    timesteps_of,
    trajectory,
)

FIRST_SEED = 2_000_000
"""Seeds of training noise start here: neither those of evaluation (from 0) nor those of calibration (from
1,000,000)."""

SENSITIVITY_SAMPLES = 8
"""Samples, or a batch if that is more, from which the sensitivities of timesteps are estimated."""

SEEDS_APART = 1_000_000
"""Training runs of different ``seed`` draw noise from ranges of this length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStep:
    """One timestep of one batch: the noisy batch ``x`` ``[N, ...]``, the teacher's guided prediction of it, and its
    positions ``[N', P, C]``."""

    timestep: int
    x: Tensor
    cond: Condition
    prediction: Tensor
    features: Tensor | None


class Trajectories:
    """Trajectories run online: no data set, noise and classes from seeds, one batch in memory at a time.

    ``feature``: the module whose pooled output is kept, or empty for none. Class of a sample: its seed modulo the
    number of classes, so that classes are balanced over consecutive batches.
    ``rank`` of ``world`` processes get batches of their own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: SamplerSpec,
        *,
        batch: int = 8,
        seed: int = 0,
        feature: str = "",
        pooled_size: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"distill: batch must be at least 1, got {batch}")
        if not 0 <= seed < 1000:
            raise ConfigError(f"distill: seed must lie in 0..999, got {seed}")
        self.denoiser, self.sampler, self.batch, self.seed = denoiser, sampler, batch, seed
        self.feature, self.pooled_size = feature, pooled_size
        self.rank, self.world = rank, world
        self.guidance = sampler.guidance

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the sampler, noise first."""
        return timesteps_of(self.denoiser, self.sampler)

    @property
    def identity(self) -> dict[str, str]:
        """Digest of the teacher's weights, and every setting of its trajectories."""
        settings = {k: v for k, v in self.sampler.to_data().items() if k != "batch"}
        return {
            "teacher": self.denoiser.digest,
            "teacher.scheduler": digest_of(dict(self.denoiser.scheduler)),
            **{f"teacher.{k}": str(v) for k, v in settings.items()},
            "teacher.batch": str(self.batch),
            "teacher.seed": str(self.seed),
            "teacher.feature": f"{self.feature}@{self.pooled_size}" if self.feature else "none",
            "teacher.processes": str(self.world),
        }

    def seeds(self, index: int) -> range:
        """Seeds of trajectory ``index``."""
        start = FIRST_SEED + self.seed * SEEDS_APART + (index * self.world + self.rank) * self.batch
        return range(start, start + self.batch)

    def sensitivities(self) -> tuple[float, ...]:
        """`prediction_sensitivities` of the noise before that of all trajectories and seeds, which no trajectory uses:
        the same on all processes."""
        seeds = range(FIRST_SEED - max(self.batch, SENSITIVITY_SAMPLES), FIRST_SEED)
        return prediction_sensitivities(self.denoiser, seeds, self.sampler)

    def steps(self, index: int) -> Iterator[TeacherStep]:
        """Run trajectory ``index``; nothing is computed before it is asked for."""
        seeds = self.seeds(index)
        device = next(self.denoiser.module.parameters()).device
        cond = condition_to(labels_of(self.denoiser, seeds), device)
        x = noise_of(seeds, self.denoiser.sample_shape).to(device)
        run = trajectory(self.denoiser, x, cond, self.sampler)
        tap = FeatureTap(self.denoiser.module, self.feature, self.pooled_size) if self.feature else None
        while True:
            # The generator stands still between steps, so the hook is set and the gradient off only while it moves.
            with torch.no_grad(), tap or contextlib.nullcontext():
                step = next(run, None)
                features = tap.take() if tap is not None and step is not None else None
            if step is None:
                return
            yield TeacherStep(
                timestep=step.timestep, x=step.x, cond=cond, prediction=step.prediction, features=features
            )
