"""How a quantized student is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mpqsearch.errors import ConfigError, UnknownNameError

PRECISIONS = ("float32", "bfloat16")
"""Arithmetic of the student's forward pass; weights, losses and optimiser state are float32 in both."""

TIMESTEP_WEIGHTS = ("uniform", "sampler")

TRAINED = "+trd"
"""Behind the name of a method: what training made of its map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TRDSpec:
    """Options of the relation loss.

    window [steps of the scheduler]
        Consecutive steps of the scheduler whose features are averaged, 1..100. The window is also one optimiser step,
        with or without a relation loss.
    temperature
        Divides the cosines; cosines lie in -1..1, so that 1 is nearly uniform.
    weight
        Weight of the relation loss, added to the mean squared error; 0 switches it off.
    pooled_size [rows and columns]
        Feature maps are averaged down to at most this many rows and columns, token sequences to its square, 1..64.
    feature
        Module within the denoiser whose output is compared; empty: found by
        `mpqsearch.distill.find_feature_module`. Example: ``"mid_block"``.
    """

    window: int = 2
    temperature: float = 0.1
    weight: float = 0.1
    pooled_size: int = 16
    feature: str = ""

    def __post_init__(self) -> None:
        for name, low, high in (("window", 1, 100), ("pooled_size", 1, 64)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"distill.relation: {name} must lie in {low}..{high}, got {value}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"distill.relation: temperature must be positive and finite, got {self.temperature}")
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ConfigError(f"distill.relation: weight must be at least 0 and finite, got {self.weight}")

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSpec:
    """How a student is trained.

    steps [optimiser steps]
        Length of the training. Learning rates fall linearly to 0 over them.
    relation
        The window, and the relation loss.
    weight_decay
        Weight decay of AdamW.
    ema
        Decay of averaged weights, which the student has at the end; 0: none. Short trainings want 0.9 to 0.99.
    timestep_weights
        Of the squared errors of steps. ``uniform``: 1. ``sampler``: proportional to the mean squared change of the
        final sample for a unit of the mean squared error of that step's prediction, with mean 1 over the steps
        (`mpqsearch.sampling.prediction_gains`). Models that predict noise err most where there is little noise left,
        where it changes the sample least.
    clip_norm
        Largest norm of the gradient of all parameters together; 0: not clipped.
    precision
        ``float32`` or ``bfloat16``.
    check_every [optimiser steps]
        Distance between checks of the student by the measure given to `distill`; the student ends as it was at
        the check with the least, of those before the first step, every ``check_every`` steps and after the last. 0: no
        checks, it ends as the last step leaves it. The loss is of single predictions on the teacher's path, and can
        fall while the distribution of the samples moves away from the teacher's.
    checkpoint_every [optimiser steps]
        Distance between checkpoints, of which the last two are kept.
    explosion
        The loss at which training stops, in multiples of the largest loss of the first trajectory or of a hundredth of
        the mean square of the teacher's prediction, whichever is larger; during the first trajectory, of that mean
        square itself.
    """

    steps: int = 400
    relation: TRDSpec = field(default_factory=TRDSpec)
    weight_decay: float = 0.01
    ema: float = 0.0
    timestep_weights: str = "uniform"
    clip_norm: float = 1.0
    precision: str = "float32"
    check_every: int = 0
    checkpoint_every: int = 100
    explosion: float = 20.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS, "(distill.precision)")
        if self.timestep_weights not in TIMESTEP_WEIGHTS:
            raise UnknownNameError(
                "timestep weights", self.timestep_weights, TIMESTEP_WEIGHTS, "(distill.timestep_weights)"
            )
        if min(self.steps, self.checkpoint_every) < 1:
            raise ConfigError("distill: steps and checkpoint_every must be at least 1")
        if self.check_every < 0:
            raise ConfigError(f"distill: check_every must be at least 0 (0: no checks), got {self.check_every}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"distill: ema must lie in 0..1 (exclusive), got {self.ema}")
        if self.clip_norm < 0 or self.weight_decay < 0 or not self.explosion > 1:
            raise ConfigError("distill: clip_norm and weight_decay must be at least 0, explosion more than 1")

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data, without what a subclass adds."""
        return {f.name: getattr(self, f.name) for f in fields(DistillSpec)} | {"relation": self.relation.to_data()}

    def identity(self) -> dict[str, str]:
        """What the result depends on, as name and value: everything but when checkpoints are written."""
        flat = {k: v for k, v in self.to_data().items() if k not in ("relation", "checkpoint_every")}
        return {f"distill.{k}": str(v) for k, v in (flat | self.relation.to_data()).items()}
