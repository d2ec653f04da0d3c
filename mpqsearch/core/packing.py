"""Integer codes of 1 to 8 bits as a dense little-endian bit stream, and back; codes of three levels five a byte. numpy
only.

Eight codes take a whole number of bytes and fit one 64-bit word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core.formats import TRITS, WIDTHS
from mpqsearch.errors import ConfigError

Bytes = NDArray[np.uint8]


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
    if flat.size and int(flat.max()) >> bits:
        raise ConfigError(f"a code of {int(flat.max())} does not fit {bits} bits")
    eights = np.zeros((-(-flat.size // 8), 8), dtype=np.uint8)
    eights.reshape(-1)[: flat.size] = flat
    words = np.zeros(len(eights), dtype="<u8")
    for place in range(8):
        words |= eights[:, place].astype(np.uint64) << np.uint64(place * bits)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: packed_size(flat.size, bits)]


def unpack_bits(data: Bytes, bits: int, n_codes: int) -> Bytes:
    """Back from `pack_bits`: ``uint8 [n_codes]``. Raises `ConfigError` when ``data`` is not as long as so many
    codes."""
    _check(bits)
    flat = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    if flat.size != packed_size(n_codes, bits):
        raise ConfigError(f"{n_codes} codes of {bits} bits take {packed_size(n_codes, bits)} bytes, got {flat.size}")
    eights = np.zeros((-(-n_codes // 8), 8), dtype=np.uint8)
    stream = np.zeros(len(eights) * bits, dtype=np.uint8)
    stream[: flat.size] = flat
    eights[:, :bits] = stream.reshape(-1, bits)
    words, mask = eights.reshape(-1).view("<u8"), np.uint64(2**bits - 1)
    codes = np.empty_like(eights)
    for place in range(8):
        codes[:, place] = (words >> np.uint64(place * bits)) & mask
    return codes.reshape(-1)[:n_codes]


def pack_trits(codes: Bytes) -> Bytes:
    """Rows of codes 0, 1 and 2 (uint8 ``[C, D]``), five a byte, the first the lowest digit base 3; each row begins with
    a new byte: ``uint8 [C, ceil(D / 5)]``. Raises `ConfigError` for a code above 2."""
    if codes.size and int(codes.max()) > 2:
        raise ConfigError(f"a code of {int(codes.max())} is none of three levels")
    padded = np.zeros((len(codes), -(-codes.shape[1] // TRITS) * TRITS), dtype=np.uint8)
    padded[:, : codes.shape[1]] = codes
    packed: Bytes = (padded.reshape(len(codes), -1, TRITS) * _DIGITS).sum(2, dtype=np.uint8)
    return packed


def unpack_trits(data: Bytes, n_codes: int) -> Bytes:
    """Back from `pack_trits`: ``uint8 [C, n_codes]`` of rows ``[C, ceil(n_codes / 5)]``. Raises `ConfigError` for a
    byte that stands for no five codes."""
    if data.size and int(data.max()) >= 3**TRITS:
        raise ConfigError(f"a byte of {int(data.max())} holds no five codes of three levels: the file is damaged")
    digits: Bytes = data[:, :, None] // _DIGITS % np.uint8(3)
    return digits.reshape(len(data), -1)[:, :n_codes]


_DIGITS = (3 ** np.arange(TRITS)).astype(np.uint8)


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ConfigError(f"bit packing: width {bits} is not supported. Allowed: 1..8.")
