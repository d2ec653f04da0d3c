"""Compiled kernels of the range search, of row moments and of GPTQ rounding.

Imported only where numba is installed, through `search.compiled`.

Every loop over a row runs over a contiguous slice, so that it compiles to vector instructions; sums are float32 inside
`CHUNK` elements and float64 over chunks. ``|x|**p`` goes through polynomials for the logarithm and the exponential: a
sum over a row agrees with float64 to better than 1e-5, and candidates that close are equally good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

CHUNK = 1024
"""Elements that are summed in float32."""

CHECK = 256
"""The same in the search: after so many elements a candidate that is already too bad is given up."""

SMALLEST = 1e-30
"""Scales below are not searched: their reciprocals would overflow."""

LARGEST = 1e300
"""Above every error; the kernels are compiled without infinities."""

SECOND = 3
"""Step of the second grid, inside the intervals of the coarse one that are looked into."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
_FAST = {"reassoc", "contract", "nnan", "ninf", "nsz", "arcp"}
_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_MANTISSA_FROM = 0x3F400000
"""Bits of 0.75: mantissas lie in [0.75, 1.5), around the 1 where the logarithm must be small."""


def _jit(**options: Any) -> Callable[[_Function], _Function]:
    settings = {"nogil": True, "error_model": "numpy", **options}

    def compile_(body: _Function) -> _Function:
        made: Any
        try:
            made = numba.njit(cache=True, **settings)(body)
        except RuntimeError:  # no folder that can hold the cache
            made = numba.njit(**settings)(body)
        return made  # type: ignore[no-any-return]

    return compile_


def _polynomial(function: Callable[[Any], Any], low: float, high: float, degree: int) -> tuple[np.float32, ...]:
    """Coefficients of the near-minimax polynomial on an interval, from the constant up."""
    fitted = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    return tuple(np.float32(c) for c in fitted.convert(kind=np.polynomial.Polynomial).coef)


_L0, _L1, _L2, _L3, _L4, _L5 = _polynomial(np.log2, 0.75, 1.5, 5)
_E0, _E1, _E2, _E3, _E4 = _polynomial(np.exp2, -0.5, 0.5, 4)


@intrinsic  # type: ignore[untyped-decorator]
def _exponent(typing: Any, y: Any) -> Any:  # noqa: ARG001
    """The power of two of a positive float32, as float32. Written in LLVM because numba widens integers to 64 bits."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        bits = b.bitcast(args[0], _INT)
        return b.sitofp(b.ashr(b.sub(bits, ir.Constant(_INT, _MANTISSA_FROM)), ir.Constant(_INT, 23)), _FLOAT)

    return types.float32(types.float32), build


@intrinsic  # type: ignore[untyped-decorator]
def _mantissa(typing: Any, y: Any) -> Any:  # noqa: ARG001
    """A positive float32 over its power of two, in [0.75, 1.5)."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        bits = b.bitcast(args[0], _INT)
        power = b.and_(b.sub(bits, ir.Constant(_INT, _MANTISSA_FROM)), ir.Constant(_INT, -(1 << 23)))
        return b.bitcast(b.sub(bits, power), _FLOAT)

    return types.float32(types.float32), build


