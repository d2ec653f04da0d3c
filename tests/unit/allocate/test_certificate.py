"""The check of an answer by arithmetic of its own: what it accepts, what it refuses, how fast it refuses."""

from __future__ import annotations

import ast
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpqsearch.allocate import (
    Certificate,
    CostBudget,
    certificate,
    check_certificate,
    solve,
    table_digests,
)
from mpqsearch.untrusted import build
from tests.support.problems import grouped, problem_of


def problem(**changes):
    rng = np.random.default_rng(4)
    given = {
        "loss": np.sort(rng.random((12, 4)), axis=1)[:, ::-1],
        "cost": np.sort(rng.integers(1, 90, (12, 4)), axis=1),
        "limit": 600,
    }
    return problem_of(**(given | changes))


def test_it_shares_nothing_with_the_solvers():
    """Only the problem's own type is named, for the type checker."""
    tree = ast.parse(Path(certificate.__file__).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    names = {alias.name if isinstance(node, ast.Import) else node.module for node in imported for alias in node.names}
    assert names <= {
        "__future__",
        "math",
        "numpy",
        "numpy.typing",
        "collections.abc",
        "dataclasses",
        "itertools",
        "typing",
        "mpqsearch.allocate.problem",
    }
    assert not any(isinstance(node, ast.Attribute) and node.attr in ("evaluate", "permits") for node in ast.walk(tree))


def test_a_certificate_survives_json():
    asked = problem()
    result = solve(asked)
    written = result.certificate(asked)
    read = build(Certificate, json.loads(json.dumps(written.to_data())))
    assert read == written
    assert check_certificate(read, asked, result.choice).valid


def test_a_wrong_cost_is_never_certified():
    """Met: a true cost of 23 over a limit of 20 was certified, because the check shared the pass that costs."""
    asked = problem_of(loss=np.array([[1.0, 0.0]] * 2), cost=np.array([[10, 13], [10, 10]]), limit=20)
    honest = solve(asked).certificate(asked)
    forged = replace(honest, loss=0.0, costs={"cost": 20})
    check = check_certificate(forged, asked, [1, 1])
    assert not check.valid
    assert check.problem == "cost is 23, the certificate says 20"
    assert check_certificate(replace(forged, costs={"cost": 23}), asked, [1, 1]).problem == (
        "cost is 23, above the limit 20"
    )


FORGERIES = {
    "loss": lambda c: replace(c, loss=c.loss * 1.001),
    "smaller loss": lambda c: replace(c, loss=c.loss * 0.999),
    "cost": lambda c: replace(c, costs={"cost": c.costs["cost"] - 1}),
    "limit": lambda c: replace(c, limits={"cost": c.limits["cost"] + 1}),
    "bound": lambda c: replace(c, bound=c.loss * 0.9999),
    "negative multiplier": lambda c: replace(c, multipliers={"cost": -1.0}),
    "infinite multiplier": lambda c: replace(c, multipliers={"cost": float("inf")}),
    "no multiplier": lambda c: replace(c, multipliers={}),
    "other budget": lambda c: replace(c, limits={"bops": 3}),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_every_forged_number_is_refused(what):
    asked = problem(limit=407)
    result = solve(asked)
    honest = result.certificate(asked)
    assert check_certificate(honest, asked, result.choice).valid
    assert check_certificate(honest, asked, result.choice).gap > 2e-4, "the bound must leave room for the forgery"
    assert not check_certificate(FORGERIES[what](honest), asked, result.choice).valid


@pytest.mark.parametrize(
    ("rule", "choice", "words"),
    [
        ({"allowed": np.arange(4) < np.full((12, 1), 3)}, [3] + [0] * 11, "not allowed"),
        ({"groups": grouped(12, [0, 1])}, [1] + [0] * 11, "group 0 has the choices"),
        ({"max_formats": 2}, [0, 1, 2] + [0] * 9, "3 formats are used"),
        ({"max_formats_per_layer": 1, "layer": np.repeat([0, 1], 6)}, [1] + [0] * 11, "layer 0 uses 2"),
        ({}, [0] * 11, "for each of 12 items"),
        ({}, [4] + [0] * 11, "for each of 12 items"),
    ],
)
def test_every_broken_rule_is_named(rule, choice, words):
    asked = problem(**rule)
    loss = sum(asked.loss[i, min(c, 3)] for i, c in enumerate(choice))
    cost = sum(int(asked.budgets[0].cost[i, min(c, 3)]) for i, c in enumerate(choice))
    claims = replace(solve(asked).certificate(asked), loss=loss, costs={"cost": cost})
    assert words in check_certificate(claims, asked, choice).problem


def test_a_wrong_certificate_of_many_items_ends_at_once():
    """Met: the check of a wrong answer went on to enumerate for more than a minute at 20,000 items."""
    rng = np.random.default_rng(0)
    loss, cost = rng.random((20_000, 7)), np.sort(rng.integers(1, 10**6, (20_000, 7)), axis=1)
    asked = problem_of(loss=loss, cost=cost, limit=int(cost[:, 3].sum()))
    result = solve(asked)
    honest = result.certificate(asked)
    assert check_certificate(honest, asked, result.choice).valid
    started = time.process_time()
    assert not check_certificate(replace(honest, loss=honest.loss * 1.01), asked, result.choice).valid
    assert time.process_time() - started < 0.5


def test_digests_are_of_what_counts():
    """The same numbers in another type and order of memory have the same digests; every change of a rule has others."""
    asked = problem()
    same = problem(loss=np.asfortranarray(asked.loss), cost=asked.budgets[0].cost.astype(np.int32))
    assert table_digests(asked) == table_digests(same)
    allowed = np.ones((12, 4), dtype=bool)
    assert table_digests(problem(allowed=allowed)) == table_digests(asked)
    allowed[3, 3] = False
    others = [
        problem(allowed=allowed),
        problem(groups=grouped(12, [0, 1])),
        problem(max_formats=2),
        problem(max_formats_per_layer=2, layer=np.zeros(12, dtype=int)),
        problem(more=(CostBudget(name="bops", cost=asked.budgets[0].cost, limit=900),)),
    ]
    digests = [json.dumps(table_digests(one)) for one in (asked, *others)]
    assert len(set(digests)) == len(digests)
