"""What hooks on a layer share: which argument is its input, and whether it computes what its kind computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PLAIN_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call of a layer, by position or by keyword."""
    x: Tensor = args[0] if args else kwargs[_input_name(kwargs)]
    return x


def _input_name(kwargs: Mapping[str, Any]) -> str:
    return "input" if "input" in kwargs else next(iter(kwargs))


def with_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another input."""
    if args:
        return (x, *args[1:]), dict(kwargs)
    return args, {**kwargs, _input_name(kwargs): x}


@torch.no_grad()
def uses_weight_as_it_is(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> bool:
    """Whether a layer's output is its weight and bias applied to its input, as torch's own layer of that kind does.

    False for layers that scale their weight as they run (equalised learning rate, demodulation): what an error of the
    weight does to their output is not known from the input alone.
    """
    base = next((kind for kind in PLAIN_LAYERS if isinstance(module, kind)), None)
    if base is None or not isinstance(output, Tensor):
        return False
    if type(module).forward is base.forward and "forward" not in vars(module):
        return True
    plain: Tensor = base.forward(module, layer_input(args, kwargs))  # type: ignore[arg-type]
    if plain.shape != output.shape:
        return False
    return bool((plain - output).float().norm() <= 1e-2 * output.float().norm())
