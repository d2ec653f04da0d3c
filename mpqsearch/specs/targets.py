"""Export targets by name: a leaf that loads no exporter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpqsearch.errors import ConfigError, UnknownNameError

FULL = "full"
"""Stands for full precision where formats are named."""

TARGETS: dict[str, str | Callable[[], Any]] = {
    "neutral": "mpqsearch.export.neutral:NeutralTarget",
    "packed": "mpqsearch.export.packed:PackedTarget",
    "quanto": "mpqsearch.export.quanto:QuantoTarget",
    "torchao": "mpqsearch.export.torchao:TorchaoTarget",
    "gguf": "mpqsearch.export.gguf:GgufTarget",
    "comfyui": "mpqsearch.export.comfyui:ComfyTarget",
    "ctq": "mpqsearch.export.ctq:CtqTarget",
    "diffsynth": "mpqsearch.export.diffsynth:DiffSynthTarget",
    "cachedit": "mpqsearch.export.cachedit:CacheDitTarget",
    "sdcpp": "mpqsearch.export.sdcpp:SdcppTarget",
    "sdnq": "mpqsearch.export.sdnq:SdnqTarget",
    "autoround": "mpqsearch.export.autoround:AutoRoundTarget",
    "onnx": "mpqsearch.export.onnx:OnnxTarget",
    "mlx": "mpqsearch.export.mlx:MlxTarget",
    "coreml": "mpqsearch.export.coreml:CoreMLTarget",
}
"""Target name to its class, as ``module:class`` or a function that makes one; add to it with `register`."""


SOURCES: dict[str, str] = {
    name: f"mpqsearch.export.{name}:read" for name in (*(n for n in TARGETS if n not in ("packed", "onnx")), "modelopt")
}
"""What maps can be imported from, to the function that reads it, as ``module:function``."""


def register(name: str, make: str | Callable[[], Any]) -> None:
    """Add a target. Raises `ConfigError` when the name is taken."""
    if name in TARGETS:
        raise ConfigError(f"the export target {name!r} is registered already")
    TARGETS[name] = make


def check_targets(names: Sequence[str], key: str) -> None:
    """Raise `UnknownNameError`, naming the configuration's ``key``, for a target that does not exist."""
    for name in names:
        if name not in TARGETS:
            hint = f"({key}; `mpqsearch export --target auto` compares those that are installed)"
            raise UnknownNameError("export target", name, TARGETS, hint)
