"""Files of prompts: text, CSV, JSON lines, and the JSON and YAML files of the field's prompt sets."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.specs.prompts import COLUMNS
from mpqsearch.untrusted import parse_json, quoted, read_bytes

LIMIT_BYTES = 200_000_000
"""The largest file that is read."""

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that no prompt has: control characters but tab and line end, and halves of surrogate pairs."""

Row = tuple[str, str, Any]
"""Where in the file a row is, for messages; the image's name, or nothing; a prompt, or values by column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What one sample shows: a text with what it should not show, or a class.

    ``name``: the image's name in its prompt set. ``noise_seed``: seeds the sample's noise; see `Prompts.of`.
    """

    text: str = ""
    negative: str = ""
    label: int | None = None
    name: str = ""
    noise_seed: int = 0


def name_seed(name: str) -> int:
    """The seed that deepcompressor (SVDQuant) gives the image of this name: its characters' code points as the digits
    of a number in base 31, modulo the prime 1,000,000,007."""
    seed = 0
    for character in name:
        seed = (31 * seed + ord(character)) % 1_000_000_007
    return seed


def read_file(path: Path, columns: Mapping[str, str]) -> list[Prompt]:
    """All prompts of a file, in its order; ``columns`` as in `PromptsSpec`.

    Raises `ConfigError`, naming the line, for a file that is missing, empty, too large or of another encoding, for an
    empty prompt, a missing column, or control characters.
    """
    if path.suffix.lower() not in READERS:
        raise UnknownNameError("format of a file of prompts", path.suffix or path.name, READERS, f"({path})")
    text = _text(path)
    prompts = [
        _prompt(row, name, f"{path}, {where}", columns) for where, name, row in READERS[path.suffix.lower()](text, path)
    ]
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts


def _text(path: Path) -> str:
    data = read_bytes(path, ConfigError, LIMIT_BYTES)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in data[:2]:
        raise ConfigError(f"{path} is UTF-16. Save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path.name}")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); perhaps Latin-1 or Windows-1252. "
            f"Save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        ) from error


def _lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.rstrip("\n").split("\n") if text.strip() else (), 1):
        if not line.strip():
            raise ConfigError(f"{path}, line {number} is empty; a file of prompts has one a line. Delete it.")
        yield f"line {number}", "", line


def _table(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        for values in filter(None, reader):
            if len(values) != len(header):
                raise ConfigError(
                    f"{path}, line {reader.line_num} has {len(values)} values, the header {len(header)} "
                    f"({', '.join(header)}). A prompt with commas stands in double quotes."
                )
            yield f"line {reader.line_num}", "", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num} is no valid CSV: {error}") from error


def _json_lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", "", parse_json(line, f"{path}, line {number}", ConfigError)


def _json_document(text: str, path: Path) -> Iterator[Row]:
    return _document(parse_json(text, f"{path} (one document; .jsonl has one a line)", ConfigError), path)


def _yaml_document(text: str, path: Path) -> Iterator[Row]:
    import yaml

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar is a string: a prompt "yes" is no boolean
    try:
        return _document(yaml.load(text, Loader=loader), path)  # noqa: S506 - the base loader makes no objects
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply for a file of prompts") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error


def _document(document: Any, path: Path) -> Iterator[Row]:
    """Rows, a table by image name, or the captions of COCO."""
    if isinstance(document, list):
        yield from ((f"entry {number}", "", value) for number, value in enumerate(document, 1))
    elif not isinstance(document, dict):
        raise ConfigError(f"{path} should hold a list of prompts or a table by name, not {quoted(document)}")
    elif isinstance(document.get("annotations", document.get("images")), list):
        yield from _coco(document, path)
    else:
        yield from ((f"entry {quoted(name)}", str(name), value) for name, value in document.items())


def _coco(document: Mapping[str, Any], path: Path) -> Iterator[Row]:
    """One caption an image, of the several it has the one at the image's seed modulo their number, as deepcompressor
    chooses it."""
    captions: dict[str, list[str]] = {}
    try:
        if "annotations" in document:
            names = {image["id"]: image["file_name"] for image in document.get("images", ())}
            captions = {_stem(name): [] for name in names.values()}
            for entry in document["annotations"]:
                name = _stem(names.get(entry["image_id"], str(entry["image_id"])))
                captions.setdefault(name, []).append(entry["caption"])
        else:  # Karpathy's file, whose validation split is the field's
            for image in document["images"]:
                if image.get("split", "val") == "val":
                    captions[_stem(image["filename"])] = [sentence["raw"] for sentence in image["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} looks like a file of COCO, but without captions ({error}). Those with captions are "
            "captions_val2014.json, captions_val2017.json and dataset_coco.json."
        ) from error
    for name, texts in captions.items():
        if texts:
            yield f"image {name}", name, texts[name_seed(name) % len(texts)]


def _stem(name: str) -> str:
    return name.removesuffix(".jpg").removesuffix(".png")


READERS: Mapping[str, Callable[[str, Path], Iterator[Row]]] = {
    ".txt": _lines,
    ".csv": _table,
    ".tsv": _table,
    ".jsonl": _json_lines,
    ".json": _json_document,
    ".yaml": _yaml_document,
    ".yml": _yaml_document,
}


def _prompt(row: Any, name: str, where: str, columns: Mapping[str, str]) -> Prompt:
    if isinstance(row, str):
        row, columns = {"prompt": row}, {}
    if not isinstance(row, dict):
        raise ConfigError(f"{where} should be a prompt or a table of columns, got {quoted(row)}")
    values = {what: _value(row, what, columns.get(what), where) for what in COLUMNS}
    label = _label(values.pop("label"), where)
    for what, value in values.items():
        if not isinstance(value, str):
            raise ConfigError(f"{where}: the {what} should be text, got {quoted(value)}")
        found = CONTROL.search(value)
        if found:
            raise ConfigError(f"{where}: the {what} holds the control character {found[0]!r}. Delete it.")
    if label is None and not values["prompt"].strip():
        raise ConfigError(
            f"{where}: no prompt in {columns.get('prompt') or ' or '.join(COLUMNS['prompt'])}. "
            f"Columns: {', '.join(map(str, row))}. prompts.columns.prompt names another."
        )
    return Prompt(
        text=values["prompt"],
        negative=values["negative"],
        label=label,
        name=_stem(name or values["name"]),
    )


def _value(row: Mapping[str, Any], what: str, column: str | None, where: str) -> Any:
    """The value of a column, empty text when there is none."""
    if column and column not in row:
        raise ConfigError(
            f"{where}: no column {column!r} (prompts.columns.{what}). Columns: {', '.join(map(str, row))}."
        )
    if column is None:
        names = {str(name).strip().lower(): name for name in row}
        column = next((names[usual] for usual in COLUMNS[what] if usual in names), None)
    value = row[column] if column else ""
    if what == "name" and isinstance(value, int):
        return str(value)
    return "" if value is None else value


def _label(value: Any, where: str) -> int | None:
    if value == "":
        return None
    if isinstance(value, bool) or not re.fullmatch("[0-9]{1,9}", str(value).strip(), re.ASCII):
        raise ConfigError(
            f"{where}: a label is the number of a class, from 0, got {quoted(value)}. "
            '[prompts.columns] label = "" leaves labels out.'
        )
    return int(value)
