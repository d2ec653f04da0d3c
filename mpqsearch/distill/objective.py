"""The loss of a window of consecutive timesteps, and the guard that stops a training whose loss explodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpqsearch.distill.teacher import TeacherSource, TeacherStep
from mpqsearch.distill.training import Training
from mpqsearch.distill.trd import FeatureTap, TimeSmoothedRelations, find_feature_module
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.models import Denoiser
from mpqsearch.specs import DistillSpec

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `torch.autocast` is given for a precision of `DistillSpec`; None: it is off."""


class Windows:
    """The endless row of trajectories of a teacher, in windows of consecutive timesteps.

    ``per_trajectory`` windows make a trajectory; the last may be shorter.
    """

    def __init__(self, source: TeacherSource, size: int) -> None:
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

    def __init__(self, denoiser: Denoiser, source: TeacherSource, spec: DistillSpec, training: Training) -> None:
        self.denoiser, self.source, self.spec, self.training = denoiser, source, spec, training
        self.windows = Windows(source, spec.relation.window)
        self.relations = TimeSmoothedRelations(spec.relation)
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
        if position == 0:
            self.relations.restart()
        first = position * self.spec.relation.window
        weights = self.weights[first : first + len(window)]
        share = 1 / (len(window) * self.spec.accumulate)
        tasks: list[Tensor] = []
        for i, given in enumerate(window):
            last = i + 1 == len(window)
            task = self._task(given) * weights[i]
            if self.tap is not None:
                self._relate(self.tap, given, last=last)
            if self.spec.relation.truncate and not last:
                self._backward(task * share)
                task = task.detach()
            tasks.append(task)
        relation = self.relations.loss() if self.tap is not None else torch.zeros((), device=self.training.device)
        self._backward(torch.stack(tasks).sum() * share + relation * (self.spec.relation.weight / self.spec.accumulate))
        # The relation loss has the same weight at all timesteps, so that small weights do not shrink the power.
        powers = [max(w, 1.0) * g.prediction.square().mean() for g, w in zip(window, weights, strict=True)]
        return torch.stack([torch.stack(tasks).mean(), relation, torch.stack(powers).mean()]).detach().float().cpu()

    def predict(self, given: TeacherStep) -> Tensor:
        """The student's guided prediction of a step."""
        t = torch.full((len(given.x),), given.timestep, dtype=torch.long, device=given.x.device)
        dtype = AUTOCAST[self.spec.precision]
        narrow = nullcontext() if dtype is None else torch.autocast(self.training.device.type, dtype=dtype)
        with narrow:
            return self.denoiser.guided(given.x, t, given.cond, self.source.guidance)

    def _task(self, given: TeacherStep) -> Tensor:
        task = F.mse_loss(self.predict(given).float(), given.prediction.float())
        if not bool(torch.isfinite(task)) and not self.training.scaler.is_enabled():
            with torch.no_grad():
                layer = first_not_finite(self.denoiser.module, lambda: self.predict(given))
            raise NotFiniteError(f"the loss is {float(task.detach())} at timestep {given.timestep}", layer)
        return task

    def _relate(self, tap: FeatureTap, given: TeacherStep, *, last: bool) -> None:
        if given.features is None:
            raise ConfigError(
                "the relation loss needs the teacher's features: name a feature module in the trajectories"
            )
        self.relations.add(tap.take(), given.features, last=last)

    def _backward(self, loss: Tensor) -> None:
        torch.autograd.backward(self.training.scaler.scale(loss))


class NotFiniteError(Exception):
    """A loss is no number; ``layer`` is where that was seen first."""

    def __init__(self, what: str, layer: str) -> None:
        super().__init__(what)
        self.layer = layer


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
        """Raise `NumericsError` with step, layer and advice, or take note of the loss of a step."""
        if not math.isfinite(norm):
            if not self.training.scaler.is_enabled():  # else the scaler leaves this step out and lowers its scale
                raise self.error(done, "a gradient is not finite", self._layer(lambda g, _: not g.isfinite().all()))
            return
        self.ceiling = max(self.ceiling, power / 100)
        first = done * self.spec.accumulate < self.trajectory_windows
        usual = power if first else self.ceiling
        if done and loss > self.spec.explosion * usual:
            what = f"the loss is {loss:.3g}, more than {self.spec.explosion:g} times what it was at first ({usual:.3g})"
            raise self.error(done, what, self._layer(lambda g, p: g.norm() / p.norm().clamp_min(1e-12)))
        if first:
            self.ceiling = max(self.ceiling, loss)

    def _layer(self, badness: Any) -> str:
        """The parameter of the largest badness of its gradient."""
        values = {
            n: float(badness(p.grad, p.detach())) for n, p in self.training.parameters.items() if p.grad is not None
        }
        return max(values, key=values.__getitem__)

    def error(self, done: int, what: str, layer: str) -> NumericsError:
        """What is raised when step ``done`` was the last that went well."""
        return NumericsError(
            f"training stopped at step {done + 1} of {self.spec.steps}: {what}; first seen in {layer!r}. The last "
            "checkpoint is kept. Lower the learning rates (distill.lr_factor) or distill.clip_norm, or give that layer "
            "more bits (policy.overrides), and start again with --overwrite."
        )


def timestep_weights(source: TeacherSource) -> tuple[float, ...]:
    """The sensitivities to each timestep's prediction, scaled to mean 1."""
    values = source.sensitivities()
    total = sum(values)
    if not total > 0:
        raise ConfigError(
            "distill.timestep_weights sampler: no prediction of this sampler changes the sample; use uniform"
        )
    return tuple(v * len(values) / total for v in values)


def first_not_finite(module: nn.Module, run: Any) -> str:
    """Run something, and name the first module in the order of the forward pass whose output is not finite."""
    names: list[str] = []

    def hook(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not names and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                names.append(name)

        return look

    leaves = [(n, m) for n, m in module.named_modules() if n and not any(True for _ in m.children())]
    handles = [m.register_forward_hook(hook(n)) for n, m in leaves]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else "the output"


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
