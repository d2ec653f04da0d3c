"""What a problem refuses, and in which words."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mpqsearch.allocate import CostBudget, PairwiseTerms, solve, solve_path
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, NumericsError
from tests.support.problems import changed, grouped, problem_of

NAMES = ("conv_in", "attn.to_q", "attn.to_k")


def problem(**changes):
    given = {
        "loss": np.array([[3.0, 2.0, 1.0]] * 3),
        "cost": np.array([[2, 3, 4]] * 3),
        "limit": 9,
        "names": NAMES,
        "choices": ("int2", "int3", "int4"),
    }
    return problem_of(**(given | changes))


def table(value, cell=(1, 2), dtype=float):
    values = np.ones((3, 3), dtype=dtype)
    values[cell] = value
    return values


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"loss": table(np.nan)}, NumericsError, r"'attn.to_q', 'int4'.*nan"),
        ({"loss": table(np.inf)}, NumericsError, r"'attn.to_q', 'int4'.*inf"),
        ({"loss": table(-1.0)}, NumericsError, r"'attn.to_q', 'int4'.*-1"),
        ({"loss": np.ones(3)}, ConfigError, "shape"),
        ({"loss": np.full((3, 3), "a")}, ConfigError, "real numbers"),
        ({"cost": np.ones((3, 2), dtype=int)}, ConfigError, "shape"),
        ({"cost": np.ones((3, 3))}, ConfigError, "integers"),
        ({"cost": table(-5, dtype=int)}, ConfigError, r"'attn.to_q', 'int4'.*-5"),
        ({"cost": table(2**62, dtype=int)}, ConfigError, "larger unit"),
        ({"limit": float("nan")}, ConfigError, "finite"),
        ({"limit": "big"}, ConfigError, "whole number"),
        ({"names": ("a", "b")}, ConfigError, "2 entries"),
        ({"allowed": np.ones((3, 3))}, ConfigError, "booleans"),
        ({"allowed": np.array([[True] * 3, [False] * 3, [True] * 3])}, ConfigError, "'attn.to_q' has no allowed"),
        ({"groups": np.array([0, 0])}, ConfigError, "3 integers >= -1"),
        ({"groups": np.array([0, 0, -2])}, ConfigError, "3 integers >= -1"),
        ({"loss": table(1.7e308)}, NumericsError, "too large.*Divide all losses"),
        ({"max_formats": 0}, ConfigError, "max_formats must be a whole number >= 1"),
        ({"max_formats_per_layer": 2}, ConfigError, "needs the layer"),
        ({"max_formats_per_layer": 2, "layer": np.zeros(2, int)}, ConfigError, "array of 3 integers >= 0"),
        ({"more": (CostBudget(name="cost", cost=np.ones((3, 3), int), limit=1),)}, ConfigError, "own name"),
    ],
)
def test_refusals_name_the_place(changes, error, words):
    with pytest.raises(error, match=words):
        problem(**changes)


def test_cells_that_are_not_allowed_may_hold_anything():
    loss, allowed = table(np.nan), np.ones((3, 3), dtype=bool)
    allowed[1, 2] = False
    assert solve(problem(loss=loss, allowed=allowed)).choice[1] != 2


def test_a_fractional_limit_is_rounded_down():
    assert problem(limit=9.99).budgets[0].limit == 9


def test_the_tables_cannot_change_under_the_certificate():
    with pytest.raises(ValueError, match="read-only"):
        problem().loss[0, 0] = 5.0


def test_every_object_is_shown_in_one_line():
    pairs = PairwiseTerms(first=np.array([0]), second=np.array([1]), value=np.ones((1, 3, 3)))
    more = CostBudget(name="bops", cost=np.ones((3, 3), dtype=int), limit=4)
    asked = problem(more=(more,))
    assert repr(asked) == "AllocationProblem(3 items x 3 choices, cost <= 9, bops <= 4)"
    for shown in (pairs, more, asked, solve_path(problem())):
        assert len(repr(shown)) < 120


def test_a_result_is_shown_in_a_few_lines_and_as_a_table():
    result = solve(problem(limit=7))
    assert repr(result).splitlines()[2:] == ["  loss: 8, at least 8 (gap 0)", "  cost: 7"]
    assert "<th>cost</th><td>7</td>" in result._repr_html_()
    assert sorted(result.to_frame().choice) == [0, 0, 1]


def test_no_items():
    result = solve(problem_of(loss=np.empty((0, 3)), cost=np.empty((0, 3), dtype=int), limit=0))
    assert (result.status, result.loss, result.costs["cost"]) == ("optimal", 0.0, 0)


def test_pairs_of_an_item_with_itself_are_refused():
    with pytest.raises(ConfigError, match="itself"):
        PairwiseTerms(first=np.array([1]), second=np.array([1]), value=np.ones((1, 3, 3)))


def test_grouped_items_without_a_common_choice_are_named():
    allowed = np.array([[True, True, True], [True, False, False], [False, True, True]])
    asked = problem(groups=grouped(3, [1, 2]), allowed=allowed)
    for ask in (solve, solve_path):
        with pytest.raises(InfeasibleBudgetError, match=r"no allowed choice in common.*'attn.to_q', 'attn.to_k'"):
            ask(asked)


def test_two_budgets_that_exclude_each_other_say_what_each_leaves():
    """Small in one budget is large in the other: 6 of each is attainable alone, together they need 12."""
    opposite = CostBudget(name="bops", cost=np.array([[4, 3, 2]] * 3), limit=8)
    with pytest.raises(
        InfeasibleBudgetError, match=r"smallest cost under the other constraints is 10; .*smallest bops .* 9"
    ):
        solve(problem(more=(opposite,)))


def test_costs_of_32_bits_beside_forbidden_choices():
    """The largest int64 stands for no cost at all; among int32 it would wrap to -1, and the forbidden choice be the
    cheapest."""
    allowed = np.array([[False, True, True]] * 3)
    cost = np.array([[1, 2, 3]] * 3, dtype=np.int32)
    asked = problem_of(loss=np.array([[9.0, 4.0, 1.0]] * 3), cost=cost, limit=7, allowed=allowed)
    assert solve(asked).loss == 9.0
    assert solve(changed(asked, groups=grouped(3, [0, 1]))).choice.tolist() == [1, 1, 2]
    for groups in (None, grouped(3, [0, 1])):
        with pytest.raises(InfeasibleBudgetError, match="smallest attainable value is 6"):
            solve(changed(asked, limit=5, groups=groups))


def test_several_budgets_and_nothing_to_choose():
    """Met: with one choice an item the range of the losses is zero, and the dual was divided by it."""
    other = CostBudget(name="bops", cost=np.array([[4, 3, 2]] * 3), limit=12)
    result = solve(problem(allowed=np.array([[True, False, False]] * 3), more=(other,)))
    assert (result.status, result.loss, result.costs) == ("optimal", 9.0, {"cost": 6, "bops": 12})


def test_importing_the_allocator_loads_neither_torch_nor_pulp_nor_numba():
    code = "import sys, mpqsearch.allocate; print([m for m in ('torch', 'pulp', 'numba', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
