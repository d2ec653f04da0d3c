"""Every key of a study with its type, unit, default, meaning and an example.

All of it is read from the dataclasses that hold the keys; nothing is written twice. Their docstrings have entries like

    samples [samples]
        Samples of each map. Example: ``64``.

with the unit in brackets where there is one. The example may be left out where the default is one.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mpqsearch.config import DEFAULT_METHODS, Config
from mpqsearch.toml_text import toml_text

_ENTRY = re.compile(r"(\w+(?:, \w+)*)(?: \[(.+)\])?")
_PARAGRAPH = re.compile(r"\w+(?:, \w+)*(?: \[.+\])?\n    ")
_EXAMPLE = re.compile(r"\s*Example: ``(.+?)``\.")
_WORDS = {int: "integer", float: "float", bool: "boolean", str: "string", Any: "value"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One key. ``type`` is in the words of TOML; ``default`` and ``example`` are in its notation, and ``default`` is
    empty for a key that is not set, ``required`` for one that must be."""

    table: str
    name: str
    type: str
    unit: str
    default: str
    meaning: str
    example: str

    @property
    def key(self) -> str:
        """As ``--set`` takes it."""
        return f"{self.table}.{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of a study, in the order of `Config`: ``about`` is its purpose in a sentence or two."""

    name: str
    about: str
    settings: tuple[Setting, ...]


@cache
def tables() -> tuple[Table, ...]:
    """All tables of a study."""
    return tuple(_tables(Config, ""))


def settings() -> dict[str, Setting]:
    """All keys of a study that ``--set`` takes; those of ``[[methods]]`` stand in a file only."""
    return {s.key: s for table in tables() if table.name != "methods" for s in table.settings}


def _tables(kind: type[Any], prefix: str) -> Iterator[Table]:
    """The tables in a dataclass, deeper ones after what holds them."""
    for field, hint in _fields(kind):
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            name = prefix + field.name
            yield Table(name=name, about=_about(inner), settings=tuple(_settings(inner, name)))
            yield from _tables(inner, f"{name}.")


def _settings(kind: type[Any], table: str) -> Iterator[Setting]:
    entries = _documented(kind)
    for field, hint in _fields(kind):
        if dataclasses.is_dataclass(hint):
            continue
        unit, text = entries.get(field.name, ("", ""))
        default, shown = _default(field), _EXAMPLE.search(text)
        yield Setting(
            table=table,
            name=field.name,
            type=_type(hint),
            unit=unit,
            default=default,
            meaning=_EXAMPLE.sub("", text),
            example=shown[1] if shown else "" if default in ("", "required", '""', "[]", "{}") else default,
        )


def _fields(kind: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(kind)
    return [(field, hints[field.name]) for field in dataclasses.fields(kind)]


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "required" if made is dataclasses.MISSING else "" if made is None else toml_text(made)


def _about(kind: type[Any]) -> str:
    """The paragraphs before the entries, in one line each."""
    text = (inspect.getdoc(kind) or "").split("\n\n")
    kept = [part for part in text if not _PARAGRAPH.match(part) and not part.startswith("Raises")]
    return "\n\n".join(" ".join(part.split()) for part in kept)


def _documented(kind: type[Any]) -> dict[str, tuple[str, str]]:
    """Unit and meaning by field, those of base classes too."""
    names, texts, units = set(kind.__dataclass_fields__), dict[str, list[str]](), dict[str, str]()
    for owner in reversed(kind.__mro__):
        entry: list[str] = []
        for line in inspect.cleandoc(owner.__doc__ or "").splitlines():
            head = _ENTRY.fullmatch(line)
            if head and names.issuperset(head[1].split(", ")):
                entry = []
                texts |= dict.fromkeys(head[1].split(", "), entry)
                units |= dict.fromkeys(head[1].split(", "), head[2] or "")
            elif line.startswith("    "):
                entry.append(line.strip())
            elif line:
                entry = []
    return {name: (units[name], " ".join(lines)) for name, lines in texts.items()}


def _type(hint: Any, end: str = "") -> str:
    """A type in the words of TOML; ``end`` is the s of the plural."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _type(arguments[0], end)
    if origin is tuple:
        return f"array{end} of {_type(arguments[0], 's')}"
    if origin is not None and issubclass(origin, Mapping):
        return f"table{end} of {_type(arguments[1], 's')}"
    return _WORDS[hint] + end


def default_methods() -> str:
    """The methods of a study that names none, as TOML."""
    rows = [method.facts() for method in DEFAULT_METHODS]
    return "\n".join("[[methods]]\n" + "\n".join(f"{k} = {toml_text(v)}" for k, v in row.items()) for row in rows)
