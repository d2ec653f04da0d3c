"""Checks of a student while it trains: the parameters of the best check are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.distill.processes import Processes
from mpqsearch.distill.training import Training
from mpqsearch.errors import ConfigError
from mpqsearch.specs import DistillSpec


class Checks:
    """What the student measured, by the number of finished steps, and its parameters at the best of them."""

    def __init__(
        self,
        spec: DistillSpec,
        student: nn.Module,
        training: Training,
        processes: Processes,
        measure: Callable[[nn.Module], float] | None,
    ) -> None:
        if spec.check_every and measure is None:
            raise ConfigError("distill: check_every needs a measure to check by; give one, or set check_every to 0")
        self.spec, self.student, self.training, self.processes = spec, student, training, processes
        self.measure = measure
        self.values: dict[int, float] = {}
        self.parameters: dict[str, Tensor] = {}

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and measure of the least, the first of equals."""
        return min(self.values.items(), key=lambda c: (c[1], c[0])) if self.values else None

    def check(self, done: int) -> float | None:
        """Measure the student after ``done`` steps where a check is due, and keep its parameters when they are the
        best; None where none is."""
        every = self.spec.check_every
        if not every or (done % every and done != self.spec.steps) or done in self.values:
            return None
        with self.training.evaluated():
            value = self._measured()
            self.values[done] = value  # of the main process; others only need to know which step is the best
            best = self.best
            if self.processes.any(self.processes.main and best is not None and best[0] == done, self.training.device):
                self.parameters = {n: p.detach().clone() for n, p in self.training.parameters.items()}
        return value

    @torch.no_grad()
    def _measured(self) -> float:
        if self.measure is None or not self.processes.main:
            return math.inf
        value = float(self.measure(self.student))
        return value if math.isfinite(value) else math.inf

    def data(self) -> list[list[Any]]:
        """The values as plain JSON data."""
        return [[k, v if math.isfinite(v) else None] for k, v in self.values.items()]

    def load(self, parameters: Mapping[str, Tensor], data: Any) -> None:
        """Continue from a checkpoint."""
        self.parameters = {n: v.to(self.training.device) for n, v in parameters.items()}
        self.values = {int(k): math.inf if v is None else float(v) for k, v in data}
