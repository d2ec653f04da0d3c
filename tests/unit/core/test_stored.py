from __future__ import annotations

from fractions import Fraction

import pytest

from mpqsearch.core import (
    KeptParameter,
    LayerSpec,
    LayerTable,
    StoredBits,
    coded_bits,
    scale_count,
    stored_total,
    unquantized_bits,
)
from mpqsearch.errors import ConfigError, LayerMismatchError

LINEAR = LayerSpec(name="linear", kind="Linear", weight_shape=(6, 64))
CONV = LayerSpec(name="conv", kind="Conv2d", weight_shape=(4, 8, 3, 3))


def test_codes_fill_whole_bytes() -> None:
    odd = LayerSpec(name="odd", kind="Linear", weight_shape=(1, 3))
    assert coded_bits(odd, 3).payload == 16
    assert coded_bits(odd, Fraction(16, 5)).payload == 16
    assert coded_bits(LINEAR, 3).payload == 3 * 384


def test_scales_are_counted_by_group_and_by_tap() -> None:
    assert scale_count(LINEAR) == 6
    assert scale_count(LINEAR, 32) == 12
    assert scale_count(CONV) == 4
    assert scale_count(CONV, by_tap=True) == 4 * 9
    assert scale_count(CONV, 4, by_tap=True) == 4 * 9 * 2
    with pytest.raises(ConfigError, match="groups of 48 do not divide"):
        scale_count(LINEAR, 48)


def test_metadata() -> None:
    bits = coded_bits(LINEAR, 4, scales=12, scale_bits=16, zero_bits=4, other=64)
    assert (bits.metadata, bits.total) == (12 * 20 + 64, 4 * 384 + 12 * 20 + 64)
    with pytest.raises(ConfigError, match="negative"):
        coded_bits(LINEAR, 4, scales=-1)


def test_totals_cover_the_whole_model() -> None:
    table = LayerTable(
        digest="d", layers=(LINEAR, CONV), kept=(KeptParameter(name="norm", n_values=10, reason="norm"),)
    )
    total = stored_total(table, {"linear": coded_bits(LINEAR, 4), "conv": unquantized_bits(CONV, 16)}, 32)
    assert total == StoredBits(payload=4 * 384, unquantized=16 * 288 + 320)
    with pytest.raises(LayerMismatchError, match="missing conv"):
        stored_total(table, {"linear": coded_bits(LINEAR, 4)}, 32)
