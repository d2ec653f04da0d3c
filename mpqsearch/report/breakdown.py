"""Where the bytes of a map go. Bits are counted in `mpqsearch.core.stored`; here they are only sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable, Policy
from mpqsearch.core.stored import TAG_BITS, mapped_bits

TITLES = {
    "codes": "codes of searched layers",
    "scales": "scales and zero points",
    "tags": "channel tags",
    "fixed": "layers fixed by the policy",
    "full_precision": "weight layers at full precision",
    "kept": "norms, biases and other parameters",
}


def size_breakdown(table: LayerTable, bit_map: BitMap, policy: Policy | None = None) -> dict[str, int]:
    """Stored bits of a model by what they are for (`TITLES`); together they are `mpqsearch.core.size_bits`.

    ``scales`` hold zero points, shared exponents and smoothing factors too. ``fixed`` is everything of the layers that
    the policy holds at a quantized width; without a policy there are none.
    """
    bit_map.validate(table)
    parts = dict.fromkeys(TITLES, 0) | {"kept": FULL_PRECISION * table.n_kept}
    for layer in table:
        bits = mapped_bits(layer, bit_map)
        if bits.unquantized:
            parts["full_precision"] += bits.total
        elif policy is not None and policy.fixed_width(layer) is not None:
            parts["fixed"] += bits.total
        else:
            tags = TAG_BITS * layer.n_channels if bit_map.weights[layer.name].ndim else 0
            parts["codes"] += bits.payload
            parts["tags"] += tags
            parts["scales"] += bits.metadata - tags
    return parts


def breakdown_rows(table: LayerTable, maps: Mapping[str, BitMap], policy: Policy | None = None) -> list[dict[str, str]]:
    """A row of kB for each of several maps, with the total and the average bits."""
    rows = []
    for label, bit_map in maps.items():
        parts = size_breakdown(table, bit_map, policy)
        total = sum(parts.values())
        sizes = {title: f"{parts[key] / 8000:,.2f}" for key, title in TITLES.items()}
        sizes |= {"total": f"{total / 8000:,.2f}", "bits per parameter": f"{total / table.n_parameters:.3f}"}
        rows.append({"map": label, **sizes})
    return rows


_EXPORT_SIZES = {
    "ideal_bytes": "ideal kB of the map",
    "accounted_bytes": "kB in the target's format",
    "stored_bytes": "kB found in the file",
    "header_bytes": "kB of headers",
}


def export_rows(exports: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each export: ideal, accounted and found kB side by side, and the error of what it delivers beside that
    of the target's uniform file of its size."""
    return [
        {
            "target": row["target"],
            "map": row["map"],
            **{t: f"{row[key] / 1000:,.2f}" if row[key] != "" else "" for key, t in _EXPORT_SIZES.items()},
            "stored bits per parameter": f"{row['stored_bits_per_parameter']:.3f}",
            "weights": row["weights"],
            "verified": row["verified"],
            "error": _error(row["error"]),
            "best uniform": " ".join(filter(None, (row["uniform"], _error(row["uniform_error"])))),
        }
        for row in exports
    ]


def _error(value: float | str) -> str:
    return "" if value == "" else f"{value:.3g}"
