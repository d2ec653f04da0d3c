"""How the stored bits of a map add up, layer by layer. Every number comes from `StorageModel` and `QuantFormat`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import (
    FULL_PRECISION,
    BitMap,
    LayerSpec,
    LayerTable,
    QuantFormat,
    StorageModel,
    StoredBits,
    size_bits,
)
from mpqsearch.core.budget import DEFAULT_STORAGE


def layer_bits(layer: LayerSpec, widths: NDArray[np.uint8], fmt: QuantFormat, storage: StorageModel) -> StoredBits:
    """Split what `StorageModel.layer_total` says; ``widths`` is one width (shape ``()``) or one a channel."""
    total = storage.layer_total(layer, widths, fmt)
    if widths.ndim == 0 and int(widths) == FULL_PRECISION:
        return StoredBits(unquantized=total)
    values, counts = np.unique(widths, return_counts=True)
    payload = sum(int(n) * _codes(layer, int(b), fmt, storage) for b, n in zip(values, counts, strict=True))
    payload *= 1 if widths.ndim else layer.n_channels
    return StoredBits(payload=payload, metadata=total - payload)


def mapped_bits(layer: LayerSpec, bit_map: BitMap, storage: StorageModel) -> StoredBits:
    """`layer_bits` of one layer of a map, with the scales of its input in the metadata."""
    bits = layer_bits(layer, bit_map.weights[layer.name], bit_map.format_of(layer.name), storage)
    scales = storage.activation_bits(bit_map.activations.get(layer.name, FULL_PRECISION), bit_map.activation_steps)
    return replace(bits, metadata=bits.metadata + scales)


def accounting(table: LayerTable, bit_map: BitMap, storage: StorageModel = DEFAULT_STORAGE) -> dict[str, Any]:
    """Totals in bits, that add up: payload + metadata + unquantized = total = `mpqsearch.core.size_bits`.

    ``bits_per_weight`` is the total over all parameters of the model, ``payload_bits_per_weight`` the codes over the
    weights that have codes (None when no layer is quantized).
    """
    layers = {la.name: mapped_bits(la, bit_map, storage) for la in table}
    coded = sum(la.n_weights for la in table if not layers[la.name].unquantized)
    payload = sum(b.payload for b in layers.values())
    total = size_bits(table, bit_map, storage)
    return {
        "storage": asdict(storage),
        "payload_bits": payload,
        "metadata_bits": sum(b.metadata for b in layers.values()),
        "unquantized_bits": sum(b.unquantized for b in layers.values()) + storage.kept_bits(table),
        "total_bits": total,
        "n_parameters": table.n_parameters,
        "bits_per_weight": total / table.n_parameters,
        "payload_bits_per_weight": payload / coded if coded else None,
    }


def unquantized(table: LayerTable, bit_map: BitMap, storage: StorageModel = DEFAULT_STORAGE) -> list[dict[str, Any]]:
    """Every parameter that has no codes: name, number of values, stored bits, reason."""
    whole = [
        {
            "name": la.name,
            "n_values": la.n_weights,
            "stored_bits": storage.layer_total(la, bit_map.weights[la.name], bit_map.format_of(la.name)),
            "reason": "the map asks for full precision",
        }
        for la in table
        if bit_map.weights[la.name].ndim == 0 and int(bit_map.weights[la.name]) == FULL_PRECISION
    ]
    kept = [
        {
            "name": k.name,
            "n_values": k.n_values,
            "stored_bits": storage.full_precision_bits * k.n_values,
            "reason": k.reason,
        }
        for k in table.kept
    ]
    return whole + kept


def _codes(layer: LayerSpec, bits: int, fmt: QuantFormat, storage: StorageModel) -> int:
    """Bits of the codes of one channel: what is left of the stored bits when the row's scale and zero point are taken
    off."""
    stored = storage.channel_bits(layer, bits, fmt, mixed=False)
    return stored if bits == FULL_PRECISION else stored - fmt.scale_bits - fmt.zero_point_bits(bits)
