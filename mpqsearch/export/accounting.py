"""How the stored bits of a map add up, layer by layer. Every number comes from `StorageModel` and `QuantFormat`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, QuantFormat, StoredBits, size_bits
from mpqsearch.core.budget import DEFAULT_STORAGE as STORAGE


def layer_bits(layer: LayerSpec, widths: NDArray[np.uint8], fmt: QuantFormat) -> StoredBits:
    """Split what `StorageModel.layer_total` says; ``widths`` is one width (shape ``()``) or one a channel."""
    total = STORAGE.layer_total(layer, widths, fmt)
    if widths.ndim == 0 and int(widths) == FULL_PRECISION:
        return StoredBits(unquantized=total)
    values, counts = np.unique(widths, return_counts=True)
    payload = sum(int(n) * _codes(layer, int(b), fmt) for b, n in zip(values, counts, strict=True))
    payload *= 1 if widths.ndim else layer.n_channels
    return StoredBits(payload=payload, metadata=total - payload)


def mapped_bits(layer: LayerSpec, bit_map: BitMap) -> StoredBits:
    """`layer_bits` of one layer of a map, with the scales of its input in the metadata."""
    bits = layer_bits(layer, bit_map.weights[layer.name], bit_map.format_of(layer.name))
    scales = STORAGE.activation_bits(bit_map.activations.get(layer.name, FULL_PRECISION), bit_map.activation_steps)
    return replace(bits, metadata=bits.metadata + scales)


def accounting(table: LayerTable, bit_map: BitMap) -> dict[str, Any]:
    """Totals in bits, that add up: payload + metadata + unquantized = total = `mpqsearch.core.size_bits`.

    ``bits_per_weight`` is the total over all parameters of the model, ``payload_bits_per_weight`` the codes over the
    weights that have codes (None when no layer is quantized).
    """
    layers = {la.name: mapped_bits(la, bit_map) for la in table}
    coded = sum(la.n_weights for la in table if not layers[la.name].unquantized)
    payload = sum(b.payload for b in layers.values())
    total = size_bits(table, bit_map)
    return {
        "storage": asdict(STORAGE),
        "payload_bits": payload,
        "metadata_bits": sum(b.metadata for b in layers.values()),
        "unquantized_bits": sum(b.unquantized for b in layers.values()) + STORAGE.kept_bits(table),
        "total_bits": total,
        "n_parameters": table.n_parameters,
        "bits_per_weight": total / table.n_parameters,
        "payload_bits_per_weight": payload / coded if coded else None,
    }


def unquantized(table: LayerTable, bit_map: BitMap) -> list[dict[str, Any]]:
    """Every parameter that has no codes: name, number of values, stored bits, reason."""
    whole = [
        (la.name, la.n_weights, mapped_bits(la, bit_map).unquantized, "the map asks for full precision")
        for la in table
        if bit_map.weights[la.name].ndim == 0 and int(bit_map.weights[la.name]) == FULL_PRECISION
    ]
    kept = [(k.name, k.n_values, STORAGE.full_precision_bits * k.n_values, k.reason) for k in table.kept]
    return [dict(zip(("name", "n_values", "stored_bits", "reason"), row, strict=True)) for row in whole + kept]


def _codes(layer: LayerSpec, bits: int, fmt: QuantFormat) -> int:
    """Bits of the codes of one channel: the stored bits without those of its scale and zero point."""
    stored = STORAGE.channel_bits(layer, bits, fmt, mixed=False)
    return stored if bits == FULL_PRECISION else stored - fmt.scale_bits - fmt.zero_point_bits(bits)
