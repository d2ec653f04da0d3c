from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError
from mpqsearch.report.search import arms_table, search_drawings, search_tables, write_search_figures
from mpqsearch.search.objective import Objective
from mpqsearch.search.refine import RefineSpec
from mpqsearch.search.results import (
    Box,
    finalists,
    finished_trials,
    measured_points,
    refine_winners,
    summarize,
    trials_as_lines,
    winner_candidates,
)
from mpqsearch.search.study import Plan, objective_of, open_study, work
from mpqsearch.search.surrogate import Candidate


@pytest.fixture(scope="module")
def finished() -> tuple[Objective, optuna.Study]:
    from mpqsearch.search.cache import EvaluationCache
    from mpqsearch.search.ladder import Ladder
    from mpqsearch.search.space import parse_space
    from tests.support.synthetic import SyntheticEvaluator
    from tests.unit.search.conftest import BUDGETS, SPACE, surrogate

    s = surrogate()
    ladder = Ladder(
        evaluator=SyntheticEvaluator(table=s.table, profile=s.profile),
        seeds=(0, 1, 2, 3),
        chunk=2,
        cache=EvaluationCache(),
    )
    o = Objective(surrogate=s, space=parse_space(SPACE), ladder=ladder, budgets=BUDGETS)
    plan = Plan(name="s", trials=16, starts=o.space.starts(), context=o.context)
    study = open_study(plan, optuna.storages.InMemoryStorage())
    work(study, plan, objective_of(o, "front"))
    return o, study


def test_winners_stand_beside_their_arms_at_the_same_size(finished: tuple[Objective, optuna.Study]) -> None:
    o, study = finished
    data = summarize(o, study, repeats=2)
    json.dumps(data, allow_nan=False)
    assert data["trials"] == 16
    for entry in data["budgets"]:
        rows = {r["arm"]: r for r in entry["rows"]}
        assert set(rows) >= {"uniform", "random", "shuffled", "kurtosis", "plain", "search"}
        assert len(rows["random"]["paired_each"]) == 2
        budget = Budget.parse(entry["budget"])
        assert all(
            r["size_bytes"] * 8 <= budget.limit_bits(o.surrogate.table, o.surrogate.policy) + 8 for r in rows.values()
        )
        best = min(p["paired"] for p in data["points"] if p["budget"] == entry["budget"])
        assert rows["search"]["paired"] == pytest.approx(best)
        assert entry["ratio_to_uniform"] == pytest.approx(best / rows["uniform"]["paired"])
        assert not entry["worse_than_plain"]
    assert data["hypervolume"]["search"] >= data["hypervolume"]["plain"]
    volumes = [r["hypervolume"] for r in data["history"]]
    assert np.diff(volumes).min() > -1e-12  # sums in another order differ by rounding
    assert volumes[-1] == pytest.approx(data["hypervolume"]["search"])
    assert [r["forwards"] for r in data["history"]] == sorted(r["forwards"] for r in data["history"])


