"""The file of a bit map: one JSON that names every layer with its shape, widths, settings and stored bits, and adds up.

It is the file that `mpqsearch.artifacts.save_bit_map` writes, given what `neutral_extra` returns; any tool that reads
JSON can follow it without this package. ``schema/bitmap-1.schema.json`` describes version 1; one file a version. Every
number of bits comes from `mpqsearch.core.stored`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mpqsearch import untrusted
from mpqsearch.artifacts import VERSIONS, load_bit_map, read_json, save_bit_map
from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, size_bits
from mpqsearch.core.formats import SCALE_BITS
from mpqsearch.core.stored import LAYER_BITS, TAG_BITS, mapped_bits
from mpqsearch.errors import ArtifactError, LayerMismatchError
from mpqsearch.export.contract import ExportJob

FILE = "bitmap.json"

STORAGE = {
    "tag_bits": TAG_BITS,
    "layer_bits": LAYER_BITS,
    "full_precision_bits": FULL_PRECISION,
    "activation_scale_bits": SCALE_BITS,
}
"""Bits that are stored beside the codes, as the file names them."""


def neutral_extra(
    table: LayerTable,
    bit_map: BitMap,
    *,
    provenance: Mapping[str, Any] | None = None,
    source: str = "",
    class_name: str = "",
) -> dict[str, Any]:
    """What makes a bit map file self-explaining: pass it to ``artifacts.save_bit_map(path, bit_map, inputs, extra)``.

    Kind, shape and stored bits of every layer, parameters without codes and why, totals that add up, the
    fingerprint of the structure, and ``provenance`` (plain JSON data: command, seed, method). Raises
    `LayerMismatchError` when the map is for another model.
    """
    bit_map.validate(table)
    model = {"name": table.model, "structure": structure_digest(table)}
    model |= {k: v for k, v in (("source", source), ("class_name", class_name)) if v}
    entries = bit_map.to_data()["layers"]
    return {
        "map_digest": bit_map.digest,
        "model": model,
        "layers": {la.name: entries[la.name] | _layer_extra(la, bit_map) for la in table},
        "unquantized": unquantized(table, bit_map),
        "ties": [],  # a weight that layers share is one layer
        "accounting": accounting(table, bit_map),
        "provenance": dict(provenance or {}),
    }


def structure_digest(table: LayerTable) -> str:
    """SHA-256 over the sorted lines ``name|kind|shape`` of the weight layers: the same after weights are trained or
    re-saved."""
    return _structure((la.name, la.kind, la.weight_shape) for la in table)


@cache
def bit_map_schema(version: int = VERSIONS["mpqsearch/bitmap"]) -> dict[str, Any]:
    """The JSON Schema of one version of the neutral bit map, as shipped with the package: those that are read, by
    default the newest."""
    schema: dict[str, Any] = untrusted.read_json(Path(__file__).parent / "schema" / f"bitmap-{version}.schema.json")
    return schema


def check_schema(body: Mapping[str, Any], where: str) -> None:
    """Raise `ArtifactError` naming the first place where ``body``, a whole envelope, breaks the schema."""
    from jsonschema import Draft202012Validator

    errors = sorted(
        Draft202012Validator(bit_map_schema(int(body["version"]))).iter_errors(body),
        key=lambda e: list(map(str, e.absolute_path)),
    )
    if errors:
        place = " / ".join(map(str, errors[0].absolute_path)) or "the top level"
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ArtifactError(f"{where} is no neutral bit map: at {place}: {errors[0].message[:300]}{more}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NeutralMap:
    """A neutral file that was read and checked: the map, the layers as the file describes them, and its whole data."""

    bit_map: BitMap
    layers: tuple[LayerSpec, ...]
    data: Mapping[str, Any]


def write_neutral(path: Path, table: LayerTable, bit_map: BitMap, inputs: Mapping[str, str], **extra: Any) -> None:
    """Write the neutral file (keywords as in `neutral_extra`) and read it back, so that what is on disk is known to be
    whole."""
    save_bit_map(path, bit_map, inputs, neutral_extra(table, bit_map, **extra))
    load_neutral(path, table)


def load_neutral(path: Path, table: LayerTable | None = None) -> NeutralMap:
    """Read a neutral file: schema, sidecar, and the digests of the map and of the structure are checked.

    Raises `ArtifactError` when anything does not hold, `LayerMismatchError` when widths do not fit the shapes or
    ``table`` is another model's.
    """
    artifact = read_json(path, "mpqsearch/bitmap")
    check_schema(untrusted.read_json(path), str(path))
    data = artifact.data
    bit_map = load_bit_map(path)
    layers = tuple(_layer_spec(name, entry) for name, entry in data["layers"].items())
    _check_digests(path, data, bit_map, layers)
    bit_map.validate(LayerTable(digest=bit_map.model_digest, layers=layers))
    if table is not None:
        if structure_digest(table) != data["model"]["structure"]:
            raise LayerMismatchError(
                f"{path} is for a model of another structure ({data['model']['name']!r}) than {table.model!r}. "
                "Allocate again for it."
            )
        bit_map.validate(table)
    return NeutralMap(bit_map=bit_map, layers=layers, data=data)


def write_map(folder: Path, job: ExportJob) -> list[Path]:
    """Write ``bitmap.json``, and ``bitmap.safetensors`` when there are many channel widths."""
    path, model = folder / FILE, job.denoiser
    source, class_name = ("", "") if model is None else (model.source, type(model.module).__name__)
    about: dict[str, Any] = {"provenance": job.provenance, "source": source, "class_name": class_name}
    write_neutral(path, job.table, job.bit_map, job.inputs, **about)
    sidecar = read_json(path, "mpqsearch/bitmap").data.get("sidecar")
    return [path] if sidecar is None else [path, folder / sidecar["file"]]


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


def _layer_extra(layer: LayerSpec, bit_map: BitMap) -> dict[str, Any]:
    widths = bit_map.weights[layer.name]
    bits = mapped_bits(layer, bit_map)
    entry: dict[str, Any] = {
        "kind": layer.kind,
        "shape": list(layer.weight_shape),
        "channel_axis": layer.channel_axis,
        "groups": layer.groups,
        "payload_bits": bits.payload,
        "metadata_bits": bits.metadata,
    }
    if widths.ndim:
        entry["channel_summary"] = {str(b): n for b, n in sorted(Counter(widths.tolist()).items())}
    return entry


def _layer_spec(name: str, entry: Mapping[str, Any]) -> LayerSpec:
    return LayerSpec(
        name=name,
        kind=entry["kind"],
        weight_shape=tuple(entry["shape"]),
        channel_axis=entry["channel_axis"],
        groups=entry["groups"],
    )


def _structure(lines: Any) -> str:
    text = "\n".join(sorted(f"{name}|{kind}|{','.join(map(str, shape))}" for name, kind, shape in lines))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_digests(path: Path, data: Mapping[str, Any], bit_map: BitMap, layers: tuple[LayerSpec, ...]) -> None:
    if bit_map.digest != data["map_digest"]:
        raise ArtifactError(
            f"{path}: the widths or settings were changed after the map was written (map_digest differs)"
        )
    if _structure((la.name, la.kind, la.weight_shape) for la in layers) != data["model"]["structure"]:
        raise ArtifactError(
            f"{path}: names, kinds or shapes were changed after the map was written (model.structure differs)"
        )
