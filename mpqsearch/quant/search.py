"""Range search: the shrink factor with the least error for every row and column of a grid of quantizers.

The error as a function of the factor is smooth but for the noise of a finite row, so the search goes from coarse to
fine: every ``1/COARSE``-th of the grid first, then all candidates beside a coarse one that comes within `margin` of the
best. The margin falls with the length of the row, as the noise does; short rows are searched exhaustively. A compiled
kernel (numba, optional) keeps a row in the first-level cache through all its candidates, refines in two steps, and
gives a candidate up once its partial sum says that it is not the best; torch does without the last two, in cache-sized
blocks, on any device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from mpqsearch.errors import ConfigError

Backend = Literal["auto", "torch", "numba"]

BLOCK = 1 << 18
"""Weights handled at a time: large enough to amortise the calls, small enough to stay in cache."""

DEVICE_BLOCK = 1 << 24
"""The same on a device with memory of its own."""

COMPILED_WEIGHTS = 1 << 12
"""Weights of a call from which ``auto`` uses the compiled kernel. By the call alone, so that a layer's choice has no
history."""

COARSE = 10
"""Intervals of the coarse grid."""

SHORT_ROW = 64
"""Rows up to this length are searched exhaustively: their curves are noise, and cheap."""

FINALISTS = 3
"""Candidates that torch compares again in float64."""

_backend: list[Backend] = ["auto"]


def use_backend(name: Backend) -> Backend:
    """Choose the search of this process, ``auto``, ``torch`` or ``numba``; returns the previous choice.

    Raises `ConfigError` when the name is unknown, or numba is asked for and not installed.
    """
    if name not in ("auto", "torch", "numba"):
        raise ConfigError(f"unknown backend {name!r} of the range search. Known: auto, torch, numba.")
    if name == "numba" and not _numba_installed():
        raise ConfigError("the backend 'numba' of the range search needs numba: pip install 'mpqsearch[fast]'")
    previous, _backend[0] = _backend[0], name
    return previous


def best_factors(
    rows: Tensor, widest: Tensor, zero: Tensor, top: Tensor, n: int, p: float, *, exhaustive: bool = False
) -> Tensor:
    """Shrink factor ``[C, K]`` with the least ``sum |w - w_q|**p``, out of ``1 - 0.8 i / n``, ``i < n``.

    rows
        ``[C, D]`` of any floating type; converted to float32 block by block.
    widest, zero, top
        ``[C, K]``: unshrunk scale, zero and largest code of K quantizers for each row.
    exhaustive
        Try every candidate: the oracle of the coarse-to-fine search.
    """
    factors = 1 - 0.8 * torch.arange(n, dtype=torch.float32, device=rows.device) / n
    step = 1 if exhaustive or rows.shape[1] <= SHORT_ROW else max(1, n // COARSE)
    kernels = compiled(rows)
    if kernels is None:
        index = torch.empty(widest.shape, dtype=torch.int64, device=rows.device)
        for block in blocks(rows):
            part = rows[block].float()
            for k in range(widest.shape[1]):
                column = widest[block, k], zero[block, k], top[block, k]
                index[block, k] = _search_block(part, *column, factors, p, step)
        return factors[index]
    index = torch.empty(widest.shape, dtype=torch.int64)
    run = kernels.search(p)
    width = margin(rows.shape[1])
    arrays = [x.contiguous().numpy() for x in (widest, zero, top)]
    grid, out = factors.numpy(), index.numpy()
    in_threads(
        lambda block: run(as_array(rows[block]), *(x[block] for x in arrays), grid, step, width, out[block]), rows
    )
    return factors[index]


def square_errors(rows: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    """``sum (w_q - w)**2`` float32 ``[C, K]`` of each row under K quantizers (``[C, K]`` each), decoded as the forward
    pass does."""
    kernels = compiled(rows)
    out = torch.empty(scale.shape, dtype=torch.float32, device=rows.device)
    if kernels is None:
        for block in blocks(rows):
            part = rows[block].float()
            for k in range(scale.shape[1]):
                s, z, t = (x[block, k, None] for x in (scale, zero, top))
                codes = (part / s + z).round_().clamp_min_(0).minimum(t)
                out[block, k] = codes.sub_(z).mul_(s).sub_(part).square_().sum(1)
        return out
    arrays = [x.contiguous().numpy() for x in (scale, zero, top)]
    target = out.numpy()
    in_threads(
        lambda block: kernels.square_errors(as_array(rows[block]), *(x[block] for x in arrays), target[block]), rows
    )
    return out


def margin(fan_in: int) -> float:
    """How far above the best coarse candidate, relative, an interval is still looked into."""
    return float(0.02 + 1.5 / fan_in**0.5)


def compiled(rows: Tensor, *, times: int = 1) -> ModuleType | None:
    """The compiled kernels when this call should use them, else None. ``times``: what they save for each weight, in
    units of a range search."""
    if _backend[0] == "torch" or rows.device.type != "cpu":
        return None
    if _backend[0] == "auto" and (rows.numel() * times < COMPILED_WEIGHTS or not _numba_installed()):
        return None
    return importlib.import_module("mpqsearch.quant.kernels")


@functools.cache
def _numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None  # looks through every folder where it is not


def takes_arrays(x: Tensor) -> bool:
    """Whether numpy can read this float32 tensor: not while something traces the model."""
    return x.dtype == torch.float32 and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def takes_compiled(x: Tensor) -> bool:
    """Whether the compiled fake quantization takes this tensor; of any size, since a call costs no more than a few of
    torch's operations."""
    return compiled(x, times=COMPILED_WEIGHTS) is not None and takes_arrays(x)


