"""A model and the way it is run: the noun that every room works on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpqsearch.errors import NumericsError
from mpqsearch.models.calls import in_memory
from mpqsearch.models.runner import Runner, parts_of


@dataclass(frozen=True, kw_only=True, repr=False)
class Denoiser:
    """A model and its `Runner`.

    ``module`` is the denoiser, or a `Parts` of several. ``digest`` is the SHA-256 over names, dtypes, shapes and bytes
    of its weights, ``source`` what it was loaded from.
    """

    name: str
    module: nn.Module
    runner: Runner
    digest: str = ""
    source: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters and stored buffers, as they are in memory."""
        return sum(v.numel() * v.element_size() for v in self.module.state_dict().values())

    def with_module(self, module: nn.Module) -> Denoiser:
        """The same denoiser with other weights, as after quantization."""
        return replace(self, module=module)

    def __repr__(self) -> str:
        kinds = " + ".join(type(part).__name__ for part in parts_of(self.module).values())
        return f"Denoiser({self.name}: {kinds}, {self.size_bytes / 1e6:.2f} MB, {self.runner!r})"


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `NumericsError` when a weight holds NaN or infinity, or a buffer NaN; a mask may be infinite."""
    for key, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericsError(f"{name}: the weight {key!r} holds NaN or infinity. Repair or reload the checkpoint.")
    for key, buffer in module.named_buffers():
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            raise NumericsError(f"{name}: the buffer {key!r} holds NaN. Repair or reload the checkpoint.")


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over sorted (name, dtype, shape, bytes) of the state dict: independent of how it is stored."""
    total = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            total.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            total.update(in_memory(tensor).flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
