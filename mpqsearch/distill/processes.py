"""One process, or several under ``accelerate launch``.

The student is not wrapped: a window runs it several times before one backward pass, and models of the user's are called
by methods of their own. Gradients are averaged over processes after the backward pass instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpqsearch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Processes:
    """``rank`` of ``world`` processes."""

    rank: int = 0
    world: int = 1
    accelerator: Any = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        """True in the process that writes files."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over processes, in one exchange on the device of the first."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.flatten().float().to(tensors[0].device) for t in tensors])
        mean = self.accelerator.reduce(flat, reduction="mean")
        for tensor, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """True when ``flag`` is set in any process."""
        if self.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor([float(flag)], device=device), reduction="sum") > 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()


def processes() -> Processes:
    """The processes that a launcher started (``WORLD_SIZE``), or this one alone. Raises `ConfigError` when accelerate
    is missing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ConfigError("training on several processes needs accelerate: pip install accelerate") from error
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator)
