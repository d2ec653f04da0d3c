from __future__ import annotations

import numpy as np
import pytest

from mpqsearch.core.packing import pack_bits, pack_trits, packed_size, unpack_bits, unpack_trits
from mpqsearch.errors import ConfigError


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64, 1001])
def test_it_is_the_bit_stream_and_comes_back(bits: int, n: int) -> None:
    codes = np.random.default_rng(n).integers(0, 2**bits, size=n, dtype=np.uint8)
    stream = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits].reshape(-1)
    packed = pack_bits(codes, bits)
    assert len(packed) == packed_size(n, bits)
    assert np.array_equal(packed, np.packbits(stream, bitorder="little"))
    assert np.array_equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("n", [1, 4, 5, 6, 128, 1001])
def test_three_levels_lie_five_a_byte_and_each_row_begins_with_a_new_one(n: int) -> None:
    codes = np.random.default_rng(n).integers(0, 3, size=(7, n), dtype=np.uint8)
    packed = pack_trits(codes)
    assert packed.shape == (7, -(-n // 5))
    digits = [sum(int(c) * 3**place for place, c in enumerate(row[:5])) for row in codes]
    assert packed[:, 0].tolist() == digits
    assert np.array_equal(unpack_trits(packed, n), codes)
    with pytest.raises(ConfigError, match="none of three levels"):
        pack_trits(np.array([[3]], dtype=np.uint8))
    with pytest.raises(ConfigError, match="no five codes"):
        unpack_trits(np.array([[243]], dtype=np.uint8), 5)


def test_codes_and_lengths_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="code of 8 does not fit 3 bits"):
        pack_bits(np.array([1, 8], dtype=np.uint8), 3)
    with pytest.raises(ConfigError, match="10 codes of 3 bits take 4 bytes, got 3"):
        unpack_bits(np.zeros(3, dtype=np.uint8), 3, 10)
    with pytest.raises(ConfigError, match=r"Allowed: 1\.\.8"):
        pack_bits(np.zeros(3, dtype=np.uint8), 16)
