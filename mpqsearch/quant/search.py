"""Range search: the shrink factor with the least error for every row under each of several quantizers.

On a GPU, and for small layers, torch tries every candidate. On a CPU the compiled `kernel` goes from coarse to fine:
the error as a function of the factor is smooth but for the noise of a finite row, so every ``1/COARSE``-th of the grid
is tried first, and then what lies beside a candidate that comes within `margin` of the best. The margin falls with the
length of the row, as the noise does; short rows are searched whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

log = logging.getLogger("mpqsearch")

BLOCK = 1 << 18
"""Weights handled at a time: large enough to amortise the calls, small enough to stay in cache."""

DEVICE_BLOCK = 1 << 24
"""The same on a device with memory of its own."""

COMPILED_WEIGHTS = 1 << 12
"""Weights of a layer from which the kernel is used; loading it takes longer than a few small layers."""

COARSE = 10
"""Intervals of the coarse grid."""

SHORT_ROW = 64
"""Rows up to this length are searched whole: their curves are noise, and cheap."""


def best_factors(rows: Tensor, widest: Tensor, zero: Tensor, top: Tensor, n: int, p: float) -> Tensor:
    """Shrink factor ``[C, K]`` with the least ``sum |w - w_q|**p``, out of ``1 - 0.8 i / n``, ``i < n``.

    rows
        ``[C, D]`` of any floating type; converted to float32 block by block.
    widest, zero, top
        ``[C, K]``: unshrunk scale, zero and largest code of K quantizers for each row.
    """
    factors = 1 - 0.8 * torch.arange(n, dtype=torch.float32, device=rows.device) / n
    search = _compiled_search if _takes_kernel(rows) else exhaustive_search
    return factors[search(rows, widest, zero, top, factors, p)]


def exhaustive_search(rows: Tensor, widest: Tensor, zero: Tensor, top: Tensor, factors: Tensor, p: float) -> Tensor:
    """Number of the best factor ``[C, K]``, by trying all of them in torch, on any device."""
    index = torch.empty(widest.shape, dtype=torch.int64, device=rows.device)
    for block in blocks(rows):
        part = rows[block].float()
        for k in range(widest.shape[1]):
            w, z, t = (x[block, k, None] for x in (widest, zero, top))
            index[block, k] = torch.stack([_error(part, w * f, z, t, p) for f in factors]).argmin(0)
    return index


def _error(rows: Tensor, scale: Tensor, zero: Tensor, top: Tensor, p: float) -> Tensor:
    units = torch.addcmul(zero, rows, scale.reciprocal())
    off = units.sub_(units.round().clamp_min_(0).minimum(top)).square_()
    if p != 2.0:
        off.log2_().mul_(p / 2).exp2_()  # vectorised on a CPU, which pow is not
    return off.sum(1) * scale[:, 0].pow(p)


def _compiled_search(rows: Tensor, widest: Tensor, zero: Tensor, top: Tensor, factors: Tensor, p: float) -> Tensor:
    from mpqsearch.quant import kernel

    n, width = len(factors), rows.shape[1]
    step = 1 if width <= SHORT_ROW else max(1, n // COARSE)
    index = torch.empty(widest.shape, dtype=torch.int64)
    scales, zeros, tops = (x.contiguous().numpy() for x in (widest, zero, top))
    grid, out = factors.numpy(), index.numpy()

    def work(b: slice) -> None:
        part = rows[b].detach().float().contiguous().numpy()
        kernel.search(part, scales[b], zeros[b], tops[b], grid, step, margin(width), float(p), out[b])

    _in_threads(work, rows)
    return index


def margin(fan_in: int) -> float:
    """How far above the best coarse candidate, relative, an interval is still searched further."""
    return float(0.02 + 1.5 / fan_in**0.5)


def square_errors(rows: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    """``sum (w_q - w)**2`` float32 ``[C, K]`` of each row under K quantizers (``[C, K]`` each), decoded as the forward
    pass does."""
    if _takes_kernel(rows):
        return _compiled_square_errors(rows, scale, zero, top)
    out = torch.empty(scale.shape, dtype=torch.float32, device=rows.device)
    for block in blocks(rows):
        part = rows[block].float()
        for k in range(scale.shape[1]):
            s, z, t = (x[block, k, None] for x in (scale, zero, top))
            codes = (part / s + z).round_().clamp_min_(0).minimum(t)
            out[block, k] = codes.sub_(z).mul_(s).sub_(part).square_().sum(1)
    return out


def _compiled_square_errors(rows: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    from mpqsearch.quant import kernel

    out = torch.empty(scale.shape, dtype=torch.float32)
    scales, zeros, tops = (x.contiguous().numpy() for x in (scale, zero, top))
    target = out.numpy()

    def work(b: slice) -> None:
        part = rows[b].detach().float().contiguous().numpy()
        kernel.square_errors(part, scales[b], zeros[b], tops[b], target[b])

    _in_threads(work, rows)
    return out


def _takes_kernel(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.numel() >= COMPILED_WEIGHTS and kernel_problem() == ""


@cache
def kernel_problem() -> str:
    """Why the compiled kernel cannot be used, such as a numba that does not know a newer numpy; empty when it can. Then
    torch searches, which takes many times as long; that is said once."""
    try:
        import_module("mpqsearch.quant.kernel")
    except (ImportError, AttributeError, OSError, SystemError) as error:
        log.warning("numba cannot be used (%s): weights are searched by torch, many times slower", error)
        return str(error)
    return ""


def _in_threads(work: Callable[[slice], None], rows: Tensor) -> None:
    """Call ``work`` on all blocks of rows, in as many threads as torch uses; the kernel releases the interpreter
    lock."""
    parts = list(blocks(rows))
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, parts):
            pass


def blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that hold about `BLOCK` weights each (`DEVICE_BLOCK` on a device)."""
    step = max(1, (BLOCK if rows.device.type == "cpu" else DEVICE_BLOCK) // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))
