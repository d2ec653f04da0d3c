"""Names of export targets and of what happens where one cannot hold a map; `mpqsearch.export` has the exporters."""

from __future__ import annotations

from collections.abc import Sequence

from mpqsearch.errors import UnknownNameError

TARGETS = (
    "neutral",
    "quanto",
    "torchao",
    "torchao-config",
    "gguf",
    "sdnq",
    "onnx",
    "autoround",
    "compressed-tensors",
    "modelopt",
    "inc",
    "hqq",
    "coreml",
    "mlx",
    "quark",
    "nncf",
    "aimet",
    "mixdq",
    "sdcpp",
    "comfyui",
)

ROUNDINGS = ("resolve", "up", "down", "error")
"""What happens to a width that a target cannot hold.

``resolve``: all widths of the target's choices are chosen anew so that the payload does not grow; ``up``: the next
width it has, so quality is kept and the size grows; ``down``: the previous one; ``error``: refuse.
"""


def check_targets(names: Sequence[str], key: str) -> None:
    """Raise `UnknownNameError`, naming the configuration's ``key``, for a target that does not exist."""
    for name in names:
        if name not in TARGETS:
            raise UnknownNameError("export target", name, TARGETS, f"({key})")