def run_in_shares(kernel: str, by_row: Sequence[Tensor], for_all: Sequence[Any]) -> None:
    """Run a compiled kernel over rows, in as many threads as torch uses where there is enough to do.

    ``by_row`` are tensors without a graph with a row (or a number) for each row; ``for_all`` is what every share is
    given whole. The last argument is the number of the first row.
    """
    run = _kernel(kernel)
    arrays = [x.numpy() for x in by_row]
    if by_row[0].numel() < 2 * BLOCK:
        run(*arrays, *for_all, 0)
        return
    in_threads(lambda p: run(*(a[p] for a in arrays), *for_all, p.start), by_row[0], shares(by_row[0]))


@functools.cache
def _kernel(name: str) -> Callable[..., None]:
    found: Callable[..., None] = getattr(importlib.import_module("mpqsearch.quant.kernels"), name)
    return found


def as_array(rows: Tensor) -> Any:
    """A block of rows as the kernels take it: float32, contiguous."""
    return rows.detach().float().contiguous().numpy()


def copied_as_bits(rows: Tensor) -> bool:
    """Whether `as_bits` takes a copy of these rows."""
    return not rows.is_contiguous() or rows.dtype not in (torch.bfloat16, torch.float32)


def as_bits(rows: Tensor) -> Any:
    """The bits of a block of rows as int16 (bfloat16) or int32 (all others, as float32): no copy where there need be
    none."""
    rows = rows.detach().contiguous()
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows.float().view(torch.int32)).numpy()


def in_threads(work: Callable[[slice], Any], rows: Tensor, parts: Sequence[slice] | None = None) -> None:
    """Call ``work`` on all parts of ``rows`` (by default its cache-sized blocks), in as many threads as torch uses.

    Kernels release the interpreter lock. ``work`` must not call this again.
    """
    parts = list(blocks(rows)) if parts is None else parts
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1 or rows.device.type != "cpu":
        for part in parts:
            work(part)
        return
    for _ in _pool(os.getpid(), torch.get_num_threads()).map(work, parts):
        pass


