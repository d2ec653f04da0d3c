from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqsearch.toml_text import dump_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=12)


@given(st.dictionaries(TEXT, VALUES))
def test_what_is_written_is_read_back(data: dict[str, Any]) -> None:
    assert tomllib.loads(dump_toml(data)) == data


@pytest.mark.parametrize(
    "value", ["emoji \U0001f600", 'a "b" \\ \t\n\r\x00\x1f\x7f', math.inf, -math.inf, 5e-324, 2**70]
)
def test_awkward_values(value: object) -> None:
    back = tomllib.loads(dump_toml({"a": value, "t": {"b": [value]}}))
    assert back == {"a": value, "t": {"b": [value]}}
    assert type(back["a"]) is type(value)


def test_nan_stays_a_number_that_is_none() -> None:
    assert math.isnan(tomllib.loads(dump_toml({"a": math.nan}))["a"])


def test_none_is_left_out_of_tables_and_refused_in_lists() -> None:
    assert tomllib.loads(dump_toml({"a": None, "b": {"c": None}})) == {"b": {}}
    with pytest.raises(TypeError, match="no value for None"):
        dump_toml({"a": [None]})
