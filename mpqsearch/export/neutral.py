"""The neutral bit map: one JSON that names every layer with its shape, widths, settings and stored bits, and adds up.

It is the file that `mpqsearch.artifacts.save_bit_map` writes, given what `neutral_extra` returns; any tool that reads
JSON can follow it without this package. ``schema/bitmap-1.schema.json`` describes version 1; one file a version.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpqsearch import untrusted
from mpqsearch.artifacts import VERSIONS, load_bit_map, read_json, save_bit_map
from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, QuantFormat, StoredBits
from mpqsearch.core.formats import WIDTHS
from mpqsearch.core.stored import layer_bits, mapped_bits
from mpqsearch.errors import ArtifactError, LayerMismatchError
from mpqsearch.export.accounting import accounting, unquantized
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.plan import plan_channels
from mpqsearch.export.reading import Reading, json_at
from mpqsearch.export.target import Target, int_choices

FILE = "bitmap.json"


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


class NeutralTarget(Target):
    """The neutral bit map as an export target: it holds every map as it is, without weights."""

    name = "neutral"
    kinds = ()
    granularity = "channel"
    holds_any_map = True
    payload = False
    inputs = True
    encoders = True
    needs_config = False

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Every width, for every layer."""
        return int_choices(WIDTHS, "uint{}")

    def cost(self, layer: LayerSpec, choice: Choice | None) -> StoredBits:
        """The ideal cost: what the bit map's own accounting gives a layer at one width, in the asymmetric format."""
        width = np.array(FULL_PRECISION if choice is None else choice.width, dtype=np.uint8)
        return layer_bits(layer, width, QuantFormat())

    def plan(self, job: ExportJob) -> list[PlanEntry]:
        """Every layer as asked."""
        return plan_channels(job, self)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Nothing beside the map, which every target writes."""
        return []

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Read the file again with every check of `load_neutral`."""
        neutral = load_neutral(folder / FILE)
        table = LayerTable(digest=neutral.bit_map.model_digest, layers=neutral.layers)
        plan = self.plan(ExportJob(table=table, bit_map=neutral.bit_map))
        return {"widths": {e.layer: e.will_get for e in plan}}


def write_map(folder: Path, job: ExportJob) -> list[Path]:
    """Write ``bitmap.json``, and ``bitmap.safetensors`` when there are many channel widths."""
    path, model = folder / FILE, job.denoiser
    source, class_name = ("", "") if model is None else (model.source, type(model.module).__name__)
    about: dict[str, Any] = {"provenance": job.provenance, "source": source, "class_name": class_name}
    write_neutral(path, job.table, job.bit_map, job.inputs, **about)
    sidecar = read_json(path, "mpqsearch/bitmap").data.get("sidecar")
    return [path] if sidecar is None else [path, folder / sidecar["file"]]


def read(path: Path, _table: LayerTable) -> Reading | None:
    """Our own map, whole."""
    path = path / FILE if path.is_dir() else path
    data = json_at(path)
    if not isinstance(data, Mapping) or data.get("schema") != "mpqsearch/bitmap":
        return None
    return Reading(bit_map=load_neutral(path).bit_map if "map_digest" in data["data"] else load_bit_map(path))


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
