"""The loss of a window of consecutive timesteps, and the guard that stops a training whose loss explodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpqsearch.distill.teacher import TeacherStep, Trajectories
from mpqsearch.distill.training import Training
from mpqsearch.distill.trd import FeatureTap, find_feature_module, window_relation_loss
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.models import Denoiser
from mpqsearch.specs import DistillSpec


class Windows:
    """The endless row of trajectories of a teacher, in windows of consecutive timesteps.

    ``per_trajectory`` windows make a trajectory; the last may be shorter.
    """

    def __init__(self, source: Trajectories, size: int) -> None:
        self.source, self.size = source, size
        self.per_trajectory = -(-len(source.timesteps) // size)
        self._windows: Iterator[list[TeacherStep]] = iter(())
        self._next = -1

    def take(self, index: int) -> list[TeacherStep]:
        """Window ``index``, computed from the start of its trajectory where the one before was not taken."""
        trajectory, position = divmod(index, self.per_trajectory)
        if index != self._next or position == 0:
            self._windows = _windows(self.source.steps(trajectory), self.size)
            for _ in range(position):
                next(self._windows)
        self._next = index + 1
        return next(self._windows)


class Objective:
    """The loss of a student on windows of a teacher. Use as a context manager: the features of a module are read.

    Raises `ConfigError` when the relation loss is asked for and a setting does not allow it.
    """

    def __init__(self, denoiser: Denoiser, source: Trajectories, spec: DistillSpec, training: Training) -> None:
        self.denoiser, self.source, self.spec, self.training = denoiser, source, spec, training
        self.windows = Windows(source, spec.relation.window)
        self.tap: FeatureTap | None = None
        if spec.relation.weight > 0:
            name = spec.relation.feature or find_feature_module(denoiser.module)
            self.tap = FeatureTap(denoiser.module, name, spec.relation.pooled_size)
        self.weights = (
            timestep_weights(source) if spec.timestep_weights == "sampler" else (1.0,) * len(source.timesteps)
        )

    def __enter__(self) -> Objective:
        if self.tap is not None:
            self.tap.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        if self.tap is not None:
            self.tap.__exit__(*details)

    def backward(self, index: int) -> Tensor:
        """Add the gradients of window ``index`` to the parameters'. Task and relation loss, and the mean square of the
        teacher's predictions, which losses are held to."""
        window, position = self.windows.take(index), index % self.windows.per_trajectory
        first = position * self.spec.relation.window
        weights = self.weights[first : first + len(window)]
        tasks: list[Tensor] = []
        features: list[Tensor] = []
        for given, weight in zip(window, weights, strict=True):
            tasks.append(F.mse_loss(self.predict(given).float(), given.prediction.float()) * weight)
            if self.tap is not None:
                features.append(self.tap.take())
        relation = self._relation(features, window)
        torch.autograd.backward(torch.stack(tasks).sum() * (1 / len(window)) + relation * self.spec.relation.weight)
        # The relation loss has the same weight at all timesteps, so that small weights do not shrink the power.
        powers = [max(w, 1.0) * g.prediction.square().mean() for g, w in zip(window, weights, strict=True)]
        return torch.stack([torch.stack(tasks).mean(), relation, torch.stack(powers).mean()]).detach().float().cpu()

    def predict(self, given: TeacherStep) -> Tensor:
        """The student's guided prediction of a step."""
        t = torch.full((len(given.x),), given.timestep, dtype=torch.long, device=given.x.device)
        narrow = self.spec.precision == "bfloat16"
        with torch.autocast(self.training.device.type, dtype=torch.bfloat16) if narrow else nullcontext():
            return self.denoiser.guided(given.x, t, given.cond, self.source.guidance)

    def _relation(self, features: list[Tensor], window: list[TeacherStep]) -> Tensor:
        if not features:
            return torch.zeros((), device=self.training.device)
        teachers = [given.features for given in window if given.features is not None]
        if len(teachers) < len(window):
            raise ConfigError(
                "the relation loss needs the teacher's features: name a feature module in the trajectories"
            )
        return window_relation_loss(features, teachers, self.spec.relation.temperature)


class Guard:
    """Stops a training whose loss or gradient is not finite, or whose loss explodes.

    Losses are held to ``ceiling``: the largest of the first trajectory, or a hundredth of the mean square of the
    teacher's prediction if that is more. Losses of different timesteps differ by more than any explosion, so the first
    trajectory is only held to the size of its targets.
    """

    def __init__(self, spec: DistillSpec, training: Training, trajectory_windows: int) -> None:
        self.spec, self.training, self.trajectory_windows = spec, training, trajectory_windows
        self.ceiling = 0.0

    def check(self, done: int, loss: float, norm: float, power: float) -> None:
        """Raise `NumericsError` with step and advice, or take note of the loss of a step."""
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise self._error(done, f"the loss is {loss:.3g}, the norm of its gradient {norm:.3g}")
        self.ceiling = max(self.ceiling, power / 100)
        first = done < self.trajectory_windows
        usual = power if first else self.ceiling
        if done and loss > self.spec.explosion * usual:
            gradients = {n: p.grad for n, p in self.training.parameters.items() if p.grad is not None}
            steepest = max(
                gradients, key=lambda n: float(gradients[n].norm() / self.training.parameters[n].detach().norm())
            )
            raise self._error(
                done,
                f"the loss is {loss:.3g}, more than {self.spec.explosion:g} times what it was at first ({usual:.3g}), "
                f"with the steepest gradient in {steepest!r}",
            )
        if first:
            self.ceiling = max(self.ceiling, loss)

    def _error(self, done: int, what: str) -> NumericsError:
        return NumericsError(
            f"training stopped at step {done + 1} of {self.spec.steps}: {what}. The last checkpoint is kept. Lower the "
            "learning rates (distill.lr_factor) or distill.clip_norm, or give layers more bits (policy.overrides), and "
            "start again with --overwrite."
        )


def timestep_weights(source: Trajectories) -> tuple[float, ...]:
    """The sensitivities to each timestep's prediction, scaled to mean 1."""
    values = source.sensitivities()
    total = sum(values)
    if not total > 0:
        raise ConfigError(
            "distill.timestep_weights sampler: no prediction of this sampler changes the sample; use uniform"
        )
    return tuple(v * len(values) / total for v in values)


def _windows(steps: Iterator[TeacherStep], size: int) -> Iterator[list[TeacherStep]]:
    """Consecutive steps in groups; the last group of a trajectory may be shorter."""
    group: list[TeacherStep] = []
    for step in steps:
        group.append(step)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