@intrinsic  # type: ignore[untyped-decorator]
def _times_power(typing: Any, z: Any, n: Any) -> Any:  # noqa: ARG001
    """``z * 2**n`` for a whole ``n``, by adding to the exponent."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        shifted = b.shl(b.fptosi(args[1], _INT), ir.Constant(_INT, 23))
        return b.bitcast(b.add(b.bitcast(args[0], _INT), shifted), _FLOAT)

    return types.float32(types.float32, types.float32), build


@_jit(fastmath=_FAST, inline="always")
def _power(y: Any, exponent: Any) -> Any:
    """``y**exponent`` of a float32 ``y >= 0``, to a relative 2e-5; below 2**-126 it is a constant near 0."""
    m = _mantissa(y)
    log = ((((_L5 * m + _L4) * m + _L3) * m + _L2) * m + _L1) * m + _L0
    t = max((log + _exponent(y)) * exponent, np.float32(-126.0))
    n = np.rint(t)
    f = t - n
    return _times_power((((_E4 * f + _E3) * f + _E2) * f + _E1) * f + _E0, n)


@_jit(fastmath=_FAST)
def _error_square(row: Any, inverse: Any, zero: Any, top: Any, exponent: Any, enough: Any) -> Any:  # noqa: ARG001
    total: Any = 0.0
    for start in range(0, row.shape[0], CHECK):
        part = row[start : start + CHECK]
        chunk = np.float32(0)
        for j in range(part.shape[0]):
            unit = part[j] * inverse + zero
            off = unit - min(max(np.rint(unit), np.float32(0)), top)
            chunk += off * off
        total += chunk
        if total > enough:
            break
    return total


@_jit(fastmath=_FAST)
def _error_power(row: Any, inverse: Any, zero: Any, top: Any, exponent: Any, enough: Any) -> Any:
    total: Any = 0.0
    for start in range(0, row.shape[0], CHECK):
        part = row[start : start + CHECK]
        chunk = np.float32(0)
        for j in range(part.shape[0]):
            unit = part[j] * inverse + zero
            off = unit - min(max(np.rint(unit), np.float32(0)), top)
            chunk += _power(off * off, exponent)
        total += chunk
        if total > enough:
            break
    return total


def _searcher(error: Any) -> Any:
    """The search with one error function, which may stop at a partial sum above ``enough``: that it is too much is all
    that is asked then."""

    def run(
        rows: Any,
        widest: Any,
        zero: Any,
        top: Any,
        factors: Any,
        powers: Any,
        step: int,
        second: int,
        margin: float,
        p: float,
        best: Any,
    ) -> None:
        n = factors.shape[0]
        exponent = np.float32(p / 2)
        errors = np.empty(n)
        for c in range(rows.shape[0]):
            row = rows[c]
            for k in range(widest.shape[1]):
                base, z, t = widest[c, k], zero[c, k], top[c, k]
                best[c, k] = 0
                if base < SMALLEST:
                    continue
                unit = float(base) ** p
                errors[:] = LARGEST
                least = LARGEST
                for j in range(0, n + step - 1, step):
                    i = min(j, n - 1)
                    power = unit * powers[i]
                    errors[i] = (
                        error(row, np.float32(1) / (base * factors[i]), z, t, exponent, least * (1 + margin) / power)
                        * power
                    )
                    least = min(least, errors[i])
                if step > 1:
                    bound = least * (1 + margin)
                    for low in range(0, n - 1, step):
                        high = min(low + step, n - 1)
                        if errors[low] <= bound or errors[high] <= bound:
                            for i in range(low + second, high, second):
                                power = unit * powers[i]
                                enough = least * (1 + margin / 2) / power
                                errors[i] = (
                                    error(row, np.float32(1) / (base * factors[i]), z, t, exponent, enough) * power
                                )
                                least = min(least, errors[i])
                    bound = least * (1 + margin / 2)
                    for low in range(0, n - 1, step):
                        high = min(low + step, n - 1)
                        for start in range(low, high, second):
                            stop = min(start + second, high)
                            if errors[start] <= bound or errors[stop] <= bound:
                                for i in range(start + 1, stop):
                                    power = unit * powers[i]
                                    enough = least / power
                                    errors[i] = (
                                        error(row, np.float32(1) / (base * factors[i]), z, t, exponent, enough) * power
                                    )
                                    least = min(least, errors[i])
                best[c, k] = np.argmin(errors)

    return _jit()(run)


_search_square = _searcher(_error_square)
_search_power = _searcher(_error_power)


def search(p: float) -> Callable[..., None]:
    """The search kernel of one exponent: ``(rows, widest, zero, top, factors, step, margin, best)``, with ``best``
    written."""
    kernel = _search_square if p == 2.0 else _search_power

    def run(rows: Any, widest: Any, zero: Any, top: Any, factors: Any, step: int, margin: float, best: Any) -> None:
        kernel(
            rows,
            widest,
            zero,
            top,
            factors,
            factors.astype(np.float64) ** p,
            step,
            min(SECOND, step),
            margin,
            float(p),
            best,
        )

    return run


@_jit(fastmath={"reassoc", "nsz"})  # no contraction: codes must be those of the quantizer that is deployed
def square_errors(rows: Any, scale: Any, zero: Any, top: Any, out: Any) -> None:
    """``sum (w_q - w)**2`` of every row under every quantizer, into ``out``."""
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


@intrinsic  # type: ignore[untyped-decorator]
def _float_bits(typing: Any, stored: Any) -> Any:  # noqa: ARG001
    """The bits of a float32 from those of a float32 (int32) or of a bfloat16 (int16), which are its upper half."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        if signature.args[0].bitwidth == 32:
            return args[0]
        return b.shl(b.zext(args[0], _INT), ir.Constant(_INT, 16))

    return types.int32(stored), build


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(typing: Any, bits: Any) -> Any:  # noqa: ARG001
    """Bits read as a float32."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return b.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), build


@intrinsic  # type: ignore[untyped-decorator]
def _ordered(typing: Any, bits: Any) -> Any:  # noqa: ARG001
    """An integer that orders as the float does, with infinities and NaN at both ends; its own inverse."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        sign = b.ashr(args[0], ir.Constant(_INT, 31))
        return b.xor(args[0], b.and_(sign, ir.Constant(_INT, 0x7FFFFFFF)))

    return types.int32(types.int32), build


