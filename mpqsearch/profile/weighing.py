"""What errors in raw predictions do to the final sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mpqsearch.errors import NumericsError
from mpqsearch.models import Denoiser
from mpqsearch.models.calls import Call
from mpqsearch.sampling import SchedulerStep, batch_of, can_sample, prediction_gains, scheduler_steps
from mpqsearch.sources import kind_of

SEEDS = 2
"""Runs whose gains are averaged: they differ little between seeds, much between steps."""

MIXED = 4
"""Samples whose mixes are found together: in one, all values may be clipped, so that no prediction counts."""

TakeStep = Callable[[list[Call], list[Tensor]], None]
"""Gets the calls that were made for one step of the scheduler, and their raw predictions."""


@dataclass(frozen=True, slots=True)
class Weighing:
    """Mixes and scales the raw predictions of a step so that the squared norm of their error is the mean squared error
    that it causes in the final sample, times the steps of a run: what the errors of all steps cause together if they
    are independent. Calls of text encoders and autoencoder are steps by themselves.

    ``steps`` are those of `scheduler_steps`: the halves of classifier-free guidance become the guided prediction, be
    they in one call or in two. ``gains`` are the effects, by step, of a unit of mean square. Without a sampler
    (recorded calls) there are neither: each call is by itself, and the squared norm is the mean squared error of its
    prediction.
    """

    steps: Sequence[SchedulerStep] = ()
    gains: Sequence[float] = ()

    def __call__(self, calls: Sequence[Call], predictions: Sequence[Tensor]) -> Tensor:
        """The predictions of one step, mixed and scaled, as one float32 tensor; of several samples the mean."""
        if not self.steps:
            (alone,) = predictions
            return alone.float() * (1 / math.sqrt(alone.numel()))
        index = self._ends.index(calls[-1].index)
        mix, gain = self.steps[index].mix, self.gains[index] * len(self.steps)
        if mix is None:
            parts = [p.float().flatten() * (gain / (p.numel() * len(predictions))) ** 0.5 for p in predictions]
            return torch.cat(parts)
        samples = sum(map(len, predictions)) // mix.shape[1]
        rows = torch.cat([p.float().reshape(len(p) // samples, -1) for p in predictions])
        mixed: Tensor = (mix.to(rows.device) @ rows) * (gain / rows.shape[1]) ** 0.5
        return mixed

    @property
    def shares(self) -> Mapping[str, float]:
        """Shares of the steps that are calls of each kind of part, see `mpqsearch.sources.kind_of`."""
        kinds = Counter(kind_of(step.part) for step in self.steps)
        return {kind: n / len(self.steps) for kind, n in kinds.items()}

    @property
    def _ends(self) -> list[int]:
        """The index of the last call of every step."""
        return [n - 1 for n in accumulate(s.n_calls for s in self.steps)]

    def by_step(self, take: TakeStep) -> Callable[[Call, Tensor], None]:
        """What hands calls on when those of a step are complete."""
        ends, calls, predictions = set(self._ends), [], []

        def took(call: Call, prediction: Tensor) -> None:
            calls.append(call)
            predictions.append(prediction)
            if not ends or call.index in ends:
                take(list(calls), list(predictions))
                calls.clear()
                predictions.clear()

        return took

    def checked(self, denoiser: Denoiser, calls: Sequence[Call], predictions: Sequence[Tensor]) -> Tensor:
        """The same. Raises `NumericsError` when a prediction is not finite."""
        output = self(calls, predictions)
        if not bool(torch.isfinite(output).all()):
            raise NumericsError(f"{denoiser.name}: the output is not finite at timestep {calls[0].timestep:g}")
        return output


def weighing_of(denoiser: Denoiser, seeds: Sequence[int]) -> Weighing:
    """What the errors of a denoiser do in its own sampler, the gains a mean over the first of ``seeds``.

    Raises `NumericsError` when a gradient of the final sample is not finite.
    """
    if not can_sample(denoiser):
        return Weighing()
    mixed = seeds[: batch_of(denoiser, MIXED)]
    denoiser.runner.encode(denoiser.module, mixed, batch=len(mixed))
    denoiser.runner.encode(denoiser.module, seeds, batch=1)
    steps = scheduler_steps(denoiser, mixed)
    gains = [0.0] * len(steps)
    for seed in seeds[:SEEDS]:
        by_call = iter(prediction_gains(denoiser, [seed], probe_seed=seed))
        for i, step in enumerate(steps):
            total = sum(float(next(by_call).sum()) for _ in range(step.n_calls)) / len(seeds[:SEEDS])
            gains[i] += total / (step.n_calls if step.mix is None else float(step.mix.square().sum()))
    return Weighing(steps, gains)
