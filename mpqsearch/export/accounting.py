"""How the stored bits of a map add up, layer by layer. Every number comes from `mpqsearch.core.stored`."""

from __future__ import annotations

from typing import Any

from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable, size_bits
from mpqsearch.core.formats import SCALE_BITS
from mpqsearch.core.stored import LAYER_BITS, TAG_BITS, mapped_bits

STORAGE = {
    "tag_bits": TAG_BITS,
    "layer_bits": LAYER_BITS,
    "full_precision_bits": FULL_PRECISION,
    "activation_scale_bits": SCALE_BITS,
}
"""Bits that are stored beside the codes, as the file names them."""


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
        "storage": STORAGE,
        "payload_bits": payload,
        "metadata_bits": sum(b.metadata for b in layers.values()),
        "unquantized_bits": sum(b.unquantized for b in layers.values()) + FULL_PRECISION * table.n_kept,
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
    kept = [(k.name, k.n_values, FULL_PRECISION * k.n_values, k.reason) for k in table.kept]
    return [dict(zip(("name", "n_values", "stored_bits", "reason"), row, strict=True)) for row in whole + kept]
