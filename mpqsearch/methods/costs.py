"""Costs that the user measured for each layer and width, such as latencies on the device that will run the model."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpqsearch.core.formats import FULL_PRECISION
from mpqsearch.core.shown import short_list
from mpqsearch.errors import ConfigError, shown
from mpqsearch.untrusted import quoted, read_bytes

NANOSECONDS = 1_000_000
"""Whole units of a latency in a millisecond."""

MAX_COST = 1e9
"""Milliseconds of one layer: eleven days."""

COLUMNS = ("layer", "bits", "cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Latency of each layer in whole nanoseconds, by ``(layer, bits, act_bits)``; ``act_bits`` is None throughout when
    the file has no such column."""

    source: str
    costs: Mapping[tuple[str, int, int | None], int]
    by_input: bool

    @classmethod
    def read(cls, path: str | Path) -> CostTable:
        """Read a CSV with the columns ``layer``, ``bits``, ``cost`` (milliseconds) and, if wanted, ``act_bits``.

        Raises `ConfigError` for a file that is missing, lacks a column, or holds a cell that is no number >= 0.
        """
        try:
            text = read_bytes(Path(path), ConfigError).decode("utf-8-sig")
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"cannot read the costs {path}: {error}") from error
        columns = set(rows[0]) if rows else set()
        if set(COLUMNS) - columns:
            raise ConfigError(
                f"the costs {path} need the columns {', '.join(COLUMNS)} and may have act_bits; found "
                f"{shown(', '.join(map(str, columns))) or 'nothing'}"
            )
        by_input = "act_bits" in columns
        costs: dict[tuple[str, int, int | None], int] = {}
        for line, row in enumerate(rows, start=2):
            key, cost = _row(row, f"{path}, line {line}", by_input=by_input)
            if costs.setdefault(key, cost) != cost:
                raise ConfigError(f"{path}, line {line}: {key[0]!r} at {key[1]} bits has two costs")
        return cls(source=str(path), costs=costs, by_input=by_input)

    def of(self, layer: str, bits: int, act_bits: int) -> int:
        """Nanoseconds of one layer; `require` it first."""
        return self.costs[self._key(layer, bits, act_bits)]

    def require(self, asked: Iterable[tuple[str, int, int]]) -> None:
        """Raise `ConfigError` with the rows that are missing for ``(layer, bits, act_bits)``."""
        missing = list(dict.fromkeys(key for a in asked if (key := self._key(*a)) not in self.costs))
        if missing:
            rows = [f"{n!r} at {b} bits" + ("" if a is None else f" with {a}-bit inputs") for n, b, a in missing]
            raise ConfigError(
                f"the costs {self.source} lack {short_list(rows, 5)}: measure these rows too ({FULL_PRECISION} bits: "
                "full "
                "precision), or search fewer widths"
            )

    def _key(self, layer: str, bits: int, act_bits: int) -> tuple[str, int, int | None]:
        return layer, bits, act_bits if self.by_input else None


def _row(row: Mapping[str, str | None], where: str, *, by_input: bool) -> tuple[tuple[str, int, int | None], int]:
    try:
        bits, act_bits = int(row["bits"] or ""), int(row["act_bits"] or "") if by_input else None
        cost = float(row["cost"] or "")
    except ValueError as error:
        raise ConfigError(f"{where}: bits must be whole numbers and the cost a number, got {quoted(row)}") from error
    if not 0 <= cost <= MAX_COST:
        raise ConfigError(f"{where}: a cost is at least 0 and at most {MAX_COST:g} ms, got {cost}")
    return (row["layer"] or "", bits, act_bits), round(cost * NANOSECONDS)
