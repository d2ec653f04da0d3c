"""The door: every malformed input ends in one message, quickly."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from mpqsearch.errors import ArtifactError, ConfigError, shown
from mpqsearch.untrusted import (
    MAX_BYTES,
    MAX_DEPTH,
    build,
    file_name,
    parse_json,
    quoted,
    read_bytes,
    read_json,
    read_toml,
)


@contextmanager
def quickly(seconds: float = 5.0) -> Iterator[None]:
    """Processor time of a block, which a busy machine does not stretch."""
    began = time.process_time()
    yield
    assert time.process_time() - began < seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[" * 100_000, f"deeper than {MAX_DEPTH} levels"),
        ('{"a":' * 100_000, f"deeper than {MAX_DEPTH} levels"),
        ("[" * 101 + "]" * 101, f"deeper than {MAX_DEPTH} levels"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e400]", "beyond 64 bits"),
        ("1" + "0" * 400, "beyond 64 bits"),
        ("9223372036854775808", "beyond 64 bits"),
        ("1" * 10_000, "beyond 64 bits"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' appears twice"),
        (r'"\ud800"', "surrogates not allowed"),
        (b"\xff\xfe\xfd", "no valid JSON"),
        (b'"\xc3"', "no valid JSON"),
    ],
)
def test_json_that_is_none_is_refused(text: str | bytes, message: str) -> None:
    with quickly(), pytest.raises(ArtifactError, match=f"a.json.*{message}"):
        parse_json(text, "a.json")


def test_json_of_the_standard_is_read() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"], "b": {"c": 9223372036854775807}}'
    assert parse_json(text, "") == {"a": [1, -2500.0, True, None, "\U0001f600"], "b": {"c": 2**63 - 1}}
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(nested, "") is not None


def test_infinities_of_a_schedulers_configuration_are_read_where_they_may_be() -> None:
    assert parse_json('{"lambda_min_clipped": -Infinity}', "", infinite=True) == {"lambda_min_clipped": -float("inf")}
    with pytest.raises(ArtifactError, match="NaN is no number"):
        parse_json("[NaN]", "", infinite=True)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ArtifactError, match="is no file"):
        read_json(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(tmp_path / "a\0b.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ArtifactError, match="a text file of at most"):
        read_bytes(tmp_path / "large.json")
    with pytest.raises(ConfigError, match="a text file of at most"):
        read_toml(tmp_path / "large.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ArtifactError, match="is no file"):
        read_json(tmp_path / "pipe.json")


@pytest.mark.parametrize(
    "text", ["a = = 1", "a = " + "[" * 100_000, "a = 1\na = 2", "a = '\0'", "[" + ".".join("a" * 50_000) + "]", "é = 1"]
)
def test_toml_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode())
    with quickly(), pytest.raises(ConfigError, match=r"a\.toml"):
        read_toml(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    n: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ConfigError(f"n must be at least 0, got {self.n}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    pair: tuple[int, int] = (0, 0)
    by_name: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    either: int | str = 0
    anything: Any = None


class Open(TypedDict):
    kind: Literal["a", "b"]
    n: NotRequired[int]


def test_plain_data_becomes_what_its_annotations_say() -> None:
    data = {"name": "x", "inner": {"share": 1}, "many": [{"n": 2}], "pair": [1, 2], "by_name": {"q": ["r"]}}
    made = build(Outer, data | {"either": "e", "anything": [1]})
    assert made == Outer(
        name="x",
        inner=Inner(share=1.0),
        many=(Inner(n=2),),
        pair=(1, 2),
        by_name={"q": ("r",)},
        either="e",
        anything=[1],
    )
    assert isinstance(made.inner, Inner)
    assert type(made.inner.share) is float
    assert build(Open, {"kind": "a", "more": 1}) == {"kind": "a", "more": 1}


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (Outer, None, "f: should be a table, got None"),
        (Outer, {}, "f: lacks the key 'name'"),
        (Outer, {"name": 1}, "f: name should be str, got 1"),
        (Outer, {"nam": "x"}, r"f: holds the unknown key 'nam' \(did you mean 'name'\?\)"),
        (Outer, {"name": "x", "many": [{}, {"n": True}]}, r"f: many\[1\]\.n should be int, got True"),
        (Outer, {"name": "x", "many": [{}, {"n": -1}]}, "f: n must be at least 0, got -1"),
        (Outer, {"name": "x", "inner": {"share": "1"}}, r"inner\.share should be float, got '1'"),
        (Outer, {"name": "x", "inner": {"share": 10**400}}, r"inner\.share should be float, got a number of more"),
        (Outer, {"name": "x", "pair": [1]}, "pair should have 2 entries, got 1"),
        (Outer, {"name": "x", "by_name": {"\x1b[31m": [1]}}, r"by_name\.\\x1b\[31m\[0\] should be str"),
        (Outer, {"name": "x", "either": 1.5}, "either should be str, got 1.5"),
        (Open, {"kind": "c"}, "kind should be 'a' or 'b', got 'c'"),
        (Open, {"kind": "a", "n": None}, "n should be int, got None"),
        (Open, {}, "lacks the key 'kind'"),
    ],
)
def test_other_data_is_refused_at_its_place(kind: Any, data: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        build(kind, data, "f")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "...", "a/b", "..\\b", "/etc", "C:x", "a\0", "a\n", "\u202etxt", "x" * 201, "nul.json"]
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a method names a file"):
        file_name(name, "a method")


@pytest.mark.parametrize("name", ["ilp-channel@uniform-3", "größe", "=cmd|'x'!A1", "a b", ".hidden", "a" * 200])
def test_other_names_are_taken(name: str) -> None:
    assert file_name(name, "a method") == name


def test_text_is_shown_without_control_characters() -> None:
    assert shown("a\x1b[2J\u202eb\tc é") == "a\\x1b[2J\\u202eb\\tc é"
    assert len(quoted("x" * 10_000)) <= 80
    assert "\x1b" not in quoted({"\x1b": 1})
    assert str(ArtifactError("a\x1b, line 2\nb")) == "a\\x1b, line 2\nb"
