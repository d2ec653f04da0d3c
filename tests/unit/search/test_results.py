from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError
from mpqsearch.report import render, save_figure
from mpqsearch.report.search import arms_table, fresh_entries, search_drawings, search_notes
from mpqsearch.search.measure import Measurements
from mpqsearch.search.objective import Objective
from mpqsearch.search.results import (
    measured_points,
    rebuilt,
    summarize,
    top_k,
    trials_csv,
)
from mpqsearch.search.study import Plan, finished_trials, open_study, work
from mpqsearch.search.surrogate import Candidate
from tests.support.searches import objective

Finished = tuple[Objective, optuna.Study]


@pytest.fixture(scope="module")
def finished() -> Finished:
    o = objective()
    plan = Plan(name="s", trials=16, pruner="none", starts=o.space.starts(), context=o.context)
    study = open_study(plan, optuna.storages.InMemoryStorage())
    work(study, plan, o)
    return o, study


def test_chosen_maps_stand_beside_their_arms_at_the_same_size(finished: Finished) -> None:
    o, study = finished
    data, chosen = summarize(o, study)
    json.dumps(data, allow_nan=False)
    assert data["trials"] == 16
    for entry in data["budgets"]:
        rows, budget = {r["arm"]: r for r in entry["rows"]}, Budget.parse(entry["budget"])
        assert list(rows) == ["uniform", "plain", "search"]
        limit = budget.limit_bits(o.surrogate.table, o.surrogate.policy)
        assert all(r["size_bytes"] * 8 <= limit + 8 for r in rows.values())
        best = min(p["error"] for p in data["points"] if p["budget"] == entry["budget"])
        assert rows["search"]["error"] == pytest.approx(best)
        assert entry["ratio_to_uniform"] == pytest.approx(best / rows["uniform"]["error"])
        assert not entry["worse_than_plain"]
        candidate = chosen[entry["budget"]]
        assert candidate.bit_map.digest == rows["search"]["bit_map"]
        assert o.measurements.error(candidate) == pytest.approx(best)
    assert 0 < data["forwards"] <= 16 * 16 * 10


def test_a_map_that_measures_worse_than_uniform_is_named(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    o, study = finished
    honest = Measurements.report
    uniform = {o.surrogate.uniform(b).digest for b in o.budgets}

    def fresh(self: Measurements, candidate: Candidate) -> dict[str, float]:  # uniform turns out ahead on fresh seeds
        return honest(self, candidate) | ({"error": 1e-9} if candidate.digest in uniform else {})

    monkeypatch.setattr(Measurements, "report", fresh)
    data, _ = summarize(o, study)
    assert all(b["worse_than_uniform"] for b in data["budgets"])
    assert all("(worse than uniform)" in r["arm"] for r in arms_table(data) if r["arm"].startswith("search"))


def test_maps_are_rebuilt_from_their_points(finished: Finished) -> None:
    o, study = finished
    points, budget = measured_points(finished_trials(study)), o.budgets[0]
    best = top_k(o, points, budget, 3)
    assert [p["error"] for p in best] == sorted(p["error"] for p in best)
    assert all(p["candidate"].digest == p["digest"] for p in best)
    with pytest.raises(ConfigError, match="Search again"):
        rebuilt(o, {**best[0], "digest": "0" * 64}, budget)


def test_the_table_of_trials_holds_every_trial(finished: Finished) -> None:
    _, study = finished
    rows = list(csv.DictReader(io.StringIO(trials_csv(study))))
    assert [int(r["number"]) for r in rows] == list(range(16))
    assert {r["state"] for r in rows} <= {"COMPLETE", "PRUNED"}
    assert {"exponent", "granularity"} <= set(rows[0])
    assert [float(r["value"]) for r in rows] == [t.value for t in study.get_trials()]


def test_figures_and_tables_show_the_data(finished: Finished, tmp_path: Path) -> None:
    o, study = finished
    data, _ = summarize(o, study)
    drawings = search_drawings(data)
    assert "search_front" in {d.key for d in drawings}
    notes = search_notes(data)
    assert len(notes) == len(fresh_entries(data)) + len(data["predicted_vs_measured"])
    assert f"{data['budgets'][0]['fresh_ratio_to_uniform']:.3f} on fresh ones" in notes[0]
    one_budget = search_drawings(data | {"budgets": data["budgets"][:1]})
    assert "search_front" not in {d.key for d in one_budget}, "one budget is a column of points"
    paths = [path for d in drawings for path in save_figure(render(d.draw), tmp_path / d.key)]
    assert len(paths) == 2 * len(drawings)
    assert all(p.stat().st_size > 2000 for p in paths)


def test_final_seeds_choose_among_the_top_k_and_the_plain_program(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    o, study = finished
    points, budget = measured_points(finished_trials(study)), o.budgets[0]
    plain = o.surrogate.candidate({}, budget).digest
    first, second = [p["digest"] for p in top_k(o, points, budget, 5) if p["digest"] != plain][:2]
    o = dataclasses.replace(o, measurements=dataclasses.replace(o.measurements, final=(900, 901)))
    errors: dict[str, list[float]] = {}
    distances: dict[str, float] = {}

    def final(_self: Any, candidate: Candidate) -> tuple[float, list[float]]:
        values = errors.get(candidate.digest, [1.0, 3.0])
        return distances.get(candidate.digest, float(np.mean(values))), values

    def chosen(known: list[dict[str, Any]] = points) -> list[str]:
        return [f["digest"] for f in top_k(o, known, budget, 5)]

    monkeypatch.setattr(Measurements, "final_errors", final)
    errors[first], errors[second] = [0.9, 3.2], [0.9, 3.2]
    assert chosen()[0] == plain  # it runs whatever its place on the search seeds
    errors[first] = [0.5, 2.9]  # better by 0.3 +- 0.2: more than a standard error
    assert chosen()[0] == first
    errors[second], distances[first], distances[second] = [0.4, 2.8], 0.7, 0.6  # of two that lead, the nearer one
    assert chosen()[:2] == [second, first]
    distances[second] = 0.8
    assert chosen()[:2] == [first, second]
    distances.clear()
    errors[first], errors[second] = [0.2, 3.5], [1.0, 3.0]  # better in the mean by 0.15 +- 0.65: no evidence
    entries = top_k(o, points, budget, 5)
    assert (entries[0]["digest"], entries[0]["lead"]) == (plain, 0.0)
    assert next(f for f in entries if f["digest"] == first)["lead"] == pytest.approx(0.15 / 0.65)
    unmeasured = [p for p in points if p["digest"] != plain]
    assert plain in chosen(unmeasured)  # it takes part though no trial found it


def test_final_seeds_are_not_search_seeds(finished: Finished) -> None:
    measurements = finished[0].measurements
    with pytest.raises(ConfigError, match="choose twice"):
        dataclasses.replace(measurements, final=measurements.seeds[:1])
