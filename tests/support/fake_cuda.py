"""Tensors that say that they lie on a GPU and have their values on the CPU: device mistakes show without a GPU.

    with fake_cuda():
        on_gpu(module); x = x.to("cuda"); ...

What fails on a GPU fails here: an operation on tensors of two devices (but for scalars, `copy_` and indices), and
`.numpy()` before `.cpu()`. Everything else gives the numbers of the CPU, to compare with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MIXING = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
}
"""Operations that take tensors of two devices."""


class FakeCudaTensor(Tensor):
    """A tensor off the CPU whose values are ``held``, on the CPU. It names its device ``meta``, which torch knows in
    every build and can differentiate; ``cuda`` stands for it where tensors are made and moved."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> FakeCudaTensor:
        made: FakeCudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="meta", requires_grad=False
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        plain = [t for t in tensors if not isinstance(t, FakeCudaTensor) and t.dim() > 0]
        if plain and name not in MIXING:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got some on the GPU and some on the CPU"
            )
        target = kwargs.pop("device", None)
        to_cpu = target is not None and torch.device(target).type == "cpu"
        if target is not None:
            kwargs["device"] = "cpu"
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.is_mutable and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            return args[0]  # in place
        if to_cpu:
            return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, result)
        return tree_map(lambda t: FakeCudaTensor(t) if isinstance(t, Tensor) else t, result)

    def __repr__(self, **_: Any) -> str:
        return f"FakeCudaTensor({self.held!r})"


def _held(value: Any) -> Any:
    return value.held if isinstance(value, FakeCudaTensor) else value


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str) and value.partition(":")[0] not in ("cuda", "meta"):
        return False
    return isinstance(value, str | torch.device) and torch.device(value).type in ("cuda", "meta")


class fake_cuda(TorchFunctionMode):  # noqa: N801 - used as a function
    """While it is entered, ``device="cuda"`` makes `FakeCudaTensor`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        moved = func in (Tensor.to, Tensor.cuda) and not isinstance(args[0], FakeCudaTensor)
        if moved and (func is Tensor.cuda or any(_is_cuda(a) for a in (*args[1:], kwargs.get("device")))):
            rest = [a for a in args[1:] if not _is_cuda(a)]
            kwargs.pop("device", None)
            plain = args[0].to(*rest, **kwargs) if (rest or kwargs) and func is Tensor.to else args[0]
            return FakeCudaTensor(plain.detach())
        if _is_cuda(kwargs.get("device")) and not any(isinstance(a, FakeCudaTensor) for a in tree_leaves(args)):
            return FakeCudaTensor(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


def on_gpu(module: nn.Module) -> nn.Module:
    """The same module, its parameters and buffers moved to the fake device in place."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                moved = nn.Parameter(FakeCudaTensor(parameter.detach()), requires_grad=parameter.requires_grad)
                owner._parameters[name] = moved
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = FakeCudaTensor(buffer.detach())
    return module
