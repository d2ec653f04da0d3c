"""Quantization of rows: one output channel a row, a width for every row, all rows in one vectorised pass.

Both schemes share one formula, ``w ~ scale * (code - zero)`` with ``code`` in ``[0, 2**bits - 1]``: ``zero`` is an
integer in the asymmetric scheme (MPQ-DM, section 3.1) and ``(2**bits - 1) / 2`` in the symmetric one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, QuantFormat
from mpqsearch.errors import NumericsError
from mpqsearch.quant.search import as_bits, best_factors, compiled, copied_as_bits, in_threads, shares, takes_arrays

ONE_BIT_RANGE = 2.5
"""Start of the range search of the one-bit symmetric scheme in root mean squares: the optimum is near 0.8 of them."""


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

    Every row is tried with the shrink factors ``1 - 0.8 i / n``, ``i < n`` (``fmt.n_candidates``; MPQ-DM's own grid
    runs in steps of 0.01 over 80 candidates, which is this one at ``n = 80``) and keeps the best under
    ``fmt.criterion``. Scales are rounded to what is stored. Raises `NumericsError` when a row is not finite.
    """
    rows = rows.detach().float()
    widths = torch.as_tensor(bits, dtype=torch.uint8, device=rows.device).expand(rows.shape[0]).clone()
    moments = row_moments(rows)
    if fmt.scheme == "auto":
        asymmetric, symmetric = (_fit(rows, widths, fmt, scheme, moments) for scheme in ("asymmetric", "symmetric"))
        errors = [(decode(encode(rows, q), q) - rows).square().sum(1) for q in (asymmetric, symmetric)]
        use = errors[1] < errors[0]
        return RowQuantizer(
            scale=torch.where(use, symmetric.scale, asymmetric.scale),
            zero=torch.where(use, symmetric.zero, asymmetric.zero),
            bits=widths,
        )
    return _fit(rows, widths, fmt, fmt.scheme, moments)


