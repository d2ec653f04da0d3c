"""How samples are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mpqsearch.errors import ConfigError, UnknownNameError

SAMPLERS = ("ddim", "dpm++")
"""``ddim``: DDIM with eta 0. ``dpm++``: DPM-Solver++ (2M). Both deterministic given the starting noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """How samples are drawn.

    name
        Sampler of models that are no pipeline: ``ddim`` or ``dpm++``. A pipeline runs with its own scheduler.
    steps [denoising steps]
        Not set: the pipeline's own number; 10 for models that are no pipeline. Example: ``20``.
    guidance
        Guidance scale, 1: none. Not set: the pipeline's own; none for models that are no pipeline. Example: ``7.5``.
    batch [samples]
        Samples at a time. The same samples in other batches differ by rounding (about 1e-4).
    call
        Any further arguments of the pipeline's ``__call__``. Example: ``{height = 512, width = 512}``.
    """

    name: str = "ddim"
    steps: int | None = None
    guidance: float | None = None
    batch: int = 32
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise UnknownNameError("sampler", self.name, SAMPLERS)
        if (self.steps is not None and not 1 <= self.steps <= 1000) or self.batch < 1:
            raise ConfigError(
                f"a sampler needs 1..1000 steps and a batch of at least 1, got steps={self.steps}, batch={self.batch}"
            )
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise ConfigError(f"guidance must lie in 0..100 (1: none), got {self.guidance}")

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)
