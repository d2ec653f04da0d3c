"""What a file of another quantizer says of widths, and what that means for the layers of a model.

A target that can be imported has ``read(path)``, which gives a `Reading`, or None when the file is none of its own.
`import_map` asks them all, or the named one, and makes a `BitMap` of the answer.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpqsearch.artifacts import read_json
from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.core.formats import WIDTHS
from mpqsearch.errors import ArtifactError, ConfigError, LayerMismatchError, UnknownNameError
from mpqsearch.export.contract import EXPORTERS, get_exporter

FLOATS = ("float", "fp16", "fp32", "bf16", "none", "")
"""Names that consumers have for weights that are left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Width of every layer whose name ``pattern`` fits (`re.search`; anchors belong into it) and whose kind is one of
    ``kinds`` (empty: any)."""

    width: int
    pattern: str = ""
    kinds: tuple[str, ...] = ()

    def fits(self, layer: LayerSpec) -> bool:
        """True when the rule speaks of this layer."""
        return (not self.kinds or layer.kind in self.kinds) and re.search(self.pattern, layer.name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one file says: widths by exact name, then rules, of which the first that fits counts. Layers of which it
    says nothing keep full precision. ``bit_map``: a whole map, for our own format; it then stands for all the rest.
    ``notes``: what was in the file and is lost."""

    layers: Mapping[str, int] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    bit_map: BitMap | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A map that was read: ``source`` is the target whose format it was in, ``notes`` say what the file held beyond
    it."""

    bit_map: BitMap
    source: str
    notes: tuple[str, ...]


def import_map(path: Path, table: LayerTable, source: str | None = None, fmt: QuantFormat | None = None) -> Imported:
    """Read the widths that a file or folder of another quantizer gives to the layers of ``table``.

    ``source``: the target whose format it is; None: found out. ``fmt``: what the widths shall mean here (default: the
    asymmetric scheme), since scales and codes of the file are not taken over.

    Raises `ArtifactError` when there is no such file, when it is damaged or of no known format; `ConfigError` when it
    fits several; `UnknownNameError` for an unknown ``source``; `LayerMismatchError`, naming them, for layers that the
    model does not have or widths that do not exist.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; a file or folder with another quantizer's configuration is needed")
    found = _readings(path, source)
    if not found:
        known = ", ".join(importable())
        asked = f"of the format {source!r}" if source else f"that is known ({known})"
        raise ArtifactError(
            f"{path} holds no bit map {asked}. "
            f"{'Leave --from out to have it looked for.' if source else 'Say which with --from.'}"
        )
    if len(found) > 1:
        raise ConfigError(f"{path} can be read as {' and as '.join(found)}. Say which with --from.")
    name, reading = next(iter(found.items()))
    notes = list(reading.notes)
    if reading.bit_map is None:
        widths = resolve(reading, table, str(path))
        bit_map = BitMap(
            model_digest=table.digest,
            weights={n: np.array(w, dtype=np.uint8) for n, w in widths.items()},
            format=fmt or QuantFormat(),
        )
    else:
        bit_map = reading.bit_map
        if bit_map.model_digest != table.digest:
            notes.append(f"it was made for other weights ({bit_map.model_digest[:12]}) of a model with the same layers")
            bit_map = replace(bit_map, model_digest=table.digest)
    bit_map.validate(table)
    return Imported(bit_map=bit_map, source=name, notes=tuple(notes))


def importable() -> list[str]:
    """Targets whose files can be read."""
    return [name for name in EXPORTERS if hasattr(get_exporter(name), "read")]


def resolve(reading: Reading, table: LayerTable, where: str) -> dict[str, int]:
    """Width of every layer of ``table``. Raises `LayerMismatchError` for names and widths that do not exist, or when
    nothing is quantized."""
    unknown = [n for n, w in reading.layers.items() if n not in table.by_name and w != FULL_PRECISION]
    if unknown:
        near = difflib.get_close_matches(unknown[0], table.by_name, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise LayerMismatchError(
            f"{where} names the layer {unknown[0]!r}{hint}{more}, which {table.model or 'the model'!r} does not have. "
            "Is it for another model, "
            "or does it use the names of another checkpoint?"
        )
    widths = {}
    for layer in table:
        rule = next((r for r in reading.rules if r.fits(layer)), None)
        widths[layer.name] = reading.layers.get(layer.name, FULL_PRECISION if rule is None else rule.width)
    wrong = {n: w for n, w in widths.items() if w not in (*WIDTHS, FULL_PRECISION)}
    if wrong:
        name, width = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} layers more" if len(wrong) > 1 else ""
        raise LayerMismatchError(
            f"{where} gives {name!r}{more} {width} bits; widths are 1 to 8, or 16 for full precision"
        )
    if all(w == FULL_PRECISION for w in widths.values()):
        raise LayerMismatchError(f"{where} quantizes no layer of {table.model or 'the model'!r}")
    return widths


def json_at(path: Path, *names: str) -> Any:
    """The JSON of ``path``, or of the first of ``names`` in the folder ``path``; None when there is none.

    Raises `ArtifactError` for a damaged file.
    """
    if path.is_dir():
        path = next((path / n for n in names if (path / n).is_file()), path)
    if not path.is_file() or path.suffix != ".json":
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{path} is no valid JSON: {error}") from error


def quantization_config(path: Path, method: str) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a model folder or file when it is of this ``quant_method``."""
    data = json_at(path, "config.json", "quantization_config.json", "quantize_config.json")
    if not isinstance(data, Mapping):
        return None
    config = data.get("quantization_config", data)
    return (
        config
        if isinstance(config, Mapping) and str(config.get("quant_method", "")).replace("_", "-") == method
        else None
    )


def bits_of(name: str) -> int:
    """Width that the name of a data type says, such as ``int4``, ``qint2``, ``uint6`` or ``float8_e4m3fn``; 16 for
    those of half precision and more.

    Raises `ArtifactError` when it says none.
    """
    plain = str(name).rpartition(".")[2].lower()
    if plain in FLOATS:
        return FULL_PRECISION
    number = re.match(r"[a-z]+_?(\d+)", plain)
    if number is None:
        raise ArtifactError(f"the data type {name!r} names no width")
    return min(int(number[1]), FULL_PRECISION) if int(number[1]) in (16, 32) else int(number[1])


def float_note(names: Mapping[str, Any]) -> tuple[str, ...]:
    """A note for layers in 8-bit floats or 4-bit floats: here their width stands for integers."""
    floats = sorted(n for n, t in names.items() if re.search(r"(float|fp|nf|mx)_?[48]", str(t).lower()))
    return (
        (f"{len(floats)} layers are in floats there, such as {floats[0]!r}: here the same width in integers",)
        if floats
        else ()
    )


def _readings(path: Path, source: str | None) -> dict[str, Reading]:
    if source is not None:
        if source not in importable():
            raise UnknownNameError("source of a bit map", source, importable())
        found = {source: get_exporter(source).read(path)}  # type: ignore[attr-defined]
        return {n: r for n, r in found.items() if r is not None}
    if (path / "export.json").is_file():  # a folder of our own: it says what it is
        target = read_json(path / "export.json", "mpqsearch/export").data["target"]
        return _readings(path, target)
    found = {name: get_exporter(name).read(path) for name in importable()}  # type: ignore[attr-defined]
    held = {n: r for n, r in found.items() if r is not None}
    return held if len(held) == 1 else {n: r for n, r in held.items() if n != "neutral"}
