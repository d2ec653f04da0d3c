"""The compiled range search on a CPU: plain loops that numba compiles. Imported by `mpqsearch.quant.search` only.

The search is the one of `search.best_factors` in torch, which is its oracle. Two things make it fast: a row stays in
the first-level cache through all its candidates, and a candidate is given up once its partial sum is too large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

CHUNK = 256
"""Weights that are summed in float32 before the float64 total is compared with what would be enough."""

SMALLEST = 1e-30
"""Scales below are not searched: their reciprocals would overflow."""

LARGEST = 1e300
"""Above every error; fast mathematics knows no infinity."""

SECOND = 3
"""Step of the second of three grids."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
_FAST = {"reassoc", "contract", "nnan", "ninf", "nsz", "arcp"}
_LEAST_MANTISSA, _MANTISSA_BITS = np.int32(0x3F400000), np.int32(23)
"""Bits of 0.75, so that mantissas lie in [0.75, 1.5), where the logarithm is near 0; number of bits of a mantissa."""


def _jit(**options: Any) -> Callable[[_Function], _Function]:
    """Compile at the first call. The machine code is kept on disk, if numba finds a folder for it: ``__pycache__``
    beside this file, one of the user's, or ``NUMBA_CACHE_DIR``. It is a pickle: who can write there can run code here.
    """
    settings = {"nogil": True, "error_model": "numpy", **options}

    def compile_(body: _Function) -> _Function:
        compiled: Any
        try:
            compiled = numba.njit(cache=True, **settings)(body)
        except RuntimeError:  # no folder that can hold the cache
            compiled = numba.njit(**settings)(body)
        return compiled  # type: ignore[no-any-return]

    return compile_


def _polynomial(function: Callable[[Any], Any], low: float, high: float, degree: int) -> tuple[np.float32, ...]:
    """Coefficients of the near-minimax polynomial on an interval, from the constant up."""
    fitted = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    return tuple(np.float32(c) for c in fitted.convert(kind=np.polynomial.Polynomial).coef)


_L0, _L1, _L2, _L3, _L4, _L5 = _polynomial(np.log2, 0.75, 1.5, 5)
_E0, _E1, _E2, _E3, _E4 = _polynomial(np.exp2, -0.5, 0.5, 4)


@_jit(fastmath=_FAST, inline="always")
def _power(y: Any, exponent: Any) -> Any:
    """``y**exponent`` of a float32 ``y >= 0`` to a relative 2e-5; below 2**-126 a constant near 0.

    ``exp2(exponent * log2(y))`` by polynomials, with the power of two in the bits of the number: numba's own ``pow``
    is one call for each weight, this is eight weights in one instruction.
    """
    bits = np.float32(y).view(np.int32)
    whole = np.int32(np.int32(bits - _LEAST_MANTISSA) >> _MANTISSA_BITS)
    m = np.int32(bits - np.int32(whole << _MANTISSA_BITS)).view(np.float32)
    log = ((((_L5 * m + _L4) * m + _L3) * m + _L2) * m + _L1) * m + _L0
    t = max((log + np.float32(whole)) * exponent, np.float32(-126.0))
    n = np.rint(t)
    f = t - n
    z = np.float32((((_E4 * f + _E3) * f + _E2) * f + _E1) * f + _E0)
    return np.int32(z.view(np.int32) + np.int32(np.int32(n) << _MANTISSA_BITS)).view(np.float32)


@_jit(fastmath=_FAST)
def _error(row: Any, inverse: Any, zero: Any, top: Any, p: float, enough: Any) -> Any:
    """``sum |unit - code|**p`` in units of the scale; a partial sum when that is more than ``enough``."""
    exponent = np.float32(p / 2)
    total: Any = 0.0
    for start in range(0, row.shape[0], CHUNK):
        part = row[start : start + CHUNK]
        chunk = np.float32(0)
        if p == 2.0:
            for j in range(part.shape[0]):
                unit = part[j] * inverse + zero
                off = unit - min(max(np.rint(unit), np.float32(0)), top)
                chunk += off * off
        else:
            for j in range(part.shape[0]):
                unit = part[j] * inverse + zero
                off = unit - min(max(np.rint(unit), np.float32(0)), top)
                chunk += _power(off * off, exponent)
        total += chunk
        if total > enough:
            break
    return total


@_jit()
def _candidate(row: Any, factor: Any, numbers: Any, enough: Any) -> Any:
    """The error of one factor in the units of the row; some number above ``enough`` where that is certain early."""
    scale, zero, top, p = numbers
    power = float(scale * factor) ** p
    return _error(row, np.float32(1) / (scale * factor), zero, top, p, enough / power) * power


