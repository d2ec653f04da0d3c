from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpqsearch.config import config_from
from mpqsearch.core import Budget, MetricValue, StudyRecord
from mpqsearch.errors import UnknownNameError
from mpqsearch.stages import Run, whole
from mpqsearch.stages.searched import search_results
from tests.support.tiny import tiny_profile, tiny_table

METHODS = [{"name": "uniform", "allocator": "uniform"}, {"name": "ilp", "allocator": "ilp-layer"}]


def value(number: float) -> MetricValue:
    return MetricValue(
        name="FD",
        value=number,
        n_samples=4,
        seeds="0..3",
        extractor="x",
        reference="y",
        low=number,
        high=number,
        spread="bootstrap",
    )


def record(method: str, bits: int) -> StudyRecord:
    return StudyRecord(
        model="tiny",
        method=method,
        granularity="layer",
        budget=f"uniform:{bits}",
        quantity="uniform_bits",
        average_bits=bits,
        size_bytes=100,
        act_bits=16.0,
        bit_map_digest=f"{method}{bits}",
        n_samples=4,
        seeds="0..3",
        seconds=1.0,
        predicted_loss=1.0,
        metrics={"fd_fp": value(2.0)},
    )


@pytest.mark.parametrize(("budgets", "expected"), [([], [2, 3]), (["uniform:3"], [3])])
def test_trained_maps_stand_beside_the_untrained_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budgets: list[str], expected: list[int]
) -> None:
    asked: list[tuple[str, str]] = []

    def train(_run: Run, method: str, budget: Budget) -> dict[str, Any]:
        asked.append((method, budget.label()))
        return {"before": {"fd_fp": value(2.0).to_data()}, "after": {"fd_fp": value(0.5).to_data()}}

    monkeypatch.setattr(whole, "distill", train)
    config = config_from(
        {
            "methods": METHODS,
            "allocate": {"budgets": ["uniform:2", "uniform:3"]},
            "distill": {"methods": ["ilp"], "budgets": budgets},
        }
    )
    table = tiny_table()
    records = [record(m, b) for b in (2, 3) for m in ("uniform", "ilp")]
    run = Run(config=config, folder=tmp_path)
    run.table, run.profile = table, tiny_profile(table)
    made = whole.trained(run, records)
    assert [(r.method, r.budget) for r in made] == [("ilp+trd", f"uniform:{b}") for b in expected]
    assert asked == [("ilp", f"uniform:{b}") for b in expected]
    for r in made:
        assert r.metrics["fd_fp"].value == 0.5
        assert r.bit_map_digest == "ilp" + r.budget.removeprefix("uniform:")  # the same map, so the same bytes


def test_nothing_is_trained_unless_it_is_named(tmp_path: Path) -> None:
    run = Run(config=config_from({"methods": METHODS}), folder=tmp_path)
    assert whole.trained(run, [record("ilp", 3)]) == []
    with pytest.raises(UnknownNameError, match="distill.methods"):
        config_from({"methods": METHODS, "distill": {"methods": ["ilpp"]}})


def test_a_report_says_that_a_search_is_missing(tmp_path: Path) -> None:
    said: list[str] = []
    methods = [{"name": "ilp", "allocator": "ilp-layer"}]
    for trials in (0, 2):
        config = config_from({"methods": methods, "search": {"trials": trials}})
        assert search_results(Run(config=config, folder=tmp_path, say=said.append)) is None
    (text,) = said
    assert "search.json is not there or not whole: mpqsearch search" in text
