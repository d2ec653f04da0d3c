"""Recorded calls in the place of a pipeline that cannot be run here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from mpqsearch.errors import ConfigError, ModelError
from mpqsearch.models.calls import Call, Calls

EXAMPLES = 4
"""Recorded calls on which the layers of a model are looked for."""


class RecordedRunner:
    """Calls of a pipeline's own run (`mpqsearch.models.capture`, ``mpqsearch record``): replayed, never sampled."""

    batch = 1

    def __init__(self, calls: Calls) -> None:
        if not len(calls):
            raise ConfigError("there is no recorded call to measure with")
        self.calls = calls

    @property
    def identity(self) -> dict[str, str]:
        """Digest of the calls."""
        return {"runner": f"{len(self.calls)} recorded calls", "calls": self.calls.digest}

    def run(self, module: nn.Module, seeds: Sequence[int], **_: Any) -> NoReturn:
        """Raise `ModelError`."""
        self.refuse("samples", module)

    def refuse(self, what: str, module: nn.Module) -> NoReturn:
        """Raise `ModelError`: ``what`` needs samples."""
        raise ModelError(
            f"{what} was asked for, but {type(module).__name__} is known from {len(self.calls)} recorded calls of its "
            "pipeline only. With these there are layers, profile, allocate, quantize, import and export. To sample, "
            "give the pipeline's folder, or export the map and sample in the pipeline itself."
        )

    def encode(self, module: nn.Module, seeds: Sequence[int], *, batch: int = 0) -> None:
        """Nothing to do."""

    def labels(self, seeds: Sequence[int]) -> tuple[None, ...]:
        """Nothing is known of them."""
        return (None,) * len(seeds)

    def examples(self, module: nn.Module) -> list[Call]:
        """A few of the calls, spread over them."""
        return list(self.calls[:: max(1, len(self.calls) // EXAMPLES)][:EXAMPLES])

    def picture(self, module: nn.Module) -> None:
        """There is none."""

    def files(self) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def calls_per_run(self, module: nn.Module) -> int:
        """Their number."""
        return len(self.calls)

    def __repr__(self) -> str:
        return f"{len(self.calls)} recorded calls"
