"""Tensors that claim to be on another device than the CPU, for machines without a GPU.

Their numbers are on the CPU, behind a device that torch knows without a driver (``meta``). Every operation is computed,
so that code which looks at numbers takes its usual way (`FakeTensorMode` has no numbers to look at). What fails on a
GPU fails here: operations that mix devices, and ``.numpy()`` of a tensor on the device.

    with fake_cuda():
        module = on_gpu(module)
        module(torch.zeros(2, 3, device="cuda"))
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")

_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
"""Operations that take indices on the CPU."""

_CROSSING = {_aten.copy_.default, _aten._to_copy.default}


class FakeCudaTensor(Tensor):
    """A tensor whose numbers, ``elem``, are on the CPU."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> Self:
        """A tensor of the same geometry on the device."""
        made: Self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=DEVICE,
            requires_grad=elem.requires_grad,
        )
        made.elem = elem.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        _check(func, args, kwargs)
        leaves = tree_map(_unwrapped, (args, kwargs))
        inner = leaves[1]
        stays = True
        if inner.get("device") is not None:
            stays = torch.device(inner["device"]).type != "cpu"
            inner["device"] = torch.device("cpu")
        if func is _aten.copy_.default and not isinstance(args[0], FakeCudaTensor):
            stays = False
        out = func(*leaves[0], **inner)
        if func is _aten._local_scalar_dense.default or not stays:
            return args[0] if func is _aten.copy_.default else out
        wrapped = tree_map(_wrapped, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


class fake_cuda(TorchFunctionMode):  # noqa: N801 - used as a function
    """While it is open, any device but the CPU gives tensors that claim to be on `DEVICE`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return _moved(args[0], DEVICE)
        if func is Tensor.to:
            return _moved(args[0], *args[1:], **kwargs)
        if func in (Tensor.__setitem__, torch.where):  # torch puts their numbers on the device, where nothing is
            dtype = next((a.dtype for a in args if isinstance(a, FakeCudaTensor) and a.dtype != torch.bool), None)
            first = 2 if func is Tensor.__setitem__ else 1
            values = [torch.tensor(a, dtype=dtype) if isinstance(a, (int, float)) else a for a in args[first:]]
            args = (*args[:first], *values)
        if func is Tensor.tolist and isinstance(args[0], FakeCudaTensor):
            return args[0].elem.tolist()
        device = kwargs.get("device")
        if device is None or torch.device(device).type == "cpu":
            return func(*args, **kwargs)
        if args and isinstance(args[0], FakeCudaTensor):
            return (
                _moved(args[0], kwargs["dtype"])
                if func is torch.as_tensor and kwargs.get("dtype")
                else (args[0] if func is torch.as_tensor else func(*args, **kwargs))
            )
        kwargs["device"] = torch.device("cpu")
        return tree_map(_wrapped, func(*args, **kwargs))


def on_gpu(value: Any) -> Any:
    """A copy of a module, or a tensor, on the device that is not there."""
    if isinstance(value, Tensor):
        return FakeCudaTensor(value.detach().clone())
    module: nn.Module = copy.deepcopy(value)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(on_gpu(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_gpu(buffer)
    return module


def _moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` between the CPU and the device."""
    where = next((v for v in (*args, *kwargs.values()) if isinstance(v, (torch.device, str, Tensor))), None)
    dtype = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.dtype)), None)
    if isinstance(where, Tensor):
        where, dtype = where.device, where.dtype
    device = x.device if where is None else torch.device(where)
    device = device if device.type == "cpu" else DEVICE
    if x.device.type == device.type:
        return x if dtype is None or x.dtype == dtype else _Cast.apply(x, dtype)  # type: ignore[no-any-return, no-untyped-call]
    return _Move.apply(x, device.type, dtype or x.dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return FakeCudaTensor(x.elem.to(dtype)) if isinstance(x, FakeCudaTensor) else x.type(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _moved(grads[0], ctx.dtype), None


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
        ctx.back = x.device.type, x.dtype
        return FakeCudaTensor(x.detach().type(dtype).clone()) if device != "cpu" else x.elem.type(dtype).clone()  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _moved(grads[0], torch.device(ctx.back[0]), ctx.back[1]), None, None


def _check(func: Any, args: Any, kwargs: Any) -> None:
    if func in _CROSSING:
        return
    values = args[:1] + args[2:] if func in _INDEXED else args
    tensors = [v for v in tree_flatten((values, kwargs))[0] if isinstance(v, Tensor)]
    if len({isinstance(t, FakeCudaTensor) for t in tensors if t.dim()}) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cpu and {DEVICE}")


def _unwrapped(x: Any) -> Any:
    if isinstance(x, Tensor) and not isinstance(x, FakeCudaTensor) and x.device == DEVICE:
        return torch.zeros(x.shape, dtype=x.dtype)  # the 0 of ``where(condition, gradient, 0)`` in a backward pass
    return x.elem if isinstance(x, FakeCudaTensor) else x


def _wrapped(x: Any) -> Any:
    return FakeCudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeCudaTensor) else x
