"""What comes from outside: files of JSON and TOML, their shapes, regular expressions, names that become paths, and text
that is printed.

Every room reads such things through here, so that each is bounded in size, depth and time and ends in one message that
names the file, the place in it, what was found and what is allowed. The shapes are those of the dataclasses and
``TypedDict`` themselves, see `build`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import re
import reprlib
import stat
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from mpqsearch.errors import ArtifactError, ConfigError, MpqsearchError, nearest, shown

MAX_BYTES = 32 * 2**20
"""Size of a text file. What Python makes of one takes up to 30 times as much memory."""

MAX_DEPTH = 100
"""Nesting of lists and objects in a file."""

MAX_INTEGER = 2**63 - 1

MAX_SHOWN = 80
"""Characters of a value that a message quotes."""

T = TypeVar("T")
Problem = type[MpqsearchError]


def read_bytes(path: Path, problem: Problem = ArtifactError, limit: int = MAX_BYTES) -> bytes:
    """The content of a file of at most ``limit`` bytes. Raises ``problem`` for anything else."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise problem(f"{path} is no file")
        if found.st_size > limit:
            raise problem(f"{path} has {found.st_size:,} bytes; a text file of at most {limit:,} is needed")
        return path.read_bytes()
    except FileNotFoundError:
        raise problem(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise problem(f"{path!s} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path, problem: Problem = ArtifactError, *, infinite: bool = False) -> Any:
    """The JSON of a file; see `parse_json`."""
    return parse_json(read_bytes(path, problem), str(path), problem, infinite=infinite)


def read_toml(path: Path) -> dict[str, Any]:
    """The TOML of a file. Raises `ConfigError` for one that is missing, too large, no UTF-8 or no TOML."""
    try:
        text = read_bytes(path, ConfigError).decode("utf-8-sig")  # with the mark of editors on Windows
        if _LONG_KEY.search(text):
            raise _too_deep(str(path), ConfigError)
        data = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8, which TOML is: {error.reason}. Save it as UTF-8.") from error
    except RecursionError:
        raise _too_deep(str(path), ConfigError) from None
    except ValueError as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from error
    _check_depth(data, str(path), ConfigError)
    return data


_LONG_KEY = re.compile(rf"(?<![^\s.,=\[\]{{}}#])(?:[^\s.,=\[\]{{}}#]+[ \t]*\.[ \t]*){{{MAX_DEPTH}}}")
"""A key of so many parts that reading it takes the square of its length. It is looked for at the beginnings of words
alone, or a long word would take the square of its length, too."""


def parse_json(text: str | bytes, where: str, problem: Problem = ArtifactError, *, infinite: bool = False) -> Any:
    """JSON as the standard has it: no NaN, no infinity, no number beyond 64 bits, no key twice, no half of a surrogate
    pair, at most `MAX_DEPTH` levels. Raises ``problem`` for anything else.

    ``infinite`` lets infinities pass, which diffusers writes into the configurations of some schedulers.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=partial(_constant, infinite),
        )
        if _HALVES.search(text if isinstance(text, bytes) else text.encode()):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _too_deep(where, problem) from None
    except ValueError as error:
        raise problem(f"{where} is damaged or no valid JSON: {error}") from error
    _check_depth(value, where, problem)
    return value


_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escapes of surrogates, which may be halves of a pair."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {quoted(next(k for k in keys if keys.count(k) > 1))} appears twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > MAX_INTEGER:
        raise ValueError(f"the number {text[:20]}... is beyond 64 bits")
    return number


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is beyond 64 bits")
    return number


def _constant(infinite: bool, name: str) -> float:
    if infinite and name != "NaN":
        return float(name)
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(value: Any, where: str, problem: Problem) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [x for x in level if isinstance(x, (dict, list))]
        if not level:
            return
        level = [inner for x in level for inner in (x.values() if isinstance(x, dict) else x)]
    raise _too_deep(where, problem)


def _too_deep(where: str, problem: Problem) -> MpqsearchError:
    return problem(f"{where} is nested deeper than {MAX_DEPTH} levels: it is damaged, or no file of this kind")


def build(kind: type[T], value: Any, where: str = "", problem: Problem = ArtifactError) -> T:
    """``value``, plain data of a file, as ``kind``: a dataclass, a ``TypedDict`` or another type, whose own annotations
    say what is allowed.

    Types are checked before anything is made. An integer is a float, too; True is no integer; lists become tuples. A
    dataclass takes the keys that it names and no others; a ``TypedDict`` keeps those that it does not name, as they
    are. ``where``: the file. Raises ``problem`` with the place of the first thing that is wrong, and for what ``kind``
    itself refuses.
    """
    try:
        made: T = _maker(typing.cast(Any, kind))(value)
    except _Wrong as wrong:
        place = "".join(wrong.path).lstrip(".")
        raise problem(": ".join(filter(None, (where, f"{place} {wrong.text}".lstrip())))) from None
    except MpqsearchError as error:
        if isinstance(error, problem) and not where:
            raise
        raise problem(f"{where}: {error}".removeprefix(": ")) from error
    return made


@contextmanager
def said_of(path: Path) -> Iterator[None]:
    """Any error of ours becomes an `ArtifactError` that names the file it is about."""
    try:
        yield
    except MpqsearchError as error:
        raise ArtifactError(f"{path}: {error}") from error


class _Wrong(Exception):  # noqa: N818 - it never leaves this module
    """What is wrong with a value, and the steps to its place, innermost last."""

    def __init__(self, text: str) -> None:
        self.text, self.path = text, list[str]()

    def at(self, step: str) -> _Wrong:
        self.path.insert(0, step)
        return self


Maker = Callable[[Any], Any]


@cache
def _maker(kind: Any) -> Maker:
    """What turns plain data into ``kind``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return lambda value: value
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _table_maker(kind)
    if origin in (types.UnionType, typing.Union):
        return _union_maker(arguments)
    if origin is tuple:
        return _tuple_maker(_maker(arguments[0]), None if Ellipsis in arguments else len(arguments))
    if origin is typing.Literal:
        return _literal_maker(arguments)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping_maker(_maker(arguments[1]))
    if origin is not None:
        return _tuple_maker(_maker(arguments[0]), None) if issubclass(origin, Sequence) else _plain_maker(origin)
    return {float: _as_float, int: _as_int}.get(kind) or _plain_maker(kind)


def _plain_maker(kind: type) -> Maker:
    def make(value: Any) -> Any:
        if not isinstance(value, kind):
            raise _should_be(_WORDS.get(kind, kind.__name__), value)
        return value

    return make


_WORDS = {str: "str", bool: "bool", dict: "a table", list: "a list"}


def _as_int(value: Any) -> int:
    if type(value) is not int or abs(value) > MAX_INTEGER:
        raise _should_be("int", value)
    return value


def _as_float(value: Any) -> float:
    if type(value) is float:
        return value
    if type(value) is not int or abs(value) > MAX_INTEGER:
        raise _should_be("float", value)
    return float(value)


def _literal_maker(allowed: tuple[Any, ...]) -> Maker:
    def make(value: Any) -> Any:
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise _should_be(" or ".join(map(repr, allowed)), value)
        return value

    return make


def _union_maker(kinds: tuple[Any, ...]) -> Maker:
    makers = [_maker(k) for k in kinds if k is not types.NoneType]

    def make(value: Any) -> Any:
        if value is None and types.NoneType in kinds:
            return None
        for maker in makers[:-1]:
            try:
                return maker(value)
            except _Wrong:
                continue
        return makers[-1](value)

    return make


def _tuple_maker(inner: Maker, length: int | None) -> Maker:
    def make(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _should_be("a list", value)
        if length is not None and len(value) != length:
            raise _Wrong(f"should have {length} entries, got {len(value)}")
        made = []
        for item in value:
            try:
                made.append(inner(item))
            except _Wrong as wrong:
                raise wrong.at(f"[{len(made)}]") from None
        return tuple(made)

    return make


def _mapping_maker(inner: Maker) -> Maker:
    def make(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _should_be("a table", value)
        made = {}
        for key, item in value.items():
            try:
                made[str(key)] = inner(item)
            except _Wrong as wrong:
                raise wrong.at(f".{shown(str(key))}") from None
        return made

    return make


def _table_maker(kind: Any) -> Maker:
    """Of a dataclass, whose keys are all known; or of a ``TypedDict``, which keeps others."""
    hints = typing.get_type_hints(kind)
    closed = dataclasses.is_dataclass(kind)
    if closed:
        fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
        makers = {name: _maker(hints[name]) for name in fields}
        missing = dataclasses.MISSING
        needed = [n for n, f in fields.items() if f.default is missing and f.default_factory is missing]
    else:
        marked = typing.get_type_hints(kind, include_extras=True)  # its own sets are wrong where hints are strings
        makers = {name: _maker(hint) for name, hint in hints.items()}
        needed = [n for n in hints if kind.__total__ and typing.get_origin(marked[n]) is not typing.NotRequired]

    def make(value: Any) -> Any:
        if closed and isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise _should_be("a table", value)
        made = {}
        for key, item in value.items():
            maker = makers.get(key)
            if maker is None:
                if closed:
                    raise _unknown(str(key), makers)
                made[key] = item
                continue
            try:
                made[key] = maker(item)
            except _Wrong as wrong:
                raise wrong.at(f".{key}") from None
        for name in needed:
            if name not in made:
                raise _Wrong(f"lacks the key {name!r}")
        return kind(**made) if closed else made

    return make


def _should_be(what: str, value: Any) -> _Wrong:
    return _Wrong(f"should be {what}, got {quoted(value)}")


def _unknown(key: str, known: Mapping[str, Any]) -> _Wrong:
    near = nearest(key, known)
    hint = f" (did you mean {near!r}?)" if near else ""
    return _Wrong(f"holds the unknown key {quoted(key)}{hint}. Known here: {', '.join(sorted(known))}.")


def fits(name: str, wildcards: str) -> bool:
    """Whether a name fits a pattern with ``*``, ``?`` and ``[...]``. One longer than `MAX_PATTERN` fits nothing: it
    would be read in a time that grows with the square of its length."""
    return len(wildcards) <= MAX_PATTERN and fnmatch.fnmatchcase(name, wildcards)


MAX_PATTERN = 1000
"""Characters of a pattern with wildcards."""


def file_name(name: str, what: str, problem: Problem = ConfigError) -> str:
    """``name`` when it can be that of one file or folder on any system, and leads nowhere else; ``what`` it is the name
    of. Raises ``problem`` otherwise."""
    stem = name.partition(".")[0].upper()
    bad = not name or name != shown(name) or _SEPARATOR.search(name) or name.strip(". ") == "" or stem in _DEVICES
    if bad or len(name.encode()) > MAX_NAME:
        raise problem(
            f"{what} names a file or folder, and {quoted(name)} cannot be one: at most {MAX_NAME} bytes without "
            "separators, colons and control characters are. Rename it."
        )
    return name


MAX_NAME = 200
"""Bytes of the name of a file; file systems take 255, with what is added to it."""

_SEPARATOR = re.compile(r"[/\\:\x00]")
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))}
"""Names that Windows keeps for devices."""


def cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table that programs read: texts are `shown`, and a spreadsheet takes none for a formula."""
    return {key: _cell(value) if isinstance(value, str) else value for key, value in row.items()}


def _cell(text: str) -> str:
    return f"'{shown(text)}" if text.startswith(("=", "+", "-", "@")) and len(text) > 1 else shown(text)


_SHORT = reprlib.Repr()
"""Bounded in time, too: a file may hold the same list in itself many times over, so that all of it has no end."""
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxstring = 4, 10, 10, 10, MAX_SHOWN


def quoted(value: Any) -> str:
    """A value for a message: shortened and without control characters."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = _SHORT.repr(value) if isinstance(value, (dict, list, tuple)) else repr(value)
    return shown(text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}...")
