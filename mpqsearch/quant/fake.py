"""Fake quantization with gradients: one function, for weights (a row an output channel) and for inputs (a row a
sample)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpqsearch.quant.rows import stored_scale


class _FakeQuantize(torch.autograd.Function):
    """``y = s (clip(round(x / s + z)) - z)`` with straight-through and LSQ gradients (arXiv 1902.08153).

    With ``inside`` where the code was not clipped: ``dy/dx = inside``, ``dy/ds = (y - x inside) / s`` and ``dy/dz = -s
    (1 - inside)``; the last two are divided by the root of (weights in a row times largest code).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
        s, z, t = scale[:, None], zero[:, None], top[:, None]
        # The operations of `encode` and `decode`, in their order: codes and scales give these numbers back bit for bit.
        codes = torch.div(x, s).add_(z).round_()
        if not any(ctx.needs_input_grad):
            return codes.clamp_min_(0).minimum(t).sub_(z).mul_(s)
        clipped = codes.clamp_min(0).minimum(t)
        outside = codes.ne_(clipped)  # 0 or 1 in floating point: on a CPU several times as fast as booleans
        out = clipped.sub_(z).mul_(s)
        ctx.save_for_backward(outside, x, out, scale, top)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        outside, x, out, scale, top = ctx.saved_tensors
        gx = torch.addcmul(grad, grad, outside, value=-1)
        if not ctx.needs_input_grad[1]:
            return gx, None, None, None
        weight = (x.shape[1] * top).rsqrt()
        lost = grad - gx
        gz = lost.sum(1) * -scale * weight
        gs = lost.mul_(out).addcmul_(gx, out - x).sum(1) / scale * weight
        return gx, gs, gz, None


class _StraightThrough(torch.autograd.Function):
    """The second value, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return grads[0], None


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    """Rows ``[R, L]`` float32 as they are after quantization; ``scale``, ``zero`` and largest code ``top`` are
    ``[R]``."""
    out: Tensor = _FakeQuantize.apply(x, scale, zero, top)  # type: ignore[no-untyped-call]
    return out


def as_stored(scale: Tensor, zero: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Scales in half precision with a shared exponent and zero points as integers in the code range; gradients pass."""
    s: Tensor = _StraightThrough.apply(scale, stored_scale(scale.detach()))  # type: ignore[no-untyped-call]
    z: Tensor = _StraightThrough.apply(zero, zero.detach().round().clamp_min(0).minimum(top))  # type: ignore[no-untyped-call]
    return s, z