@_jit()
def _refine(
    errors: Any, row: Any, factors: Any, numbers: Any, least: Any, step: int, margin: float, next_margin: float
) -> Any:
    """Try every ``step``-th factor between two neighbours that were tried, if one of them is within ``margin`` of the
    least error. Returns the least error afterwards."""
    bound = least * (1 + margin)
    low = 0
    for high in range(1, errors.shape[0]):
        if errors[high] == LARGEST:
            continue
        if errors[low] <= bound or errors[high] <= bound:
            for i in range(low + step, high, step):
                errors[i] = _candidate(row, factors[i], numbers, least * (1 + next_margin))
                least = min(least, errors[i])
        low = high
    return least


@_jit()
def search(
    rows: Any, scales: Any, zeros: Any, tops: Any, factors: Any, step: int, margin: float, p: float, best: Any
) -> None:
    """Number of the best factor of every row under each of its K quantizers, into ``best`` ``[C, K]``.

    Every ``step``-th factor is tried first, then in finer steps what lies beside one that comes within ``margin`` (and
    then half of it) of the best.
    """
    n = factors.shape[0]
    errors = np.empty(n)
    for c in range(rows.shape[0]):
        for k in range(scales.shape[1]):
            best[c, k] = 0
            if scales[c, k] < SMALLEST:
                continue
            errors[:] = LARGEST
            numbers = (scales[c, k], zeros[c, k], tops[c, k], p)
            least = LARGEST
            for j in range(0, n + step - 1, step):
                i = min(j, n - 1)
                errors[i] = _candidate(rows[c], factors[i], numbers, least * (1 + margin))
                least = min(least, errors[i])
            least = _refine(errors, rows[c], factors, numbers, least, min(SECOND, step), margin, margin / 2)
            least = _refine(errors, rows[c], factors, numbers, least, 1, margin / 2, 0.0)
            best[c, k] = np.argmin(errors)


@_jit(fastmath={"reassoc", "nsz"})  # no contraction: codes must be those of the quantizer that is deployed
def square_errors(rows: Any, scale: Any, zero: Any, top: Any, out: Any) -> None:
    """``sum (w_q - w)**2`` of every row under each of its K quantizers, into ``out`` ``[C, K]``."""
    for c in range(rows.shape[0]):
        for k in range(scale.shape[1]):
            s, z, t = scale[c, k], zero[c, k], top[c, k]
            total: Any = 0.0
            for start in range(0, rows.shape[1], CHUNK):
                part = rows[c, start : start + CHUNK]
                chunk = np.float32(0)
                for j in range(part.shape[0]):
                    code = min(max(np.rint(part[j] / s + z), np.float32(0)), t)
                    off = (code - z) * s - part[j]
                    chunk += off * off
                total += chunk
            out[c, k] = total


@_jit()
def choose_codes(
    now: Any,
    pull: Any,
    moved: Any,
    outputs: Any,
    inputs: Any,
    scale: Any,
    zero: Any,
    top: Any,
    begin: int,
    group: int,
) -> None:
    """Choose the codes of some columns anew, each given all others, for the least ``tr(S E H E')``.

    ``now`` ``[b, c]`` are the values of the columns from ``begin`` on, and are changed; ``pull`` ``[b, c]``, the same
    rows of ``H E' S``, is used up. ``moved`` ``[b, c]`` is made what the changes are times ``S``. ``outputs``
    ``[c, c]`` is ``S``, ``inputs`` ``[b, b]`` the block of ``H``; ``scale`` and ``zero`` are ``[n, c]`` with one row
    for every ``group`` columns, ``top`` ``[c]`` the largest codes, negative for a channel that is not quantized.
    """
    for j in range(now.shape[0]):
        k, curvature = (begin + j) // group, inputs[j, j]
        for i in range(now.shape[1]):
            if top[i] < 0:
                continue
            wanted = now[j, i] - (pull[j, i] + moved[j, i] * curvature) / (outputs[i, i] * curvature)
            code = np.rint(wanted / scale[k, i] + zero[k, i])
            value = (min(max(code, np.float32(0)), top[i]) - zero[k, i]) * scale[k, i]
            change = value - now[j, i]
            if change != 0:
                now[j, i] = value
                for other in range(now.shape[1]):
                    moved[j, other] += outputs[i, other] * change
        for later in range(j, now.shape[0]):
            for i in range(now.shape[1]):
                pull[later, i] += moved[j, i] * inputs[j, later]
