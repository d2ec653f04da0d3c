from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from optuna.storages import InMemoryStorage

from mpqsearch.core import BitMap, Budget, average_bits
from mpqsearch.search.objective import Objective
from mpqsearch.search.results import summarize
from mpqsearch.search.space import parse_space
from mpqsearch.search.start import start_point, with_start
from mpqsearch.search.study import Plan, objective_of, open_study, work
from mpqsearch.search.surrogate import Surrogate

SPACE = parse_space({"depth": [-3.0, 3.0], "role_linear": [0.25, 4.0], "granularity": ["layer", "channel"]})


def distance(surrogate: Surrogate, one: BitMap, other: BitMap) -> float:
    """Bits by which two maps differ, averaged over weights."""
    table = surrogate.table
    apart = [
        la.n_weights * abs(float(one.weights[la.name].mean()) - float(other.weights[la.name].mean())) for la in table
    ]
    return sum(apart) / table.n_weights


@pytest.mark.parametrize("depth", [-3.0, 2.0])
def test_the_start_makes_a_map_that_is_nearer_than_the_plain_one(
    make_surrogate: Callable[..., Surrogate], depth: float
) -> None:
    """The given map was made by the program itself at a depth that the start does not know of: it is found again,
    roughly."""
    s = make_surrogate()
    theirs = s.candidate({"depth": depth}, Budget.parse("uniform:3")).bit_map
    point = start_point(s, SPACE, theirs)
    assert np.sign(point["depth"]) == np.sign(depth)
    size = Budget(quantity="average_bits", limit=average_bits(s.table, theirs))
    ours, plain = (s.candidate(p, size).bit_map for p in (SPACE.theta(point), {}))
    assert distance(s, ours, theirs) < 0.6 * distance(s, plain, theirs)


def test_the_plain_map_gives_the_plain_point(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    plain = s.candidate({}, Budget.parse("uniform:3")).bit_map
    point = start_point(s, SPACE, plain)
    assert point == {"depth": pytest.approx(0.0, abs=1e-9), "role_linear": pytest.approx(1.0), "granularity": "layer"}
    channels = s.table.layers[0].n_channels
    mixed = replace(
        plain, weights={**plain.weights, s.table.layers[0].name: np.array([2] * (channels - 1) + [3], dtype=np.uint8)}
    )
    assert start_point(s, SPACE, mixed)["granularity"] == "channel"


def test_values_stay_inside_the_space_and_small_maps_are_held(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    names = [la.name for la in s.table]
    steep = BitMap(
        model_digest=s.table.digest,
        weights={n: np.array(8 if i < 7 else 1, dtype=np.uint8) for i, n in enumerate(names)},
        format=s.format,
    )
    point = start_point(s, SPACE, steep)
    assert all(d.holds(point[d.name]) for d in SPACE.active)
    assert point["depth"] == -3.0
    least = BitMap(
        model_digest=s.table.digest, weights={n: np.array(1, dtype=np.uint8) for n in names}, format=s.format
    )
    assert all(d.holds(start_point(s, SPACE, least)[d.name]) for d in SPACE.active)
    assert with_start([{"a": 1}, {"a": 2}], {"a": 3}) == [{"a": 1}, {"a": 3}, {"a": 2}]


def test_the_start_is_a_row_where_it_fits(make_objective: Callable[..., Objective]) -> None:
    objective = make_objective(space={"depth": [-3.0, 3.0]})
    s = objective.surrogate
    theirs = s.candidate({"depth": 2.0}, Budget.parse("uniform:3")).bit_map
    plan = Plan(
        name="x", trials=3, starts=with_start(objective.space.starts(), start_point(s, objective.space, theirs))
    )
    study = open_study(plan, InMemoryStorage())
    work(study, plan, objective_of(objective, plan.mode))
    second = study.get_trials()[1]
    assert second.params["depth"] == pytest.approx(start_point(s, objective.space, theirs)["depth"])
    data = summarize(objective, study, start=theirs)
    rows = {b["budget"]: {r["arm"] for r in b["rows"]} for b in data["budgets"]}
    assert "start" not in rows["uniform:2.5"], "it is larger than that budget"
    assert "start" in rows["uniform:3.5"]
    entry = data["budgets"][1]
    start = next(r for r in entry["rows"] if r["arm"] == "start")
    assert start["bit_map"] == theirs.digest
    assert entry["worse_than_start"] == (entry["ratio_to_start"] > 1)
