"""What a file of another quantizer says of widths, and what that means for the layers of a model.

Each of `SOURCES` is a function ``read(path, table)``, which gives a `Reading`, or None when the file is none of its
own, and follows the rules of the consumer: exact names, patterns, kinds, shapes. `read_map` asks them all, or the named
one, and makes a `BitMap` of the answer.
"""

from __future__ import annotations

import difflib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mpqsearch import untrusted
from mpqsearch.artifacts import read_json
from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable, QuantFormat
from mpqsearch.core.formats import WIDTHS
from mpqsearch.errors import ArtifactError, ConfigError, LayerMismatchError, UnknownNameError
from mpqsearch.specs.targets import SOURCES
from mpqsearch.untrusted import build

log = logging.getLogger("mpqsearch")

FLOATS = ("float", "fp16", "fp32", "bf16", "none", "")
"""Names that consumers have for weights that are left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one file says: ``widths`` by layer; layers that it leaves out keep full precision. ``names`` are those that
    it spells out, all of which the model must have. ``bit_map``: a whole map, for our own format; it then stands for
    all the rest. ``notes``: what was in the file and is lost."""

    widths: Mapping[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    bit_map: BitMap | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A map that was read: ``source`` is the target whose format it was in, ``notes`` say what the file held beyond
    it."""

    bit_map: BitMap
    source: str
    notes: tuple[str, ...]


def import_map(path: str | Path, table: LayerTable, source: str | None = None) -> BitMap:
    """The widths that a file or folder of another quantizer gives to the layers of ``table``, as a bit map in the
    asymmetric scheme; what the file holds beyond them is logged as a warning. Raises what `read_map` raises."""
    imported = read_map(path, table, source)
    for note in imported.notes:
        log.warning("%s, read as %s: %s", path, imported.source, note)
    return imported.bit_map


def read_map(
    path: str | Path, table: LayerTable, source: str | None = None, fmt: QuantFormat | None = None
) -> Imported:
    """Read the widths that a file or folder of another quantizer gives to the layers of ``table``.

    ``source``: the target whose format it is; None: found out. ``fmt``: what the widths shall mean here (default: the
    asymmetric scheme), since scales and codes of the file are not taken over.

    Raises `ArtifactError` when there is no such file, when it is damaged or of no known format; `ConfigError` when it
    fits several; `UnknownNameError` for an unknown ``source``; `LayerMismatchError`, naming them, for layers that the
    model does not have or widths that do not exist.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; a file or folder with another quantizer's configuration is needed")
    readings = _readings(path, table, source)
    if not readings:
        known = ", ".join(SOURCES)
        asked = f"of the format {source!r}" if source else f"that is known ({known})"
        hint = "Leave --from out to have it looked for." if source else "Say which with --from."
        raise ArtifactError(f"{path} holds no bit map {asked}. {hint}")
    if len(readings) > 1:
        raise ConfigError(f"{path} can be read as {' and as '.join(readings)}. Say which with --from.")
    name, reading = next(iter(readings.items()))
    notes = list(reading.notes)
    if reading.bit_map is None:
        weights = {n: np.array(w, dtype=np.uint8) for n, w in resolve(reading, table, str(path)).items()}
        bit_map = BitMap(model_digest=table.digest, weights=weights, format=fmt or QuantFormat())
    else:
        bit_map = reading.bit_map
        if bit_map.model_digest != table.digest:
            notes.append(f"it was made for other weights ({bit_map.model_digest[:12]}) of a model with the same layers")
            bit_map = replace(bit_map, model_digest=table.digest)
    bit_map.validate(table)
    return Imported(bit_map=bit_map, source=name, notes=tuple(notes))


def resolve(reading: Reading, table: LayerTable, where: str) -> dict[str, int]:
    """Width of every layer of ``table``. Raises `LayerMismatchError` for names and widths that do not exist, or when
    nothing is quantized."""
    unknown = [n for n in reading.names if n not in table.by_name]
    if unknown:
        near = difflib.get_close_matches(unknown[0], table.by_name, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise LayerMismatchError(
            f"{where} names the layer {unknown[0]!r}{hint}{more}, which {table.model or 'the model'!r} does not have. "
            "Is it for another model, or does it use the names of another checkpoint?"
        )
    widths = {layer.name: reading.widths.get(layer.name, FULL_PRECISION) for layer in table}
    wrong = [n for n, w in widths.items() if w not in (*WIDTHS, FULL_PRECISION)]
    if wrong:
        more = f" and {len(wrong) - 1} layers more" if len(wrong) > 1 else ""
        raise LayerMismatchError(
            f"{where} gives {wrong[0]!r}{more} {widths[wrong[0]]} bits; widths are 1 to 8, or 16 for full precision"
        )
    if all(w == FULL_PRECISION for w in widths.values()):
        raise LayerMismatchError(f"{where} quantizes no layer of {table.model or 'the model'!r}")
    return widths


def by_name(widths: Mapping[str, int], notes: Iterable[str] = ()) -> Reading:
    """A file that spells every layer out; names at full precision need not be layers here."""
    return Reading(widths=widths, names=tuple(n for n, w in widths.items() if w != FULL_PRECISION), notes=tuple(notes))


def json_at(path: Path, *names: str) -> Any:
    """The JSON of ``path``, or of the first of ``names`` in the folder ``path``; None when there is none.

    Raises `ArtifactError` for a damaged file.
    """
    if path.is_dir():
        path = next((path / n for n in names if (path / n).is_file()), path)
    return untrusted.read_json(path) if path.exists() and path.suffix == ".json" else None


def quantization_config(path: Path, method: str) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a model folder or file when it is of this ``quant_method``."""
    data = json_at(path, "config.json", "quantization_config.json", "quantize_config.json")
    config = data.get("quantization_config", data) if isinstance(data, Mapping) else None
    if not isinstance(config, Mapping) or str(config.get("quant_method", "")).replace("_", "-") != method:
        return None
    return config


MATCHING_S = 5.0
"""Processor time that matching the expressions of one file may take."""

_PLAIN = re.compile(r"\^?(?:\.\*)?(?:[\w :/-]|\\\W|\.(?!\*))*(?:\.\*)?\$?")
"""Expressions that match in a time that grows with the length of a name, or its square."""

_spent = [0.0]


class Pattern:
    """A regular expression of an imported file: one that takes too long ends in an `ArtifactError` and never hangs."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self._plain = re.compile(text) if _PLAIN.fullmatch(text) else None
        self._limited = None if self._plain else _limited(text)

    def search(self, name: str) -> bool:
        """Whether it is found in ``name``."""
        return self._found("search", name)

    def match(self, name: str) -> bool:
        """Whether ``name`` begins with it."""
        return self._found("match", name)

    def fullmatch(self, name: str) -> bool:
        """Whether it is all of ``name``."""
        return self._found("fullmatch", name)

    def _found(self, how: str, name: str) -> bool:
        if self._limited is None:
            return getattr(self._plain, how)(name) is not None
        began = time.process_time()
        try:
            found = getattr(self._limited, how)(name, timeout=max(MATCHING_S - _spent[0], 1e-3))
        except TimeoutError:
            raise ArtifactError(
                f"{self.where}: matching its expressions takes more than {MATCHING_S:g} s, of which "
                f"{untrusted.quoted(self.text)} is one. Simplify it."
            ) from None
        _spent[0] += time.process_time() - began
        return found is not None


def _limited(text: str) -> Any:
    import regex

    return regex.compile(text, regex.VERSION0)


@cache
def pattern_of(text: str, where: str) -> Pattern:
    """A regular expression of an imported file. Raises `ArtifactError` when it is none."""
    import regex

    try:
        return Pattern(str(text), where)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{where}: {untrusted.quoted(text)} is no regular expression ({error})") from error


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
    return FULL_PRECISION if int(number[1]) in (16, 32) else int(number[1])


def number_of_bits(value: Any) -> int:
    """A width in a file: a whole number. Raises `ArtifactError` for anything else; 16 and more is full precision."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ArtifactError(f"{value!r} is no number of bits")
    return min(int(value), FULL_PRECISION)


def float_note(names: Mapping[str, Any]) -> tuple[str, ...]:
    """A note for layers in 8-bit floats or 4-bit floats: here their width stands for integers."""
    floats = sorted(n for n, t in names.items() if re.search(r"(float|fp|nf|mx)_?[48]", str(t).lower()))
    if not floats:
        return ()
    return (f"{len(floats)} layers are in floats there, such as {floats[0]!r}: here the same width in integers",)


class _Manifest(TypedDict):
    target: str


def _readings(path: Path, table: LayerTable, source: str | None) -> dict[str, Reading]:
    if source is not None and source not in SOURCES:
        raise UnknownNameError("source of a bit map", source, SOURCES)
    if source is None and (path / "export.json").is_file():  # a folder of our own: it says what it is
        source = build(_Manifest, read_json(path / "export.json", "mpqsearch/export").data, str(path))["target"]
    readings = {}
    for name in SOURCES if source is None else [source]:
        reading = _read_as(name, path, table)
        if reading is not None:
            readings[name] = reading
    return readings if len(readings) == 1 else {n: r for n, r in readings.items() if n != "neutral"}


def _read_as(name: str, path: Path, table: LayerTable) -> Reading | None:
    """The reading of one source. Raises `ArtifactError` for a file whose parts are of other types than it has."""
    module, _, function = SOURCES[name].partition(":")
    read: Callable[[Path, LayerTable], Reading | None] = getattr(import_module(module), function)
    _spent[0] = 0.0
    try:
        return read(path, table)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read as a map of {name}: {type(error).__name__}: {str(error)[:200]}. Is it damaged?"
        ) from error
