"""Plain data as TOML text: the writer that the standard library lacks. `tomllib` reads back what went in."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def dump_toml(data: Mapping[str, Any]) -> str:
    """TOML of nested tables, lists, strings, numbers and booleans; keys whose value is None are left out.

    Raises `TypeError` for a value of another kind, None inside a list included.
    """
    return "\n".join(_table(data, ())).lstrip("\n") + "\n"


def toml_value(text: str) -> Any:
    """A value in the notation of TOML; what is none, such as a bare word, is a string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _table(data: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Lines of one table: its plain values first, since a header ends it, then its tables."""
    tables = {key: value for key, value in data.items() if _is_table(value) or _is_array_of_tables(value)}
    for key, value in data.items():
        if key not in tables and value is not None:
            yield f"{_key(key)} = {toml_text(value)}"
    for key, value in tables.items():
        name = ".".join(_key(part) for part in (*path, key))
        for inner in [value] if _is_table(value) else value:
            yield f"\n[{name}]" if _is_table(value) else f"\n[[{name}]]"
            yield from _table(inner, (*path, key))


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, Mapping) for item in value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def toml_text(value: Any) -> str:
    """A value in the notation of TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)  # nan, inf, -inf are TOML as they are
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"TOML has no value for {value!r}")


def _string(text: str) -> str:
    return '"' + "".join(_ESCAPES.get(c) or (c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}") for c in text) + '"'