def test_a_map_that_measures_worse_than_uniform_is_named(
    finished: tuple[Objective, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    o, study = finished
    honest = o.ladder.report
    uniform = {o.uniform(b).digest for b in o.budgets}

    def fresh(candidate: object) -> dict[str, float]:  # on the report seeds the uniform map turns out ahead
        values = honest(candidate)
        return values | {"error": 1e-9} if candidate.digest in uniform else values

    monkeypatch.setattr(o.ladder, "report", fresh)
    data = summarize(o, study, repeats=1)
    assert all(b["worse_than_uniform"] for b in data["budgets"])
    assert all("(worse than uniform)" in r["arm"] for r in arms_table(data) if r["arm"].startswith("search ("))


def test_the_box_depends_on_no_search(finished: tuple[Objective, optuna.Study]) -> None:
    o, _ = finished
    box = Box.of(o)
    low = o.uniform(o.budgets[0])
    top = o.ladder.paired_error(low)
    assert box.hypervolume([]) == 0.0
    assert box.hypervolume([(low.average_bits, top)]) == 0.0  # the corner itself
    half = box.hypervolume([(low.average_bits, top * 1e-2)])
    assert half == pytest.approx(0.5)  # half of the four decades, over the whole breadth
    middle = (box.bits[0] + box.bits[1]) / 2
    assert box.hypervolume([(middle, top * 1e-4)]) == pytest.approx(0.5)
    assert box.hypervolume([(low.average_bits, top * 1e-9)]) == pytest.approx(1.0)


def test_winners_are_rebuilt_from_their_points(finished: tuple[Objective, optuna.Study]) -> None:
    o, study = finished
    points = measured_points(finished_trials(study))
    best = winner_candidates(o, points, o.budgets[0], 3)
    assert [p["paired"] for p in best] == sorted(p["paired"] for p in best)
    assert all(p["candidate"].digest == p["digest"] for p in best)
    forged = [{**p, "digest": "0" * 64} for p in points]
    with pytest.raises(ConfigError, match="Search again"):
        winner_candidates(o, forged, o.budgets[0], 1)


def test_the_archive_holds_every_trial(finished: tuple[Objective, optuna.Study]) -> None:
    _, study = finished
    lines = [json.loads(line) for line in trials_as_lines(study).splitlines()]
    assert [t["number"] for t in lines] == list(range(16))
    assert all(math.isfinite(t["values"][0]) for t in lines)
    assert all(t["attributes"]["record"]["points"] for t in lines)


def test_figures_and_tables_show_the_data(finished: tuple[Objective, optuna.Study], tmp_path: Path) -> None:
    o, study = finished
    data = summarize(o, study, repeats=1)
    drawings = search_drawings(data)
    assert {d[0] for d in drawings} >= {
        "search_front",
        "search_history_forwards",
        "search_history_trials",
        "search_parallel",
        "search_fresh_seeds",
    }
    paths = write_search_figures(tmp_path, data)
    assert len(paths) == 2 * len(drawings)
    assert all(p.stat().st_size > 2000 for p in paths)
    tables = {k: list(csv.DictReader(io.StringIO(text))) for k, text in search_tables(data).items()}
    assert len(tables["history"]) == 16
    assert {r["arm"] for r in tables["arms"]} >= {"uniform", "plain", "search"}
    np.testing.assert_allclose([float(r["paired"]) for r in tables["points"]], [p["paired"] for p in data["points"]])


def test_the_front_of_two_objectives_has_a_winner_at_each_budget(make_objective: Callable[..., Objective]) -> None:
    o = make_objective()
    plan = Plan(
        name="p", mode="pareto", trials=12, starts=[{**o.space.default_point(), "target_bits": 2.0}], context=o.context
    )
    study = open_study(plan, optuna.storages.InMemoryStorage())
    work(study, plan, o.pareto)
    data = summarize(o, study, repeats=1)
    for entry, budget in zip(data["budgets"], o.budgets, strict=True):
        winner = next(r for r in entry["rows"] if r["arm"] == "search")
        assert winner["size_bytes"] * 8 <= budget.limit_bits(o.surrogate.table, o.surrogate.policy) + 8


def test_final_seeds_choose_among_the_best_few_and_the_plain_program(
    finished: tuple[Objective, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    o, study = finished
    points, budget = measured_points(finished_trials(study)), o.budgets[0]
    best = [w["digest"] for w in winner_candidates(o, points, budget, 2)]
    assert [f["digest"] for f in finalists(o, points, budget, 2)] == best

    plain = o.surrogate.candidate({}, budget).digest
    monkeypatch.setattr(o.ladder, "final", (900, 901))
    errors = {plain: (1.0, 3.0), **{d: (0.9, 3.2) for d in best if d != plain}}
    distances: dict[str, float] = {}

    def final(candidate: Candidate) -> tuple[float, tuple[float, ...]]:
        found = errors[candidate.digest]
        return distances.get(candidate.digest, float(np.mean(found))), found

    monkeypatch.setattr(o.ladder, "final_errors", final)
    chosen = finalists(o, points, budget, 2)
    assert chosen[0]["digest"] == plain  # it runs whatever its place on the search seeds
    assert set(best) <= {f["digest"] for f in chosen}
    better = next(d for d in best if d != plain)
    errors[better] = (0.5, 2.9)  # better by 0.3 +- 0.2: more than a standard error
    assert finalists(o, points, budget, 2)[0]["digest"] == better
    third = "x"
    errors[third], distances[better], distances[third] = (0.4, 2.8), 0.7, 0.6  # of two that lead, the nearer one
    other = {
        **next(p for p in points if p["digest"] == better),
        "digest": third,
        "candidate": SimpleNamespace(digest=third),
    }
    assert [f["digest"] for f in finalists(o, points, budget, 2, [other])][:2] == [third, better]
    distances[third] = 0.8
    assert [f["digest"] for f in finalists(o, points, budget, 2, [other])][:2] == [better, third]
    distances.clear()
    errors[better] = (0.2, 3.5)  # better in the mean by 0.15 +- 0.65: no evidence
    chosen = finalists(o, points, budget, 2)
    assert chosen[0]["digest"] == plain
    assert chosen[0]["lead"] == 0.0
    assert next(f for f in chosen if f["digest"] == better)["lead"] == pytest.approx(0.15 / 0.65)
    unmeasured = [
        p for p in points if p["digest"] != plain
    ]  # the plain program's map takes part though no trial found it
    assert plain in {f["digest"] for f in finalists(o, unmeasured, budget, 2)}


def test_refined_winners_stand_in_the_summary(finished: tuple[Objective, optuna.Study]) -> None:
    o, study = finished
    o = dataclasses.replace(o, ladder=dataclasses.replace(o.ladder, final=(900, 901, 902, 903)))
    spec = RefineSpec(rounds=3, slope_samples=8, samples=8, batch=2)
    refined = refine_winners(o, study, spec, n_finalists=2, first_seed=1000)
    assert set(refined) == {b.label() for b in o.budgets}
    assert any(r.moved for r in refined.values())
    data = summarize(o, study, repeats=1, n_finalists=2, refined=refined)
    json.dumps(data, allow_nan=False)
    for entry in data["budgets"]:
        found = refined[entry["budget"]]
        row = next(r for r in entry["rows"] if r["arm"] == "search")
        assert entry["refinement"]["forwards"] == found.forwards
        assert row["refined"] == entry["refined"] == (row["digest"] == found.candidate.digest and found.moved)
        assert row["lead"] > 1 or row["digest"] == o.surrogate.candidate({}, Budget.parse(entry["budget"])).digest
    assert refine_winners(o, study, RefineSpec(rounds=0), n_finalists=2, first_seed=1000) == {}


def test_final_seeds_are_not_search_seeds(finished: tuple[Objective, optuna.Study]) -> None:
    ladder = finished[0].ladder
    with pytest.raises(ConfigError, match="choose twice"):
        dataclasses.replace(ladder, final=ladder.seeds[:1])