_LARGEST = np.int32(0x7F7FFFFF)
"""`_ordered` of the largest finite float; that of its negative is ``-_LARGEST - 1``."""


@_jit(fastmath=_FAST)
def _raw_moments(bits: Any) -> Any:
    """`_ordered` least and largest value of a row, and its sums of powers one to four, in one pass."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    one: Any = 0.0
    two: Any = 0.0
    three: Any = 0.0
    four: Any = 0.0
    for start in range(0, bits.shape[0], CHUNK):
        part = bits[start : start + CHUNK]
        a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(part.shape[0]):
            raw = _float_bits(part[j])
            key = _ordered(raw)
            low, high = min(low, key), max(high, key)
            x = _as_float(raw)
            square = x * x
            a += x
            b += square
            c += square * x
            d += square * square
        one += a
        two += b
        three += c
        four += d
    return low, high, one, two, three, four


@_jit(fastmath=_FAST)
def _central_moments(bits: Any, mean: Any, unit: Any) -> Any:
    """Sums of the second and fourth powers of ``(w - mean) * unit``: the second pass of rows for which one does not
    do."""
    second: Any = 0.0
    fourth: Any = 0.0
    for start in range(0, bits.shape[0], CHUNK):
        part = bits[start : start + CHUNK]
        two, four = np.float32(0), np.float32(0)
        for j in range(part.shape[0]):
            square = (_as_float(_float_bits(part[j])) - mean) * unit
            square *= square
            two += square
            four += square * square
        second += two
        fourth += four
    return second, fourth


@_jit()
def moments(rows: Any, low: Any, high: Any, rms: Any, kurtosis: Any) -> None:
    """Least, largest and root mean square of every row, and the kurtosis of `tables.kurtosis`; each ``[C]``, written.

    ``rows`` are the bits of float32 (int32) or bfloat16 (int16) numbers. Moments about zero make those about the mean,
    in one pass, unless the mean is large beside the spread or powers leave the normal range; then a second pass does
    it. A row that is not finite gets NaN.
    """
    n = rows.shape[1]
    for c in range(rows.shape[0]):
        least, largest, one, two, three, four = _raw_moments(rows[c])
        if largest > _LARGEST or least < -_LARGEST - 1:
            low[c], high[c], rms[c], kurtosis[c] = np.nan, np.nan, np.nan, np.nan
            continue
        low[c], high[c] = _as_float(_ordered(least)), _as_float(_ordered(largest))
        mean = one / n
        reach = max(abs(float(low[c])), abs(float(high[c])))
        square, raw, unit = two / n - mean * mean, two / n, 1.0
        fourth = four / n - 4 * mean * three / n + 6 * mean * mean * raw - 3 * mean**4
        if not (1e-7 < reach < 1e7) or mean * mean > 0.25 * square:
            # In units of the reach, so that the fourth powers of small weights stay normal numbers.
            unit = 1 / reach if reach > SMALLEST else 1.0
            second, fourth = _central_moments(rows[c], np.float32(mean), np.float32(unit))
            square, fourth = second / n, fourth / n
        rms[c] = np.sqrt(square / (unit * unit) + mean * mean)
        variance = square * n / max(n - 1, 1)
        kurtosis[c] = fourth / (variance * variance) if variance / (unit * unit) > 1e-30 else 0.0


@_jit(inline="always")
def _code(x: Any, step: Any, zero: Any, top: Any) -> Any:
    """The code before and after clipping; what is not a number stays so, as in torch."""
    code = np.rint(x / step + zero)
    low = np.float32(0) if code < np.float32(0) else code  # noqa: FURB136
    return code, (top if low > top else low)  # noqa: FURB136


@_jit()  # no fast mathematics: codes must be those of the quantizer that is deployed
def fake_quantize(rows: Any, out: Any, step: Any, zero: Any, per: int, top: Any, first: int) -> None:
    """``(clip(round(x / step) + zero) - zero) step`` of ``rows`` ``[R, L]`` into ``out``.

    ``step`` is ``[K, 1]`` or ``[K, L]`` and ``zero`` ``[K]``; row ``r`` has those of ``(first + r) // per``.
    """
    for r in range(rows.shape[0]):
        k = (first + r) // per
        row, to, z = rows[r], out[r], zero[k]
        if step.shape[1] == 1:
            s = step[k, 0]
            for j in range(row.shape[0]):
                _, code = _code(row[j], s, z, top)
                to[j] = (code - z) * s
        else:
            steps = step[k]
            for j in range(row.shape[0]):
                _, code = _code(row[j], steps[j], z, top)
                to[j] = (code - z) * steps[j]


@_jit(fastmath={"reassoc", "nsz"})
def fake_quantize_gradients(
    rows: Any, grad: Any, to_rows: Any, to_step: Any, to_zero: Any, step: Any, zero: Any, per: int, top: Any, first: int
) -> None:
    """Straight-through gradient of `fake_quantize` into ``to_rows``, and by row the sums ``g (y - x inside)`` and ``-g
    step (1 - inside)``."""
    for r in range(rows.shape[0]):
        k = (first + r) // per
        z, shared = zero[k], step.shape[1] == 1
        steps = step[k]
        s = steps[0]
        one: Any = 0.0
        two: Any = 0.0
        for start in range(0, rows.shape[1], CHUNK):
            row, g, to = (
                rows[r, start : start + CHUNK],
                grad[r, start : start + CHUNK],
                to_rows[r, start : start + CHUNK],
            )
            a, b = np.float32(0), np.float32(0)
            if shared:
                for j in range(row.shape[0]):
                    raw, code = _code(row[j], s, z, top)
                    inside = np.float32(1) if raw == code else np.float32(0)
                    kept = g[j] * inside
                    to[j] = kept
                    a += g[j] * (code - z) * s - kept * row[j]
                    b += (kept - g[j]) * s
            else:
                part = steps[start : start + CHUNK]
                for j in range(row.shape[0]):
                    raw, code = _code(row[j], part[j], z, top)
                    inside = np.float32(1) if raw == code else np.float32(0)
                    kept = g[j] * inside
                    to[j] = kept
                    a += g[j] * (code - z) * part[j] - kept * row[j]
                    b += (kept - g[j]) * part[j]
            one += a
            two += b
        to_step[r], to_zero[r] = one, two


@_jit()  # as above
def fake_quantize_rows(
    rows: Any, out: Any, scale: Any, zero: Any, top: Any, full: Any, factor: Any, first: int
) -> None:
    """Rows ``[C, D]`` through a quantizer each: the operations of `rows.encode` and `rows.decode` in their order.

    ``factor`` is ``[1, D]``, or has a row for every row of the whole, of which ``first`` is the first here.
    """
    for r in range(rows.shape[0]):
        row, to, s, z, t = rows[r], out[r], scale[r], zero[r], top[r]
        if full[r]:
            to[:] = row
            continue
        f = factor[min(first + r, factor.shape[0] - 1)]
        for j in range(row.shape[0]):
            _, code = _code(row[j] * f[j], s, z, t)
            to[j] = (code - z) * s / f[j]


@_jit(fastmath={"reassoc", "nsz"})
def fake_quantize_rows_gradients(
    rows: Any,
    grad: Any,
    to_rows: Any,
    to_scale: Any,
    to_zero: Any,
    scale: Any,
    zero: Any,
    top: Any,
    full: Any,
    fixed_zero: Any,
    factor: Any,
    lsq: bool,
    first: int,
) -> None:
    """Straight-through gradients of `fake_quantize_rows`; those of scale and zero point over ``sqrt(D top)`` with
    ``lsq``."""
    for r in range(rows.shape[0]):
        s, z, t = scale[r], zero[r], top[r]
        to_scale[r], to_zero[r] = 0, 0
        if full[r]:
            to_rows[r] = grad[r]
            continue
        one: Any = 0.0
        two: Any = 0.0
        factors = factor[min(first + r, factor.shape[0] - 1)]
        for start in range(0, rows.shape[1], CHUNK):
            row, g, to = (
                rows[r, start : start + CHUNK],
                grad[r, start : start + CHUNK],
                to_rows[r, start : start + CHUNK],
            )
            f = factors[start : start + CHUNK]
            a, b = np.float32(0), np.float32(0)
            for j in range(row.shape[0]):
                raw, code = _code(row[j] * f[j], s, z, t)
                inside = np.float32(1) if raw == code else np.float32(0)
                kept = g[j] * inside
                to[j] = kept
                a += g[j] * ((code - z) * s / f[j]) - kept * row[j]
                b += (kept - g[j]) / f[j]
            one += a
            two += b
        weight = 1 / np.sqrt(float(t) * rows.shape[1]) if lsq else 1.0
        to_scale[r] = one / s * weight
        if not fixed_zero[r]:
            to_zero[r] = two * s * weight


TILE = 16
"""Rows that share one pass over a row of a second moment."""


@_jit(fastmath={"reassoc", "nsz"})
def round_in_turn(rows: Any, factor: Any, scale: Any, zero: Any, top: Any, full: Any, target: Any, value: Any) -> None:
    """Round the columns of ``rows`` ``[c, D]`` one after the other, taking what each loses off those to come by the
    upper triangular ``factor``.

    ``rows`` is used up. ``target`` is what was rounded, ``value`` what it became; rows that are ``full`` are not
    rounded.
    """
    width = rows.shape[1]
    for start in range(0, rows.shape[0], TILE):
        stop = min(start + TILE, rows.shape[0])
        for j in range(width):
            ahead = factor[j, j + 1 :]
            inverse = np.float32(1) / factor[j, j]
            for r in range(start, stop):
                x = rows[r, j]
                target[r, j] = x
                value[r, j] = x
                if full[r]:
                    continue
                code = min(max(np.rint(x / scale[r] + zero[r]), np.float32(0)), top[r])
                y = (code - zero[r]) * scale[r]
                value[r, j] = y
                lost = (x - y) * inverse
                left = rows[r, j + 1 :]
                for k in range(ahead.shape[0]):
                    left[k] -= lost * ahead[k]


@_jit(fastmath={"reassoc", "nsz"})
def choose_anew(slope: Any, moment: Any, scale: Any, zero: Any, top: Any, full: Any, target: Any, value: Any) -> None:
    """Choose the level of every column given all others, by coordinate descent; ``slope`` is the error times
    ``moment``, and is used up."""
    width = slope.shape[1]
    for start in range(0, slope.shape[0], TILE):
        stop = min(start + TILE, slope.shape[0])
        for j in range(width):
            ahead = moment[j, j + 1 :]
            for r in range(start, stop):
                if full[r]:
                    continue
                old = value[r, j]
                wanted = old - slope[r, j] / moment[j, j]
                code = min(max(np.rint(wanted / scale[r] + zero[r]), np.float32(0)), top[r])
                new = (code - zero[r]) * scale[r]
                target[r, j] = wanted
                value[r, j] = new
                step = new - old
                if step != 0:
                    left = slope[r, j + 1 :]
                    for k in range(ahead.shape[0]):
                        left[k] += step * ahead[k]
