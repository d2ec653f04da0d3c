"""Which device computes: ``auto``, or one by name, checked before anything long begins."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from mpqsearch.errors import ConfigError, UnknownNameError

DEVICES = ("auto", "cpu", "cuda", "mps")
"""Names of devices; ``cuda:1`` names the second graphics card."""


def resolve_device(name: str = "auto") -> torch.device:
    """The device that ``name`` means on this machine.

    ``auto`` is the first of CUDA, MPS and CPU that works here. Raises `ConfigError` in one line when the device that
    was asked for is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in DEVICES[1:] or (index and not (kind == "cuda" and index.isdecimal())):
        raise UnknownNameError("device", name, DEVICES, "cuda:1 is the second graphics card.")
    if kind == "cuda":
        _require_cuda(name, int(index or 0))
    if kind == "mps" and not _has_mps():
        raise ConfigError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} finds no MPS here: use 'auto'"
        )
    return torch.device(name)


def float_dtype(module: nn.Module) -> torch.dtype:
    """The type in which a module computes: of most of its floating-point weights, since some classes keep a few layers
    in float32; float32 when it has none."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def _require_cuda(name: str, index: int) -> None:
    """Raise `ConfigError` when there is no CUDA device of this index."""
    if not torch.cuda.is_available():
        reason = "no CUDA device" if torch.version.cuda else "no CUDA (it is a build for the CPU)"
        raise ConfigError(f"device {name!r} was asked for, but PyTorch {torch.__version__} finds {reason}: use 'auto'")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices, from 'cuda:0' on"
        )


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
