"""The single place where stored bits are counted: codes, scales, zero points, channel tags, and what has no codes.

Ours, by the format of a map; and those of a file of another tool, by what it says it stores (`coded_bits` and on).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core.bitmap import BitMap
from mpqsearch.core.formats import FULL_PRECISION, SCALE_BITS, TRITS, QuantFormat
from mpqsearch.core.layers import LayerSpec, LayerTable
from mpqsearch.errors import ConfigError

TAG_BITS = 3
"""The width of each channel, 1..8, in layers whose channels differ."""

LAYER_BITS = 8
"""The shared exponent of the scales of a layer, and as many of its input's."""


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


def code_bits(n_codes: int, bits: int, fmt: QuantFormat) -> int:
    """Stored bits of the codes of one output channel. Those of three levels lie five a byte, and each channel begins
    with a new one."""
    return 8 * -(-n_codes // TRITS) if fmt.three_levels(bits) else n_codes * bits


def channel_bits(layer: LayerSpec, bits: int, fmt: QuantFormat) -> int:
    """Stored bits of one output channel at a width: its codes, scales and zero points, without a tag."""
    if bits == FULL_PRECISION:
        return layer.weights_per_channel * bits
    scales = fmt.scales_of(layer.weights_per_channel)
    return code_bits(layer.weights_per_channel, bits, fmt) + scales * (SCALE_BITS + fmt.zero_point_bits(bits))


def fixed_bits(layer: LayerSpec, fmt: QuantFormat) -> int:
    """Stored bits of a quantized layer that no width changes: the shared exponent and smoothing factors."""
    return LAYER_BITS + (SCALE_BITS * layer.n_inputs if fmt.smooth else 0)


def input_bits(layer: LayerSpec, bits: int, steps: int, *, token_scales: bool) -> int:
    """Stored bits of the scales and zero points of one layer's input at a width: ``steps`` of each, or none where every
    token has its own (`BitMap.token_scales`)."""
    if bits == FULL_PRECISION:
        return 0
    return LAYER_BITS + (0 if token_scales and layer.kind == "Linear" else steps * (SCALE_BITS + bits))


def layer_bits(layer: LayerSpec, widths: NDArray[np.uint8], fmt: QuantFormat) -> StoredBits:
    """Stored bits of a whole layer; ``widths`` is one width (shape ``()``) or one a channel."""
    if widths.ndim == 0 and int(widths) == FULL_PRECISION:
        return unquantized_bits(layer, FULL_PRECISION)
    counts = [0] * int(widths) + [layer.n_channels] if widths.ndim == 0 else np.bincount(widths).tolist()
    channels = sum(n * channel_bits(layer, bits, fmt) for bits, n in enumerate(counts))
    payload = sum(n * code_bits(layer.weights_per_channel, bits, fmt) for bits, n in enumerate(counts))
    tags = TAG_BITS * layer.n_channels if widths.ndim else 0
    return StoredBits(payload=payload, metadata=channels - payload + tags + fixed_bits(layer, fmt))


def mapped_bits(layer: LayerSpec, bit_map: BitMap) -> StoredBits:
    """`layer_bits` of one layer of a map, with the scales of its input in the metadata."""
    bits = layer_bits(layer, bit_map.weights[layer.name], bit_map.format_of(layer.name))
    act_bits, steps = bit_map.activations.get(layer.name, FULL_PRECISION), bit_map.activation_steps
    scales = input_bits(layer, act_bits, steps, token_scales=bit_map.token_scales)
    return replace(bits, metadata=bits.metadata + scales)


def size_bits(table: LayerTable, bit_map: BitMap) -> int:
    """Stored bits of the whole model under ``bit_map``: everything counted."""
    bit_map.validate(table)
    return sum(mapped_bits(layer, bit_map).total for layer in table) + FULL_PRECISION * table.n_kept


def size_bytes(table: LayerTable, bit_map: BitMap) -> int:
    """Stored bytes of the whole model, rounded up."""
    return -(-size_bits(table, bit_map) // 8)


def average_bits(table: LayerTable, bit_map: BitMap) -> float:
    """Stored bits of the whole model over *all* its parameters."""
    return size_bits(table, bit_map) / table.n_parameters


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
