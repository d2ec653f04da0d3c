"""A table of the page: cells that say what they are sorted by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: its text, what it is sorted by, ``best``, ``tie`` or ``front`` beside it, and the interval
    below it."""

    text: str
    sort: Any
    mark: str = ""
    interval: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """``headings`` with their kind, ``text`` or ``number``, and rows of as many cells."""

    headings: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]


def table_of(columns: Mapping[tuple[str, str], Sequence[Cell]]) -> Table:
    """A table from its columns, by heading and kind."""
    return Table(list(columns), list(zip(*columns.values(), strict=True)))


def plain_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Rows of equal keys as a table; a column of numbers is one whose every text reads as one. None without rows."""
    if not rows:
        return None
    columns = {
        name: [f"{v:.3f}" if isinstance(v, float) else str(v) for v in (r.get(name, "") for r in rows)]
        for name in rows[0]
    }
    kinds = {name: "number" if any(t) and all(map(_is_number, t)) else "text" for name, t in columns.items()}
    return table_of(
        {(name, kinds[name]): [Cell(text, text.replace(",", "")) for text in texts] for name, texts in columns.items()}
    )


def _is_number(text: str) -> bool:
    return not text or re.fullmatch(r"-?[\d,]+(\.\d+)?(e[+-]\d+)?", text) is not None
