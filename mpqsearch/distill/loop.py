"""The training loop: a generator that yields its state after every optimiser step, so that callers own progress and
early stops.

One optimiser step is one window of consecutive steps of the scheduler on a teacher trajectory. The loss is

    mean over the window of w_t MSE(student's prediction, teacher's) + weight * relation loss of the window

where the prediction is what the scheduler makes of the raw ones of a step: with classifier-free guidance the guided
one (`mpqsearch.sampling.SchedulerStep`). MSE is the *mean* over samples and elements; the code of EfficientDM and
MPQ-DM sums instead, which AdamW's step does not see. The weights ``w_t`` of steps are 1, or what the sampler makes of
an error: see `DistillSpec.timestep_weights`.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NotRequired, TypedDict

from torch import Tensor, nn

from mpqsearch import artifacts
from mpqsearch.distill.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mpqsearch.distill.checks import Checks
from mpqsearch.distill.objective import Guard, Objective
from mpqsearch.distill.processes import Processes
from mpqsearch.distill.teacher import Trajectories
from mpqsearch.distill.training import Training
from mpqsearch.errors import ArtifactError
from mpqsearch.specs import DistillSpec
from mpqsearch.untrusted import build, parse_json, read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillState:
    """After ``step`` of ``steps``: losses of the step, learning rate as a fraction of its start, norm of the gradient
    before clipping.

    ``check`` is what the student measured after this step, if it was checked, and ``best`` the step (0: before the
    first) and the measure of the best check so far. ``checkpoint`` is the folder written after this step, if any;
    ``interrupted`` says that a signal (its number: ``signal``) came, the state was saved, and the loop ends.
    """

    step: int
    steps: int
    loss: float
    task: float
    relation: float
    rate: float
    gradient_norm: float
    seconds: float
    check: float | None = None
    best: tuple[int, float] | None = None
    checkpoint: Path | None = None
    interrupted: bool = False
    signal: int = 0

    def to_data(self) -> dict[str, float]:
        """The numbers, for the log."""
        names = ("step", "loss", "task", "relation", "rate", "gradient_norm", "seconds")
        numbers: dict[str, float] = {k: getattr(self, k) for k in names}
        if self.check is not None:
            numbers["check"] = self.check
        return numbers


def distill(
    student: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    source: Trajectories,
    spec: DistillSpec,
    *,
    folder: Path | None = None,
    inputs: Mapping[str, str] | None = None,
    overwrite: bool = False,
    processes: Processes | None = None,
    measure: Callable[[nn.Module], float] | None = None,
) -> Iterator[DistillState]:
    """Train ``student`` in place; yield a `DistillState` after every optimiser step.

    student
        Called as the teacher's module is.
    groups
        Parameter groups for AdamW, each ``{"params": ..., "lr": ...}`` with the learning rate at the start.
    source
        The teacher's trajectories.
    folder
        Where ``train.jsonl`` and checkpoints go; None writes nothing. Existing checkpoints of the same training are
        continued, which gives the same result bit for bit (one process, on a CPU).
    inputs
        Digests of what the student was made from (model, bit map, ...), checked when a checkpoint is continued.
    overwrite
        Delete checkpoints of another training instead of raising `StaleArtifactError`.
    measure
        What `DistillSpec.check_every` checks by: the student's loss of quality, less is better; not finite counts as
        worst. Called on the main process alone, outside of gradients. It must not change the student.

    SIGTERM and SIGINT save after the running step and end the loop; a second signal acts as usual. Raises
    `NumericsError`, naming step, layer and what to do, when the loss or a gradient is not finite or the loss explodes;
    the last checkpoint stays as it is.
    """
    team = processes or Processes()
    run = _Run(student, groups, source, spec, team, measure)
    log = None if folder is None or not team.main else folder / "train.jsonl"
    identity = {**(inputs or {}), **source.identity, **spec.identity(), "distill.parameters": run.training.digest()}
    done = 0
    if folder is not None:
        checkpoint = load_checkpoint(folder, identity, overwrite=overwrite)
        team.wait()
        done = 0 if checkpoint is None else run.load(checkpoint)
        _cut_log(log, done)
    with _Signals() as stopping, run.objective:
        run.encode(done)
        missed = run.checks.check(done)  # before the first step, or one that a signal left out
        if missed is not None:
            _append(log, {"step": done, "check": missed})
        while done < spec.steps:
            numbers = run.step(done)
            done += 1
            stop = team.any(stopping.number > 0, run.training.device)
            state = DistillState(
                step=done,
                steps=spec.steps,
                check=None if stop else run.checks.check(done),
                best=run.checks.best,
                interrupted=stop,
                signal=stopping.number,
                checkpoint=None,
                **numbers,
            )
            _append(log, state.to_data())  # before the checkpoint: what continues from one cuts later lines off
            if folder is not None and (stop or done == spec.steps or done % spec.checkpoint_every == 0):
                if team.main:
                    path = save_checkpoint(folder, run.checkpoint(done), identity)
                    state = replace(state, checkpoint=path)
                team.wait()
            if stop:
                stopping.number = 0  # the caller is told, and may leave this where it is
            yield state
            if stop:
                return
    run.training.put(run.checks.parameters or run.training.averaged())


class _Run:
    """What one training consists of, and one optimiser step."""

    def __init__(
        self,
        student: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        source: Trajectories,
        spec: DistillSpec,
        processes: Processes,
        measure: Callable[[nn.Module], float] | None,
    ) -> None:
        self.spec, self.processes = spec, processes
        self.training = Training(student, groups, spec)
        self.objective = Objective(student, source, spec, self.training)
        self.guard = Guard(spec, self.training, self.objective.windows.per_trajectory)
        self.checks = Checks(spec, student, self.training, processes, measure)

    def encode(self, done: int) -> None:
        """Encode the prompts of all trajectories that are to come."""
        per_trajectory = self.objective.windows.per_trajectory
        self.objective.source.encode(done // per_trajectory, -(-self.spec.steps // per_trajectory))

    def step(self, done: int) -> dict[str, float]:
        """One optimiser step; ``done`` are finished. The numbers of `DistillState`."""
        began = time.perf_counter()
        training = self.training
        training.optimizer.zero_grad(set_to_none=True)
        totals = self.objective.backward(done)
        norm = training.gradient_norm(totals, self.processes)
        task, relation, power = totals.tolist()
        loss = task + self.spec.relation.weight * relation
        self.guard.check(done, loss, norm, power)
        training.update(norm)
        training.seconds += time.perf_counter() - began
        return {
            "loss": loss,
            "task": task,
            "relation": relation,
            "rate": 1 - done / self.spec.steps,
            "gradient_norm": norm,
            "seconds": training.seconds,
        }

    def checkpoint(self, done: int) -> Checkpoint:
        """Everything that the rest of the training depends on."""
        tensors = self.training.tensors()
        tensors |= {f"best/{n}": v for n, v in self.checks.parameters.items()}
        data = {
            "ceiling": self.guard.ceiling,
            "seconds": self.training.seconds,
            "checks": self.checks.data(),
        }
        return Checkpoint(step=done, tensors=tensors, data=data)

    def load(self, checkpoint: Checkpoint) -> int:
        """Continue from a checkpoint; the number of finished steps."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in checkpoint.tensors.items():
            kind, name = key.split("/", 1)
            parts.setdefault(kind, {})[name] = value
        self.training.load(checkpoint.step, parts, checkpoint.data)
        self.checks.load(parts.get("best", {}), checkpoint.data["checks"])
        self.guard.ceiling = float(checkpoint.data["ceiling"])
        return checkpoint.step


class _Signals:
    """Catch SIGTERM and SIGINT once: set a flag, and give the next signal its usual effect. One that came too late to
    be looked at has its usual effect at the end."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self.number:
            signal.raise_signal(self.number)

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _append(path: Path | None, data: Mapping[str, float]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        numbers = {key: value if math.isfinite(value) else None for key, value in data.items()}
        handle.write(json.dumps(numbers) + "\n")


def _cut_log(path: Path | None, done: int) -> None:
    """Drop lines after step ``done``, all of them where nothing is done, and a torn last line."""
    if path is None or not path.is_file():
        return
    kept = (json.dumps(line) + "\n" for line in read_log(path) if done and line["step"] <= done)
    artifacts.write_text(path, "".join(kept))


class LogLine(TypedDict):
    """A line of ``train.jsonl``: the step, and the numbers of `DistillState` or of a check; null for what is not
    finite."""

    step: int
    check: NotRequired[float | None]


def read_log(path: Path) -> Iterator[LogLine]:
    """The lines of a training's log; those that a crash left torn are left out."""
    for line in read_bytes(path).splitlines():
        with contextlib.suppress(ArtifactError):
            yield build(LogLine, parse_json(line, str(path)))
