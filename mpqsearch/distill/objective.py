"""The loss of a window of consecutive steps, and the guard that stops a training whose loss explodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.distill.teacher import TeacherCall, Trajectories, feature_tap
from mpqsearch.distill.training import Training
from mpqsearch.distill.trd import window_relation_loss
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.sampling import SchedulerStep, prediction_gains, scheduler_steps
from mpqsearch.specs import DistillSpec, TRDSpec


class Windows:
    """The endless row of trajectories of a teacher, in windows of consecutive steps of its scheduler.

    ``per_trajectory`` windows make a trajectory; the last may be shorter.
    """

    def __init__(self, source: Trajectories, steps: Sequence[SchedulerStep], relation: TRDSpec) -> None:
        self.source, self.relation, self.size = source, relation, relation.window
        self.per_trajectory = -(-len(steps) // self.size)
        self._bounds = list(pairwise(accumulate((s.n_calls for s in steps), initial=0)))
        self._calls: list[TeacherCall] = []
        self._trajectory = -1

    def take(self, index: int) -> list[list[TeacherCall]]:
        """The calls of each step of window ``index``."""
        trajectory, position = divmod(index, self.per_trajectory)
        if trajectory != self._trajectory:
            self._calls = []  # before the next are computed
            self._calls, self._trajectory = self.source.run(trajectory, self.relation), trajectory
        return [self._calls[a:b] for a, b in self._bounds[position * self.size :][: self.size]]


class Objective:
    """The loss of a student on windows of a teacher. Use as a context manager: the features of modules are read."""

    def __init__(self, student: nn.Module, source: Trajectories, spec: DistillSpec, training: Training) -> None:
        self.student, self.source, self.spec, self.training = student, source, spec, training
        self.steps = scheduler_steps(source.denoiser, source.probe_seeds[0])
        self.windows = Windows(source, self.steps, spec.relation)
        self.tap = feature_tap(source.denoiser.with_module(student), spec.relation)
        weigh = spec.timestep_weights == "sampler"
        self.weights = step_weights(source, self.steps) if weigh else [1.0] * len(self.steps)

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
        window, first = self.windows.take(index), index % self.windows.per_trajectory * self.windows.size
        tasks, powers = [], []
        features: list[list[Tensor]] = []
        for number, given in enumerate(window, first):
            features.append([])
            targets = [g.prediction.to(self.training.device).float() for g in given]
            errors = [self._predict(g, features[-1]) - target for g, target in zip(given, targets, strict=True)]
            tasks.append(self._mean_square(errors, self.steps[number]) * self.weights[number])
            # The relation loss has the same weight at all steps, so that small weights do not shrink the power.
            powers.append(self._mean_square(targets, self.steps[number]) * max(self.weights[number], 1.0))
        relation = self._relation(features, window)
        task = torch.stack(tasks).mean()
        torch.autograd.backward(task + relation * self.spec.relation.weight)
        return torch.stack([task, relation, torch.stack(powers).mean()]).detach().float().cpu()

    def _predict(self, given: TeacherCall, features: list[Tensor]) -> Tensor:
        """The student's raw prediction for a call; its features are added to ``features``."""
        narrow = self.spec.precision == "bfloat16"
        with torch.autocast(self.training.device.type, dtype=torch.bfloat16) if narrow else nullcontext():
            prediction = given.call.replay(self.student)
        if self.tap is not None:
            features.append(self.tap.take())
        return prediction.float()

    def _mean_square(self, values: Sequence[Tensor], step: SchedulerStep) -> Tensor:
        """Mean square of what the scheduler makes of the values of all calls of a step."""
        if step.mix is None:
            return torch.stack([v.square().mean() for v in values]).mean()
        rows = torch.cat([v.reshape(len(v) // self.source.batch, -1) for v in values])
        return (step.mix.to(rows.device) @ rows).square().sum() / rows.shape[1]

    def _relation(self, features: list[list[Tensor]], window: list[list[TeacherCall]]) -> Tensor:
        """The mean over calls that correspond: the first of each step, the second of each step, and so on."""
        groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for students, given in zip(features, window, strict=True):
            for place, (student, teacher) in enumerate(zip(students, given, strict=False)):
                assert teacher.features is not None
                pair = (student, teacher.features.to(student.device))
                groups.setdefault((place, teacher.call.part, teacher.features.shape), []).append(pair)
        if not groups:
            return torch.zeros((), device=self.training.device)
        temperature = self.spec.relation.temperature
        losses = [window_relation_loss([s for s, _ in g], [t for _, t in g], temperature) for g in groups.values()]
        return torch.stack(losses).mean()


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


def step_weights(source: Trajectories, steps: Sequence[SchedulerStep]) -> list[float]:
    """The mean squared change of the final sample for a unit of each step's loss, scaled to mean 1 over the steps."""
    batches = source.probe_seeds
    gains = torch.zeros(len(steps), dtype=torch.float64)
    for seeds in batches:
        calls = iter(prediction_gains(source.denoiser, seeds))
        for i, step in enumerate(steps):
            total = sum(float(next(calls).sum()) for _ in range(step.n_calls)) / len(seeds)
            gains[i] += total / (step.n_calls if step.mix is None else float(step.mix.square().sum()))
    if not float(gains.sum()) > 0:
        raise ConfigError(
            "distill.timestep_weights sampler: no prediction of this sampler changes the sample; use uniform"
        )
    return [float(g) for g in gains / gains.mean()]
