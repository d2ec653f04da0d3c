"""Paths and explanations on problems small enough to read."""

from __future__ import annotations

import numpy as np
import pytest

from mpqsearch.allocate import (
    CostBudget,
    PairwiseTerms,
    check_certificate,
    explain,
    solve,
    solve_path,
)
from mpqsearch.errors import ConfigError
from tests.support.problems import changed, grouped, problem_of

NAMES = ("a", "b", "c")


def problem(**changes):
    """Item a gains 8 then 2 per unit, b 4 then 1, c nothing at all."""
    given = {
        "loss": np.array([[10.0, 2.0, 0.0], [5.0, 1.0, 0.0], [7.0, 7.0, 7.0]]),
        "cost": np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]]),
        "limit": 5,
        "names": NAMES,
    }
    return problem_of(**(given | changes))


def test_the_path_lists_every_vertex():
    path = solve_path(problem())
    assert path.budgets.tolist() == [3, 4, 5, 6, 7]
    assert path.losses.tolist() == [22.0, 14.0, 10.0, 8.0, 7.0]
    assert path.rates.tolist() == [8.0, 4.0, 2.0, 1.0, 0.0]
    assert path.choice(2).tolist() == [1, 1, 0]
    assert [path.vertex(limit) for limit in (2, 3, 5, 100)] == [-1, 0, 2, 4]
    assert path.lower_bound(5) == 10.0


def test_the_path_certifies_what_lies_between_two_vertices():
    path = solve_path(problem(cost=np.array([[2, 4, 6]] * 3)))
    assert path.losses[path.vertex(9)] == 14.0
    assert path.lower_bound(9) == 12.0


def test_the_path_refuses_what_it_cannot_order():
    more = (CostBudget(name="bops", cost=np.ones((3, 3), dtype=int), limit=3),)
    with pytest.raises(ConfigError, match="one budget"):
        solve_path(problem(more=more))


def test_explanation_of_the_next_step():
    asked = problem()
    steps = explain(asked, solve(asked).choice)
    assert [step.name for step in steps] == ["a", "b", "c"]
    first, second, last = steps
    assert (first.next_choice, first.saved) == ("choice 2", 2.0)
    assert (first.rate, second.rate) == (2.0, 1.0)
    assert (last.next_choice, last.rate) == (None, 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_layers_are_told_what_their_channels_are_told(seed):
    rng = np.random.default_rng(seed)
    loss, cost = rng.random((40, 4)), np.sort(rng.integers(1, 90, (40, 4)), axis=1)
    allowed = rng.random((40, 4)) < 0.8
    allowed[:, 1] = True
    allowed[3] = np.arange(4) == 1
    layer = rng.integers(0, 5, 40)
    asked = problem_of(loss=loss, cost=cost, limit=int(cost[:, 2].sum()), allowed=allowed)
    result = solve(asked)
    by_item = {int(step.name.split()[1]): step for step in explain(asked, result.choice)}
    told = explain(asked, result.choice, layer, [f"layer {n}" for n in range(5)])
    assert [one.rate for one in told] == sorted((one.rate for one in told), reverse=True)
    for one in told:
        items = [by_item[i] for i in np.flatnonzero(layer == int(one.name.split()[1])).tolist()]
        best = max(items, key=lambda item: item.rate)
        assert one.loss == pytest.approx(sum(item.loss for item in items), rel=1e-12)
        assert one.cost == sum(item.cost for item in items)
        assert (one.rate, one.saved, one.extra_cost) == (best.rate, best.saved, best.extra_cost)


def test_the_items_of_a_group_step_together():
    asked = problem(groups=grouped(3, [0, 1]), limit=6)  # (1, 1, 0) costs 5; the next step of the pair saves 3 for 2
    result = solve(asked)
    assert explain(asked, result.choice)[0].name == "a, b"
    told = explain(asked, result.choice, np.array([0, 1, 1]), ["first", "second"])
    assert [(one.name, one.saved, one.extra_cost, one.rate) for one in told] == [
        ("first", 3.0, 2, 1.5),
        ("second", 3.0, 2, 1.5),
    ]
    assert [(one.loss, one.cost) for one in told] == [(2.0, 2), (8.0, 3)]


def test_pairs_end_in_a_heuristic_without_a_bound():
    """Couplings far larger than the losses, losses that may be negative."""
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(40, 1)
    value = rng.normal(size=(len(first), 4, 4)) * 10
    cost = rng.integers(1, 9, (40, 1)) * np.arange(1, 5)
    asked = problem_of(
        loss=rng.random((40, 4)),
        cost=cost,
        limit=int(cost[:, 2].sum()),
        pairwise=PairwiseTerms(first=first, second=second, value=value),
    )
    answer = solve(asked)
    assert answer.status == "heuristic"
    assert answer.lower_bound == -np.inf
    assert answer.loss < 0.5 * asked.evaluate(solve(changed(asked, pairwise=None)).choice)[0] < 0
    assert check_certificate(answer.certificate(asked), asked, answer.choice).valid
