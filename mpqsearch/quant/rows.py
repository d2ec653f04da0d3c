"""Quantization of rows: one output channel a row, a width for every row, all rows in one vectorised pass.

Both codebooks share one formula, ``w ~ scale * (code - zero)`` with ``code`` in ``[0, 2**bits - 1]``: ``zero`` is an integer in the
affine codebook (MPQ-DM, section 3.1) and ``(2**bits - 1) / 2`` in the mid-rise one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, QuantFormat
from mpqsearch.errors import NumericsError

BLOCK = 1 << 18
"""Weights handled at a time by the range search: large enough to amortise the calls, small enough to stay in cache."""

ONE_BIT_RANGE = 2.5
"""Start of the range search of the one-bit mid-rise codebook in root mean squares: the optimum is near 0.8 of them."""


FINALISTS = 3
"""Candidates of the range search that are compared again in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowQuantizer:
    """Scale, zero and width of every row: float32 ``[C]``, float32 ``[C]``, uint8 ``[C]``."""

    scale: Tensor
    zero: Tensor
    bits: Tensor


def rows_of(weight: Tensor, layer: LayerSpec) -> Tensor:
    """The weight as ``[output channels, fan-in]``; transposed convolutions keep their groups apart."""
    if not layer.kind.startswith("ConvTranspose"):
        return weight.flatten(1)
    g = layer.groups
    c_in, c_out_group = weight.shape[:2]
    grouped = weight.reshape(g, c_in // g, c_out_group, -1).transpose(1, 2)
    return grouped.reshape(g * c_out_group, -1)


def weight_of(rows: Tensor, layer: LayerSpec) -> Tensor:
    """Inverse of `rows_of`."""
    if not layer.kind.startswith("ConvTranspose"):
        return rows.reshape(layer.weight_shape)
    g = layer.groups
    c_in, c_out_group = layer.weight_shape[:2]
    grouped = rows.reshape(g, c_out_group, c_in // g, -1).transpose(1, 2)
    return grouped.reshape(layer.weight_shape)


def fit_rows(rows: Tensor, bits: Tensor | int, fmt: QuantFormat) -> RowQuantizer:
    """Search the range of every row.

    rows
        ``[C, D]``, float32, finite.
    bits
        One width or a width per row, 1..8.

    Every row is tried with the shrink factors ``1 - 0.8 i / n``, ``i < n`` (``fmt.n_candidates``; MPQ-DM's own grid runs in steps
    of 0.01 over 80 candidates, which is this one at ``n = 80``) and keeps the best under ``fmt.criterion``. Scales are rounded to
    what is stored. Raises `NumericsError` when a row is not finite.
    """
    rows = rows.detach().float()
    widths = torch.as_tensor(bits, dtype=torch.uint8).expand(rows.shape[0]).clone()
    finite = torch.isfinite(rows).all(1)
    if not bool(finite.all()):
        raise NumericsError(f"weight row {int((~finite).nonzero()[0])} holds NaN or infinity and cannot be quantized")
    if fmt.codebook == "auto":
        affine, midrise = (_fit(rows, widths, fmt, codebook) for codebook in ("affine", "midrise"))
        errors = [(decode(encode(rows, q), q) - rows).square().sum(1) for q in (affine, midrise)]
        use = errors[1] < errors[0]
        return RowQuantizer(
            scale=torch.where(use, midrise.scale, affine.scale), zero=torch.where(use, midrise.zero, affine.zero), bits=widths
        )
    return _fit(rows, widths, fmt, fmt.codebook)


def encode(rows: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Integer codes ``uint8 [C, D]`` of ``rows``."""
    codes = rows.float() / quantizer.scale[:, None] + quantizer.zero[:, None]
    return codes.round_().clamp_min_(0).minimum(_top(quantizer.bits)[:, None]).to(torch.uint8)


def decode(codes: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Weights ``float32 [C, D]`` of integer codes: the very numbers that the fake-quantized forward uses."""
    return (codes.float() - quantizer.zero[:, None]) * quantizer.scale[:, None]


def _fit(rows: Tensor, bits: Tensor, fmt: QuantFormat, codebook: str) -> RowQuantizer:
    top = _top(bits)
    if codebook == "affine":
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        widest = (high - low) / top
        zero = (-low / widest.clamp_min(torch.finfo(torch.float32).tiny)).round().minimum(top)
    else:
        reach = rows.abs().amax(1)
        rms = rows.square().mean(1).sqrt()
        reach = torch.where(bits == 1, reach.minimum(ONE_BIT_RANGE * rms), reach)
        widest = 2 * reach / top
        zero = top / 2
    dead = widest <= 0
    widest = torch.where(dead, 1.0, widest)  # an all-zero row: any scale gives zero in the affine codebook
    if codebook == "midrise":
        zero = torch.where(dead, 0.0, zero)  # the mid-rise levels have no zero: such a row falls back to code 0 = 0.0
    scale = widest if fmt.criterion == "minmax" else widest * _best_shrink(rows, widest, zero, top, fmt)
    return RowQuantizer(scale=stored_scale(scale), zero=zero, bits=bits)


def _best_shrink(rows: Tensor, widest: Tensor, zero: Tensor, top: Tensor, fmt: QuantFormat) -> Tensor:
    """The shrink factor ``[C]`` with the least error, out of the grid."""
    p = 2.0 if fmt.criterion == "mse" else fmt.p
    factors = 1 - 0.8 * torch.arange(fmt.n_candidates, dtype=torch.float32) / fmt.n_candidates
    best = torch.empty_like(widest)
    for block in _blocks(rows):
        best[block] = factors[_search_block(rows[block], widest[block], zero[block], top[block], factors, p)]
    return best


def _search_block(rows: Tensor, widest: Tensor, zero: Tensor, top: Tensor, factors: Tensor, p: float) -> Tensor:
    """Index of the best factor for each row of a cache-sized block.

    All factors in float32, in units of the scale and in place; then the best few again in float64, since rounding may reverse
    candidates that differ by a millionth.
    """
    errors = torch.empty(len(factors), len(rows))
    zero_column, top_column = zero[:, None], top[:, None]
    at_once = max(1, BLOCK // rows.numel())  # small layers take many candidates in one call
    for start in range(0, len(factors), at_once):
        scale = widest * factors[start : start + at_once, None]  # [k, C]
        units = torch.addcmul(zero_column, rows, scale.reciprocal()[:, :, None])
        nearest = torch.round(units).clamp_min_(0)
        torch.minimum(nearest, top_column, out=nearest)
        errors[start : start + at_once] = _power_sum(units.sub_(nearest), p) * scale.pow(p)
    few = errors.topk(min(FINALISTS, len(factors)), dim=0, largest=False).indices.sort(dim=0).values
    exact = torch.stack([_exact_error(rows, widest.double() * factors[i], zero, top, p) for i in few])
    return few.gather(0, exact.argmin(0, keepdim=True))[0]


def _exact_error(rows: Tensor, scale: Tensor, zero: Tensor, top: Tensor, p: float) -> Tensor:
    units = torch.addcmul(zero[:, None].double(), rows.double(), scale.reciprocal()[:, None])
    units -= units.round().clamp_min_(0).minimum(top[:, None].double())
    return _power_sum(units, p) * scale.pow(p)


def _power_sum(x: Tensor, p: float) -> Tensor:
    """``sum |x|**p`` over the last axis, in place. Through log2 and exp2, which are vectorised where ``pow`` is not."""
    x.square_()
    if p != 2.0:
        x.log2_().mul_(p / 2).exp2_()
    return x.sum(-1)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored: half precision times one power of two a layer, which puts the largest just below 2**16.

    Rows down to 2**-29 of the largest keep 11 significant bits, whatever the magnitude of the layer.
    """
    exponent = torch.exp2(scale.amax().log2().floor() - 15).clamp_min(2.0**-126)
    half = (scale / exponent).clamp(2.0**-24, 65504.0).half()
    return half.float() * exponent


def _top(bits: Tensor) -> Tensor:
    return torch.exp2(bits.float()) - 1


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))
