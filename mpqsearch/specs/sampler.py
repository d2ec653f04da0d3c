"""How samples are drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mpqsearch.errors import ConfigError, UnknownNameError

SAMPLERS = ("ddim", "dpm++")
"""``ddim``: DDIM with eta 0. ``dpm++``: DPM-Solver++ (2M). Both deterministic given the starting noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """How samples are drawn. ``batch`` is part of it: the same samples in other batches differ by rounding (about
    1e-4)."""

    name: str = "ddim"
    steps: int = 10
    guidance: float = 1.0
    batch: int = 32

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise UnknownNameError("sampler", self.name, SAMPLERS)
        if not 1 <= self.steps <= 1000 or self.batch < 1:
            raise ConfigError(
                f"a sampler needs 1..1000 steps and a batch of at least 1, got steps={self.steps}, batch={self.batch}"
            )
        if not 0 <= self.guidance <= 100:
            raise ConfigError(f"guidance must lie in 0..100 (1: none), got {self.guidance}")

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)
