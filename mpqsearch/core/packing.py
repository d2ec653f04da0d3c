"""Integer codes of 1 to 8 bits as a dense little-endian bit stream, and back. numpy only; whole arrays at a time.

Eight codes lie in the bytes of one 64-bit word and are pushed together in three steps (lanes of 16, 32 and 64 bits), so
that a step costs a few operations on a word and not on a code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core.formats import check_width
from mpqsearch.errors import ConfigError

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]

BLOCK = 1 << 15
"""Words handled at a time: their temporaries stay in the cache."""

_LOW = tuple(np.uint64(m) for m in (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF))
_HIGH = tuple(np.uint64(m) for m in (0xFF00FF00FF00FF00, 0xFFFF0000FFFF0000, 0xFFFFFFFF00000000))


def packed_size(n_codes: int, bits: int) -> int:
    """Bytes of ``n_codes`` codes of ``bits`` bits, the last byte padded with zeros."""
    return -(-n_codes * bits // 8)


def pack_bits(codes: Bytes, bits: int) -> Bytes:
    """The codes (uint8, any shape, each below ``2**bits``) one after another, lowest bit first: ``uint8
    [packed_size]``.

    Raises `ConfigError` when a code does not fit its width.
    """
    _check(bits)
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1)
    if flat.size and bits < 8 and int(flat.max()) >> bits:
        raise ConfigError(f"a code of {int(flat.max())} does not fit {bits} bits")
    if bits == 8:
        return flat.copy()
    n_words = -(-flat.size // 8)
    if flat.size % 8:
        flat = np.concatenate([flat, np.zeros(8 * n_words - flat.size, dtype=np.uint8)])
    words = flat.view("<u8")
    out = np.empty((n_words, bits), dtype=np.uint8)
    for start in range(0, n_words, BLOCK):
        block = _squeeze(words[start : start + BLOCK].astype(np.uint64), bits)
        out[start : start + BLOCK] = block.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :bits]
    return out.reshape(-1)[: packed_size(codes.size, bits)]


def unpack_bits(data: Bytes, bits: int, n_codes: int) -> Bytes:
    """Back from `pack_bits`: ``uint8 [n_codes]``. Raises `ConfigError` when ``data`` is not as long as so many
    codes."""
    _check(bits)
    flat = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    if flat.size != packed_size(n_codes, bits):
        raise ConfigError(f"{n_codes} codes of {bits} bits take {packed_size(n_codes, bits)} bytes, got {flat.size}")
    if bits == 8:
        return flat.copy()
    n_words = -(-n_codes // 8)
    if flat.size % bits or flat.size < n_words * bits:
        flat = np.concatenate([flat, np.zeros(n_words * bits - flat.size, dtype=np.uint8)])
    rows = flat.reshape(n_words, bits)
    out = np.empty((n_words, 8), dtype=np.uint8)
    padded = np.zeros((min(BLOCK, n_words), 8), dtype=np.uint8)
    for start in range(0, n_words, BLOCK):
        block = rows[start : start + BLOCK]
        padded[: len(block), :bits] = block
        spread = _spread(padded[: len(block)].view("<u8").reshape(-1).astype(np.uint64), bits)
        out[start : start + BLOCK] = spread.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
    return out.reshape(-1)[:n_codes]


def _squeeze(words: Words, bits: int) -> Words:
    """Eight codes in the bytes of each word, pushed together into its lowest ``8 * bits`` bits; in place."""
    for step in range(3):
        high = words & _HIGH[step]
        high >>= np.uint64((8 - bits) << step)
        words &= _LOW[step]
        words |= high
    return words


def _spread(words: Words, bits: int) -> Words:
    """Inverse of `_squeeze`; in place."""
    for step in (2, 1, 0):
        kept = np.uint64(0)
        lane, filled = 16 << step, bits << step
        for shift in range(0, 64, lane):
            kept |= np.uint64(((1 << filled) - 1) << shift)
        high = words << np.uint64((8 - bits) << step)
        high &= _HIGH[step]
        words &= kept
        words |= high
    return words


def _check(bits: int) -> None:
    check_width(bits, "bit packing")
    if bits > 8:
        raise ConfigError(f"bit packing: width {bits} is not supported. Allowed: 1..8.")