def encode(rows: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Integer codes ``uint8 [C, D]`` of ``rows``."""
    codes, top = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device), _top(quantizer.bits)

    def work(block: slice) -> None:
        found = rows[block].float() / quantizer.scale[block, None] + quantizer.zero[block, None]
        codes[block] = found.round_().clamp_min_(0).minimum(top[block, None])

    in_threads(work, rows)
    return codes


def decode(codes: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Weights ``float32 [C, D]`` of integer codes: the very numbers that the fake-quantized forward uses."""
    return (codes.float() - quantizer.zero[:, None]) * quantizer.scale[:, None]


def fit_grid(
    rows: Tensor, widths: Sequence[int], scheme: str, fmt: QuantFormat, moments: RowMoments | None = None
) -> RowQuantizer:
    """Search the range of every row at every width in one pass: scale, zero ``[C, W]`` and bits ``[W]``.

    Column ``w`` is what `fit_rows` gives at that width. ``scheme`` is ``asymmetric`` or ``symmetric``; the one of
    ``fmt`` is not used.
    """
    found = moments or row_moments(rows)
    bits = torch.tensor(widths, dtype=torch.uint8, device=rows.device)
    return _fit(rows, bits.expand(len(rows), -1), fmt, scheme, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMoments:
    """Least, largest and root mean square weight of every row, and its kurtosis (Gaussian: 3); float32 ``[C]`` each."""

    low: Tensor
    high: Tensor
    rms: Tensor
    kurtosis: Tensor


def row_moments(rows: Tensor) -> RowMoments:
    """Moments of rows ``[C, D]`` of any floating type, one cache-sized block at a time.

    Kurtosis is ``mean((w - mean)**4) / std**4`` with the unbiased standard deviation, as the code of MPQ-DM has it, and
    0 for a constant row. Raises `NumericsError` when a row is not finite.
    """
    out = [torch.empty(len(rows), device=rows.device) for _ in range(4)]
    kernels = compiled(rows)
    if kernels is not None:
        arrays = [x.numpy() for x in out]
        in_threads(
            lambda part: kernels.moments(as_bits(rows[part]), *(x[part] for x in arrays)),
            rows,
            None if copied_as_bits(rows) else shares(rows),
        )
    else:

        def work(block: slice) -> None:
            for target, value in zip(out, _moments_of(rows[block].float()), strict=True):
                target[block] = value

        in_threads(work, rows)
    bad = (~torch.isfinite(out[3])).nonzero()
    if len(bad):
        raise NumericsError(f"weight row {int(bad[0])} holds NaN or infinity and cannot be quantized")
    return RowMoments(low=out[0], high=out[1], rms=out[2], kurtosis=out[3])


def _moments_of(rows: Tensor) -> tuple[Tensor, ...]:
    double = torch.float32 if rows.device.type == "mps" else torch.float64  # no float64 there
    wide = rows.to(double)
    squared = (wide - wide.mean(1, keepdim=True)).square_()
    n = rows.shape[1]
    variance = squared.sum(1) / max(n - 1, 1)
    fourth = squared.square_().mean(1)
    real = variance > 1e-30
    kurtosis = torch.where(real, fourth / torch.where(real, variance, 1.0).square(), 0.0)
    rms = wide.square_().mean(1).sqrt()
    kurtosis = torch.where(torch.isfinite(rms), kurtosis, torch.nan)
    return rows.amin(1), rows.amax(1), rms.float(), kurtosis.float()


def _fit(rows: Tensor, bits: Tensor, fmt: QuantFormat, scheme: str, moments: RowMoments) -> RowQuantizer:
    """Quantizers of one scheme; ``bits`` is ``[C]`` or ``[C, K]`` for K quantizers a row."""
    top = _top(bits)
    low, high, rms = (x.reshape(-1, *(1,) * (bits.dim() - 1)) for x in (moments.low, moments.high, moments.rms))
    if scheme == "asymmetric":
        low, high = low.clamp_max(0), high.clamp_min(0)
        widest = (high - low) / top
        zero = (-low / widest.clamp_min(torch.finfo(torch.float32).tiny)).round().minimum(top)
    else:
        reach = torch.maximum(-low, high).expand(bits.shape)
        reach = torch.where(bits == 1, reach.minimum(ONE_BIT_RANGE * rms), reach)
        widest = 2 * reach / top
        zero = top / 2
    dead = widest <= 0
    widest = torch.where(dead, 1.0, widest)  # an all-zero row: any scale gives zero in the asymmetric scheme
    if scheme == "symmetric":
        zero = torch.where(dead, 0.0, zero)  # the symmetric levels have no zero: such a row falls back to code 0 = 0.0
    if fmt.criterion == "minmax":
        return RowQuantizer(scale=stored_scale(widest), zero=zero, bits=bits)
    p = 2.0 if fmt.criterion == "mse" else fmt.p
    grid = [x.reshape(len(rows), -1) for x in (widest, zero, top)]
    factor = best_factors(rows, grid[0], grid[1], grid[2], fmt.n_candidates, p)
    return RowQuantizer(scale=stored_scale(widest * factor.reshape(widest.shape)), zero=zero, bits=bits)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored: half precision times one power of two a layer, which puts the largest just below
    2**16.

    ``scale`` is ``[C]``, or ``[C, K]`` for K quantizers of a layer, each with a power of its own.
    Rows down to 2**-29 of the largest keep 11 significant bits, whatever the magnitude of the layer.
    """
    if scale.device.type == "cpu" and takes_arrays(
        scale
    ):  # small and called often: a fifth of the time of torch's operations
        values = scale.detach().numpy()
        unit = np.ldexp(np.float32(1), np.maximum(np.frexp(values.max(0))[1] - 16, -126))
        half = np.minimum(np.maximum(values / unit, np.float32(2.0**-24)), np.float32(65504.0)).astype(np.float16)
        return torch.from_numpy(half.astype(np.float32) * unit)
    exponent = torch.exp2(scale.amax(0).log2().floor() - 15).clamp_min(2.0**-126)
    half = (scale / exponent).clamp(2.0**-24, 65504.0).half()
    return half.float() * exponent


def _top(bits: Tensor) -> Tensor:
    return torch.exp2(bits.float()) - 1
