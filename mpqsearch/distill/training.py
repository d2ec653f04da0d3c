"""What is trained: parameters, AdamW with its schedule and averaged weights, and their checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mpqsearch import artifacts
from mpqsearch.distill.processes import Processes
from mpqsearch.errors import ConfigError
from mpqsearch.specs import DistillSpec

ADAM_EPSILON = 1e-15
"""Added to root mean square gradients. A gradient is that of the loss for a step of a row, which is small for a row of
8 bits and a loss that is nearly gone: the usual 1e-8 would hold such rows still."""


class Training:
    """The trained parameters of a student by name, and what moves them. ``seconds`` were spent on optimiser steps."""

    def __init__(self, student: nn.Module, groups: Sequence[Mapping[str, Any]], spec: DistillSpec) -> None:
        self.spec = spec
        wanted = {id(p) for g in groups for p in g["params"]}
        self.parameters = {n: p for n, p in student.named_parameters() if id(p) in wanted}
        if not self.parameters or len(self.parameters) != len(wanted):
            raise ConfigError(
                f"distill: {len(wanted)} parameters are to be trained, of which the student has "
                f"{len(self.parameters)}: make the parameter groups from this student"
            )
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            [{"params": list(g["params"]), "lr": float(g["lr"]), "initial_lr": float(g["lr"])} for g in groups],
            weight_decay=spec.weight_decay,
            eps=ADAM_EPSILON,
        )
        self.trained = nn.ParameterList(self.parameters.values())
        self.average: AveragedModel | None = None
        if spec.ema:
            decay: Any = get_ema_multi_avg_fn(spec.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.trained, multi_avg_fn=decay)
            self.average.update_parameters(self.trained)  # the average begins with the student as it is given
        self.seconds = 0.0
        self.start(0)

    def digest(self) -> str:
        """Names, shapes and learning rates of what is trained."""
        rates = {id(p): g["initial_lr"] for g in self.optimizer.param_groups for p in g["params"]}
        return artifacts.digest_of([[n, list(p.shape), rates[id(p)]] for n, p in self.parameters.items()])

    def start(self, done: int) -> None:
        """Learning rates as they are after ``done`` steps: they fall linearly to 0."""
        self.schedule = LambdaLR(self.optimizer, lambda step: 1 - step / self.spec.steps, last_epoch=done - 1)

    def gradient_norm(self, totals: Tensor, processes: Processes) -> float:
        """Average gradients and ``totals`` over processes; norm of all gradients together, before clipping."""
        gradients = [p.grad for p in self.trained if p.grad is not None]
        processes.average([*gradients, totals])
        return float(torch.nn.utils.get_total_norm(gradients))

    def update(self, norm: float) -> None:
        """One step of the optimiser, the schedule and the average."""
        if self.spec.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.spec.clip_norm, torch.tensor(norm))
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.trained)

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters the given values."""
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def averaged(self) -> dict[str, Tensor]:
        """Averaged weights by name; nothing without `DistillSpec.ema`."""
        if self.average is None:
            return {}
        return dict(zip(self.parameters, self.average.module.parameters(), strict=True))

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Averaged weights in the student, where there are any, and the trained ones afterwards."""
        trained = {n: self.parameters[n].detach().clone() for n in self.averaged()}
        self.put(self.averaged())
        try:
            yield
        finally:
            self.put(trained)

    def tensors(self) -> dict[str, Tensor]:
        """Everything of a checkpoint that is a tensor."""
        tensors: dict[str, Tensor] = {f"parameter/{n}": p for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        tensors |= {f"average/{n}": v for n, v in self.averaged().items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def load(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], data: Mapping[str, Any]) -> None:
        """Continue after ``step`` from the ``tensors`` of a checkpoint, by their first word."""
        self.put(parts["parameter"])
        with torch.no_grad():
            for name, value in self.averaged().items():
                value.copy_(parts["average"][name])
        for key, value in parts.get("optimizer", {}).items():
            name, entry = key.rsplit("/", 1)
            # AdamW keeps its step count on the CPU whatever the device of the parameter.
            self.optimizer.state[self.parameters[name]][entry] = value if entry == "step" else value.to(self.device)
        torch.set_rng_state(parts["random"]["cpu"])
        if "cuda" in parts["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)
        self.seconds = float(data["seconds"])
        self.start(step)
