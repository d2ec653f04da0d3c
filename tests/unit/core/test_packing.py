from __future__ import annotations

import numpy as np
import pytest

from mpqsearch.core.packing import pack_bits, packed_size, unpack_bits
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


def test_codes_and_lengths_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="code of 8 does not fit 3 bits"):
        pack_bits(np.array([1, 8], dtype=np.uint8), 3)
    with pytest.raises(ConfigError, match="10 codes of 3 bits take 4 bytes, got 3"):
        unpack_bits(np.zeros(3, dtype=np.uint8), 3, 10)
    with pytest.raises(ConfigError, match=r"Allowed: 1\.\.8"):
        pack_bits(np.zeros(3, dtype=np.uint8), 16)
