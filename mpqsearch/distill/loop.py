"""The training loop: a generator that yields its state after every optimiser step, so that callers own progress and
early stops.

One optimiser step is one window of consecutive timesteps of a teacher trajectory (times `DistillSpec.accumulate`). The
loss is

    mean over the window of w_t MSE(student's guided prediction, teacher's) + weight * relation loss of the window

where MSE is the *mean* over samples and elements; the code of EfficientDM and MPQ-DM sums instead, which AdamW's step
does not see. The weights ``w_t`` of timesteps are 1, or what the sampler makes of an error: see
`DistillSpec.timestep_weights`.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpqsearch import artifacts
from mpqsearch.distill.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mpqsearch.distill.processes import Processes
from mpqsearch.distill.teacher import TeacherSource, TeacherStep
from mpqsearch.distill.trd import FeatureTap, TimeSmoothedRelations, find_feature_module
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.models import Denoiser
from mpqsearch.specs import DistillSpec

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `torch.autocast` is given for a precision of `DistillSpec`; None: it is off."""


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
    denoiser: Denoiser,
    student: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    source: TeacherSource,
    spec: DistillSpec,
    *,
    folder: Path | None = None,
    inputs: Mapping[str, str] | None = None,
    overwrite: bool = False,
    processes: Processes | None = None,
    measure: Callable[[nn.Module], float] | None = None,
) -> Iterator[DistillState]:
    """Train ``student`` in place; yield a `DistillState` after every optimiser step.

    denoiser
        The teacher: tells how the student is called, and names it.
    student
        Same call signature as the teacher's module.
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
    if spec.check_every and measure is None:
        raise ConfigError("distill: check_every needs a measure to check by; give one, or set check_every to 0")
    run = _Run(denoiser, student, groups, source, spec, processes or Processes())
    run.measure = measure
    identity = {**(inputs or {}), **source.identity, **spec.identity(), "distill.parameters": run.parameters_digest()}
    done = 0
    if folder is not None:
        found = load_checkpoint(folder, identity, overwrite=overwrite)
        run.processes.wait()
        if found is not None:
            done = run.load(found)
        if run.processes.main:
            _cut_log(folder / "train.jsonl", done)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_Signals())
        events = stack.enter_context(_Events(folder if spec.tensorboard and run.processes.main else None))
        run.open(stack)
        missed = run.check(done)  # before the first step, or one that a signal left out
        if missed is not None and folder is not None and run.processes.main:
            _append(folder / "train.jsonl", {"step": done, "check": missed})
        while done < spec.steps:
            numbers = run.step(done)
            done += 1
            stop = run.processes.any(stopping.number > 0, run.device)
            check = None if stop and done < spec.steps else run.check(done)
            path = None
            if folder is not None and (stop or done == spec.steps or done % spec.checkpoint_every == 0):
                if run.processes.main:
                    path = save_checkpoint(folder, run.checkpoint(done), identity, keep_last=spec.keep_last)
                run.processes.wait()
            state = DistillState(
                step=done,
                steps=spec.steps,
                check=check,
                best=run.best_check,
                checkpoint=path,
                interrupted=stop and done < spec.steps,
                signal=stopping.number,
                **numbers,
            )
            if folder is not None and run.processes.main:
                _append(folder / "train.jsonl", state.to_data())
            events.write(state)
            yield state
            if state.interrupted:
                return
    run.finish()


class _Run:
    """The tensors of one training and one optimiser step over them."""

    def __init__(
        self,
        denoiser: Denoiser,
        student: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        source: TeacherSource,
        spec: DistillSpec,
        processes: Processes,
    ) -> None:
        self.student, self.source, self.spec, self.processes = student, source, spec, processes
        self.denoiser = denoiser.with_module(student)
        wanted = {id(p) for g in groups for p in g["params"]}
        self.parameters = {n: p for n, p in student.named_parameters() if id(p) in wanted}
        if not self.parameters or len(self.parameters) != len(wanted):
            raise ConfigError(
                f"distill: {len(wanted)} parameters are to be trained, of which the student has "
                f"{len(self.parameters)}: "
                "make the parameter groups from this student"
            )
        self.rates = [float(g["lr"]) for g in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(g["params"]), "lr": rate} for g, rate in zip(groups, self.rates, strict=True)],
            weight_decay=spec.weight_decay,
        )
        self.device = next(iter(self.parameters.values())).device
        self.precision = AUTOCAST[spec.precision]
        if self.precision is torch.float16 and self.device.type == "cpu":
            raise ConfigError("distill.precision float16 needs a GPU; bfloat16 and float32 work on a CPU")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if spec.ema else {}
        self.relations = TimeSmoothedRelations(spec.relation)
        self.tap: FeatureTap | None = None
        if spec.relation.weight > 0:
            if spec.relation.queue and processes.world > 1:
                raise ConfigError(
                    "distill.relation.queue keeps the memory of one process; set it to 0 to train on several"
                )
            name = spec.relation.feature or find_feature_module(student)
            self.tap = FeatureTap(student, name, spec.relation.pooled_size)
        self.windows_per_trajectory = -(-len(source.timesteps) // spec.relation.window)
        self.weights = (
            _timestep_weights(source) if spec.timestep_weights == "sampler" else (1.0,) * len(source.timesteps)
        )
        self.ceiling = 0.0
        self.seconds = 0.0
        self.measure: Callable[[nn.Module], float] | None = None
        self.checks: dict[int, float] = {}
        self.best: dict[str, Tensor] = {}
        self._windows: Iterator[list[TeacherStep]] = iter(())
        self._next = -1

    def open(self, stack: contextlib.ExitStack) -> None:
        if self.tap is not None:
            stack.enter_context(self.tap)

    def parameters_digest(self) -> str:
        """Names, shapes and learning rates of what is trained."""
        rates = {
            id(p): rate for g, rate in zip(self.optimizer.param_groups, self.rates, strict=True) for p in g["params"]
        }
        return artifacts.digest_of([[n, list(p.shape), rates[id(p)]] for n, p in self.parameters.items()])

    def step(self, done: int) -> dict[str, float]:
        """One optimiser step; ``done`` are finished."""
        began = time.perf_counter()
        rate = 1 - done / self.spec.steps
        for group, start in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = start * rate
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(3)
        for k in range(self.spec.accumulate):
            totals += self._window(done * self.spec.accumulate + k, done)
        totals /= self.spec.accumulate
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        self.processes.average([*gradients, totals])
        norm = float(torch.nn.utils.get_total_norm(gradients))
        task, relation, power = (float(v) for v in totals)
        loss = task + self.spec.relation.weight * relation
        self._check(done, loss, norm, power)
        if self.spec.clip_norm and math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.spec.clip_norm, torch.tensor(norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.spec.ema:
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter.detach(), 1 - self.spec.ema)
        self.seconds += time.perf_counter() - began
        return {
            "loss": loss, "task": task, "relation": relation, "rate": rate, "gradient_norm": norm, "seconds": self.seconds
        }  # fmt: skip

    @property
    def best_check(self) -> tuple[int, float] | None:
        """Step and measure of the least, the first of equals."""
        return min(self.checks.items(), key=lambda c: (c[1], c[0])) if self.checks else None

    def check(self, done: int) -> float | None:
        """Measure the student after ``done`` steps where a check is due, and keep its parameters when they are the
        best; None where none is."""
        every = self.spec.check_every
        if not every or self.measure is None or (done % every and done != self.spec.steps) or done in self.checks:
            return None
        value = math.inf
        with self._averaged():
            if self.processes.main:
                with torch.no_grad():
                    found = float(self.measure(self.student))
                value = found if math.isfinite(found) else math.inf
            self.checks[done] = value  # of the main process; others only need to know which step is the best
            best = self.best_check
            if self.processes.any(self.processes.main and best is not None and best[0] == done, self.device):
                self.best = {n: p.detach().clone() for n, p in self.parameters.items()}
        return value

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Averaged weights in the student, where there are any, and the trained ones afterwards."""
        trained = {n: self.parameters[n].detach().clone() for n in self.average}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(trained)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def _window(self, index: int, done: int) -> Tensor:
        """Task and relation loss of window ``index`` and mean square of the teacher's predictions; gradients are added
        to the parameters'."""
        window = self._take(index)
        spec = self.spec.relation
        tasks: list[Tensor] = []
        scale = 1 / (len(window) * self.spec.accumulate)
        first = index % self.windows_per_trajectory * spec.window
        weights = self.weights[first : first + len(window)]
        for i, given in enumerate(window):
            t = torch.full((len(given.x),), given.timestep, dtype=torch.long, device=given.x.device)
            with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None):
                prediction = self.denoiser.guided(given.x, t, given.cond, self.source.guidance)
            task = F.mse_loss(prediction.float(), given.prediction.float()) * weights[i]
            if not bool(torch.isfinite(task)) and not self.scaler.is_enabled():
                raise NumericsError(
                    self._advice(
                        done, f"the loss is {float(task.detach())} at timestep {given.timestep}", self._blame(given)
                    )
                )
            if self.tap is not None:
                if given.features is None:
                    raise ConfigError(
                        "the relation loss needs the teacher's features: name a feature module in the trajectories"
                    )
                self.relations.add(self.tap.take(), given.features, last=i + 1 == len(window))
            if spec.truncate and i + 1 < len(window):
                torch.autograd.backward(self.scaler.scale(task * scale))
                task = task.detach()
            tasks.append(task)
        relation = self.relations.loss() if self.tap is not None else torch.zeros((), device=self.device)
        loss = torch.stack(tasks).sum() * scale + relation * (spec.weight / self.spec.accumulate)
        torch.autograd.backward(self.scaler.scale(loss))
        # What losses are held to. The relation loss has the same weight at all timesteps, so that small weights do not
        # shrink it.
        power = torch.stack(
            [max(w, 1.0) * given.prediction.square().mean() for given, w in zip(window, weights, strict=True)]
        ).mean()
        return torch.stack([torch.stack(tasks).mean(), relation, power]).detach().float().cpu()

    def _take(self, index: int) -> list[TeacherStep]:
        """Window ``index`` of the endless row of trajectories, computed from the start of its trajectory after a
        resume."""
        trajectory, position = divmod(index, self.windows_per_trajectory)
        if index != self._next or position == 0:
            self._windows = _windows(self.source.steps(trajectory), self.spec.relation.window)
            for _ in range(position):
                next(self._windows)
            if position == 0:
                self.relations.restart()
        self._next = index + 1
        return next(self._windows)

    def _check(self, done: int, loss: float, norm: float, power: float) -> None:
        if self.scaler.is_enabled() and not math.isfinite(norm):
            return  # the scaler leaves this step out and lowers its scale
        if not math.isfinite(norm):
            bad = next(
                n for n, p in self.parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())
            )
            raise NumericsError(self._advice(done, "a gradient is not finite", bad))
        self.ceiling = max(self.ceiling, power / 100)
        first = done * self.spec.accumulate < self.windows_per_trajectory
        # Losses of different timesteps differ by more than any explosion, so the first trajectory is only held to the
        # size of its targets.
        usual = power if first else self.ceiling
        if done and loss > self.spec.explosion * usual:
            largest = max(self.parameters, key=lambda n: _relative_gradient(self.parameters[n]))
            what = f"the loss is {loss:.3g}, more than {self.spec.explosion:g} times what it was at first ({usual:.3g})"
            raise NumericsError(self._advice(done, what, largest))
        if first:
            self.ceiling = max(self.ceiling, loss)

    def _blame(self, given: TeacherStep) -> str:
        """The first module of the student, in the order of the forward pass, whose parameters or output are not
        finite."""
        found: list[str] = []
        handles = []

        def hook(name: str) -> Any:
            def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                    found.append(name)

            return look

        for name, module in self.student.named_modules():
            if name and not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(hook(name)))
        try:
            with torch.no_grad():
                t = torch.full((len(given.x),), given.timestep, dtype=torch.long, device=given.x.device)
                self.denoiser.guided(given.x, t, given.cond, self.source.guidance)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else "the output"

    def _advice(self, done: int, what: str, layer: str) -> str:
        return (
            f"training stopped at step {done + 1} of {self.spec.steps}: {what}; first seen in {layer!r}. The last "
            "checkpoint is kept. "
            "Lower the learning rates (distill.lr_factor) or distill.clip_norm, or give that layer more bits "
            "(policy.overrides), "
            "and start again with --overwrite."
        )

    def checkpoint(self, done: int) -> Checkpoint:
        """Everything that the rest of the training depends on."""
        tensors: dict[str, Tensor] = {f"parameter/{n}": p for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        tensors |= {f"average/{n}": v for n, v in self.average.items()}
        tensors |= {f"best/{n}": v for n, v in self.best.items()}
        tensors |= {f"memory/{n}": v for n, v in self.relations.state().items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            step=done,
            tensors=tensors,
            data={
                "ceiling": self.ceiling,
                "seconds": self.seconds,
                "scaler": self.scaler.state_dict(),
                "checks": [[k, v if math.isfinite(v) else None] for k, v in self.checks.items()],
            },
        )

    def load(self, found: Checkpoint) -> int:
        """Continue from a checkpoint; returns the number of finished steps."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in found.tensors.items():
            kind, name = key.split("/", 1)
            parts.setdefault(kind, {})[name] = value
        self._put(parts["parameter"])
        for name, value in parts.get("average", {}).items():
            self.average[name].copy_(value)
        self.best = {n: v.to(self.device) for n, v in parts.get("best", {}).items()}
        self.checks = {int(k): math.inf if v is None else float(v) for k, v in found.data.get("checks", [])}
        for key, value in parts.get("optimizer", {}).items():
            name, entry = key.rsplit("/", 1)
            # AdamW keeps its step count on the CPU whatever the device of the parameter.
            self.optimizer.state[self.parameters[name]][entry] = value if entry == "step" else value.to(self.device)
        self.relations.load_state({n: v.to(self.device) for n, v in parts.get("memory", {}).items()})
        torch.set_rng_state(parts["random"]["cpu"])
        if "cuda" in parts["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)
        if found.data["scaler"]:
            self.scaler.load_state_dict(dict(found.data["scaler"]))
        self.ceiling, self.seconds = float(found.data["ceiling"]), float(found.data["seconds"])
        return found.step

    def finish(self) -> None:
        """Give the student the weights of the best check, or its averaged weights, if there are any."""
        self._put(self.best or self.average)


class _Signals:
    """Catch SIGTERM and SIGINT once: set a flag, and give the next signal its usual effect."""

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

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class _Events:
    """TensorBoard events, when a folder is given."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("distill.tensorboard needs tensorboard: pip install 'mpqsearch[train]'") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> _Events:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, state: DistillState) -> None:
        if self._writer is not None:
            for key, value in state.to_data().items():
                if key != "step":
                    self._writer.add_scalar(f"distill/{key}", value, state.step)


def _timestep_weights(source: TeacherSource) -> tuple[float, ...]:
    """The sampler's gains, scaled to mean 1."""
    gains = source.gains()
    total = sum(gains)
    if not total > 0:
        raise ConfigError(
            "distill.timestep_weights sampler: no prediction of this sampler changes the sample; use uniform"
        )
    return tuple(g * len(gains) / total for g in gains)


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


def _relative_gradient(parameter: Tensor) -> float:
    if parameter.grad is None:
        return 0.0
    return float(parameter.grad.norm() / parameter.detach().norm().clamp_min(1e-12))


def _append(path: Path, data: Mapping[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        handle.write(json.dumps(dict(data)) + "\n")


def _cut_log(path: Path, done: int) -> None:
    """Drop lines after step ``done``, all of them where nothing is done, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if done and json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    artifacts.write_text(path, "".join(kept))
