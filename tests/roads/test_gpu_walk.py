"""The functions that walk all verbs on a GPU (tests/gpu), on the CPU."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mpqsearch.errors import ModelError
from tests.gpu.walk import walk, write_rows
from tests.support.roads import new_road

VERBS = ["layers", "profile", "inspect"]
"""Enough to walk; test_verbs has all of them."""


def test_verbs_are_walked_and_written_down(tmp_path: Path) -> None:
    road = new_road(tmp_path, "class-conditional")
    rows = walk(road, "tiny", "cpu", VERBS)
    assert [row.verb for row in rows] == VERBS
    assert (road.run / "profile.npz").is_file()
    write_rows(tmp_path / "out", rows)
    with (tmp_path / "out" / "verbs.csv").open() as handle:
        written = list(csv.DictReader(handle))
    assert [row["verb"] for row in written] == VERBS
    assert all(float(row["seconds"]) > 0 and float(row["peak_mb"]) > 10 for row in written)
    assert (tmp_path / "out" / "verbs.md").read_text().count("\n| tiny | cpu | ") == len(rows)


def test_a_verb_that_fails_fails_the_walk(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="recorded calls"):
        walk(new_road(tmp_path, "recorded"), "tiny", "cpu", ["evaluate"])