@functools.lru_cache(maxsize=2)
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that are kept, since starting them takes as long as a small layer; a forked process has its own."""
    return ThreadPoolExecutor(threads, "mpqsearch-rows")


def shares(rows: Tensor) -> list[slice]:
    """Consecutive slices of rows, one for each thread of torch, of at least `BLOCK` weights where there are so many.

    For kernels that pass over a row once and need no block that stays in cache.
    """
    n = max(1, min(torch.get_num_threads(), rows.numel() // BLOCK, len(rows)))
    edges = [len(rows) * i // n for i in range(n + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that hold about `BLOCK` weights each."""
    step = max(1, (BLOCK if rows.device.type == "cpu" else DEVICE_BLOCK) // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _search_block(
    rows: Tensor, widest: Tensor, zero: Tensor, top: Tensor, factors: Tensor, p: float, step: int
) -> Tensor:
    """Index of the best factor for each row of a cache-sized block.

    All factors in float32, in units of the scale and in place; then the best few again in float64, since rounding may
    reverse candidates that differ by a millionth.
    """
    n = len(factors)
    at_once = max(
        1, (BLOCK if rows.device.type == "cpu" else DEVICE_BLOCK) // rows.numel()
    )  # small blocks take many candidates in one call
    if step == 1 or at_once > COARSE:
        errors = torch.empty(n, len(rows), device=rows.device)
        for start in range(0, n, at_once):
            part = slice(start, start + at_once)
            errors[part] = _errors(rows, widest * factors[part, None], zero, top, p)
    else:
        errors = _coarse_to_fine(rows, widest, zero, top, factors, p, step)
    few = errors.topk(min(FINALISTS, n), dim=0, largest=False).indices.sort(dim=0).values
    exact = torch.stack([_exact_error(rows, widest, factors[i], zero, top, p) for i in few])
    return few.gather(0, exact.argmin(0, keepdim=True))[0]


def _coarse_to_fine(
    rows: Tensor, widest: Tensor, zero: Tensor, top: Tensor, factors: Tensor, p: float, step: int
) -> Tensor:
    """Errors ``[n, C]`` of the candidates that are looked into, infinity for the others."""
    n = len(factors)
    errors = torch.full((n, len(rows)), torch.inf, device=rows.device)
    coarse = sorted({*range(0, n, step), n - 1})
    for i in coarse:
        errors[i] = _errors(rows, (widest * factors[i])[None], zero, top, p)[0]
    near = errors[coarse] <= errors[coarse].amin(0) * (1 + margin(rows.shape[1]))
    for j, (low, high) in enumerate(pairwise(coarse)):
        chosen = (near[j] | near[j + 1]).nonzero()[:, 0]
        if not len(chosen):
            continue
        part = rows if len(chosen) == len(rows) else rows[chosen]
        w, z, t = widest[chosen], zero[chosen], top[chosen]
        for i in range(low + 1, high):
            errors[i, chosen] = _errors(part, (w * factors[i])[None], z, t, p)[0]
    return errors


def _errors(rows: Tensor, scale: Tensor, zero: Tensor, top: Tensor, p: float) -> Tensor:
    """Error ``[k, C]`` of each row at k scales ``[k, C]``."""
    units = torch.addcmul(zero[:, None], rows, scale.reciprocal()[:, :, None])
    nearest = torch.round(units).clamp_min_(0)
    torch.minimum(nearest, top[:, None], out=nearest)
    return _power_sum(units.sub_(nearest), p) * scale.pow(p)


def _exact_error(rows: Tensor, widest: Tensor, factor: Tensor, zero: Tensor, top: Tensor, p: float) -> Tensor:
    if rows.device.type == "mps":  # no float64 there
        return _errors(rows, (widest * factor)[None], zero, top, p)[0]
    scale = widest.double() * factor
    units = torch.addcmul(zero[:, None].double(), rows.double(), scale.reciprocal()[:, None])
    units -= units.round().clamp_min_(0).minimum(top[:, None].double())
    return _power_sum(units, p) * scale.pow(p)


def _power_sum(x: Tensor, p: float) -> Tensor:
    """``sum |x|**p`` over the last axis, in place. Through log2 and exp2, which are vectorised where ``pow`` is not."""
    x.square_()
    if p != 2.0:
        x.log2_().mul_(p / 2).exp2_()
    return x.sum(-1)
