"""Bits that a layer takes in a file of another tool: codes, scales, zero points and what else the tool stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from mpqsearch.core.layers import LayerSpec, LayerTable
from mpqsearch.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBits:
    """Stored bits of one layer: ``payload`` are the codes as they lie in the file, ``metadata`` everything that decodes
    them.

    A layer at full precision has its weights in ``unquantized`` and nothing else.
    """

    payload: int = 0
    metadata: int = 0
    unquantized: int = 0

    @property
    def total(self) -> int:
        """All bits of the layer."""
        return self.payload + self.metadata + self.unquantized


def coded_bits(
    layer: LayerSpec,
    code_bits: int | Fraction,
    *,
    scales: int = 0,
    scale_bits: int = 0,
    zero_bits: int | Fraction = 0,
    other: int = 0,
) -> StoredBits:
    """Bits of a layer whose every weight takes ``code_bits``, with ``scales`` scales and zero points and ``other`` bits
    once.

    Codes fill whole bytes; a fraction of a byte at the end is padded. Raises `ConfigError` for a negative number.
    """
    if min(code_bits, scales, scale_bits, zero_bits, other) < 0:
        raise ConfigError(f"layer {layer.name!r}: bits and counts must not be negative")
    payload = 8 * -(-Fraction(code_bits) * layer.n_weights // 8)
    metadata = scales * (scale_bits + Fraction(zero_bits)) + other
    return StoredBits(payload=int(payload), metadata=int(-(-metadata // 1)))


def scale_count(layer: LayerSpec, group: int = 0, *, by_tap: bool = False) -> int:
    """Number of scales of a layer: one for every ``group`` inputs of a channel (0: all of them).

    ``by_tap``: the taps of a convolution kernel have scales of their own, as in torchao and SDNQ. Raises `ConfigError`
    when the group does not divide what it groups.
    """
    taps = 1
    if by_tap and len(layer.weight_shape) > 2:
        for size in layer.weight_shape[2:]:
            taps *= size
    inputs = layer.weights_per_channel // taps
    if group and inputs % group:
        raise ConfigError(f"layer {layer.name!r}: groups of {group} do not divide its {inputs} inputs")
    return layer.n_channels * taps * (inputs // group if group else 1)


def unquantized_bits(layer: LayerSpec, value_bits: int) -> StoredBits:
    """Bits of a layer that keeps its weights as floats of ``value_bits``."""
    return StoredBits(unquantized=layer.n_weights * value_bits)


def stored_total(table: LayerTable, layers: Mapping[str, StoredBits], kept_bits: int) -> StoredBits:
    """Totals over a model: ``layers`` by name, and ``kept_bits`` for each value that is in no weight layer."""
    table.require_same_names(set(layers), "the stored bits")
    kept = kept_bits * sum(k.n_values for k in table.kept)
    return StoredBits(
        payload=sum(b.payload for b in layers.values()),
        metadata=sum(b.metadata for b in layers.values()),
        unquantized=sum(b.unquantized for b in layers.values()) + kept,
    )
