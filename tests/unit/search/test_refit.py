from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError
from mpqsearch.methods import predicted_loss
from mpqsearch.search.arms import control_candidates
from mpqsearch.search.ladder import Ladder
from mpqsearch.search.refit import close_the_loop, contributions, corrected, diverse_candidates, refit
from mpqsearch.search.surrogate import Candidate, Surrogate
from tests.support.synthetic import SyntheticEvaluator

BUDGET = Budget.parse("uniform:3")


def random_maps(s: Surrogate, n: int) -> list[Candidate]:
    return control_candidates(s, BUDGET, repeats=n)["random"]


def test_contributions_sum_to_the_predicted_loss(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    maps = [*random_maps(s, 3), s.candidate({"granularity": "channel"}, BUDGET)]
    fixed = [n for n in s.profile.names if s.policy.fixed_width(s.table[n]) is not None]
    x = contributions(s, maps)
    for row, candidate in zip(x, maps, strict=True):
        whole = predicted_loss(s.table, s.profile, candidate.bit_map, bias_correction=True, loss="gain")
        eight = s.profile.layer_sum(s.losses_of({}, s.method))[
            [s.profile.index[n] for n in fixed], s.profile.widths.index(8)
        ].sum()
        assert row.sum() == pytest.approx(whole - eight, rel=1e-6)


def test_hidden_multipliers_are_found_and_left_out_maps_predicted_better(
    make_surrogate: Callable[..., Surrogate],
) -> None:
    s = make_surrogate()
    rng = np.random.default_rng(3)
    hidden = rng.lognormal(sigma=1.0, size=len(s.profile.names))
    maps = random_maps(s, 80)
    errors = (contributions(s, maps) @ hidden) * rng.lognormal(sigma=0.02, size=len(maps))
    fit = refit(s, maps, errors.tolist())
    assert fit.helps
    assert fit.rms_after < 0.4 * fit.rms_before
    assert fit.rank_after > fit.rank_before
    searched = [j for j, n in enumerate(s.profile.names) if s.policy.fixed_width(s.table[n]) is None]
    assert np.corrcoef(np.log(fit.multipliers[searched]), np.log(hidden[searched]))[0, 1] > 0.8
    # The corrected program finds a map that is truly better.
    again, plain = (contributions(s, [x.candidate({}, BUDGET)]) @ hidden for x in (corrected(s, fit), s))
    assert again[0] < plain[0]


def test_a_right_table_is_left_alone(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    maps = random_maps(s, 40)
    errors = contributions(s, maps).sum(1) * np.random.default_rng(0).lognormal(sigma=0.3, size=len(maps))
    fit = refit(s, maps, errors.tolist())
    assert np.abs(np.log(fit.multipliers)).max() < 0.7  # noise of 30 % is not made into a discovery
    assert fit.pairs == ()


def test_a_pair_that_interacts_is_noticed(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    maps = random_maps(s, 120)
    x = contributions(s, maps)
    a, b = 4, 5
    errors = x.sum(1) + 3.0 * np.sqrt(x[:, a] * x[:, b])
    fit = refit(s, maps, errors.tolist())
    names = s.profile.names
    found = {(p[0], p[1]): p[2] for p in fit.pairs}
    assert found.get((names[a], names[b]), 0) > 0
    terms = corrected(s, fit).interactions
    assert terms is not None
    assert len(terms.first) == len(fit.pairs)


def test_diverse_maps_differ_and_fit(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    maps = diverse_candidates(s, BUDGET, 4, min_distance=2)
    assert len(maps) == 4
    for i, first in enumerate(maps):
        assert first.size_bytes * 8 <= BUDGET.limit_bits(s.table, s.policy) + 8
        for second in maps[:i]:
            assert len(first.bit_map.diff(second.bit_map)) >= 2
    assert [m.predicted for m in maps[1:]] >= [maps[0].predicted] * 3 or maps[0].predicted <= min(
        m.predicted for m in maps
    )


def test_the_loop_says_whether_it_pays(make_surrogate: Callable[..., Surrogate]) -> None:
    s = make_surrogate()
    evaluator = SyntheticEvaluator(table=s.table, profile=s.profile, seed=2)
    ladder = Ladder(evaluator=evaluator, seeds=(0, 1), chunk=2)
    data = close_the_loop(s, ladder, [BUDGET], random_maps(s, 40), diverse=3)
    (row,) = data["budgets"]
    assert data["pays"] == (row["refitted"] < row["plain"])
    assert data["pays"]  # the truth scales layers by factors that the profile does not show
    assert data["fit"]["n_maps"] >= 40
    assert len(data["fit"]["multipliers"]) == len(data["fit"]["layers"])


def test_too_few_maps_are_refused(make_surrogate: Callable[..., Surrogate]) -> None:
    s = replace(make_surrogate())
    with pytest.raises(ConfigError, match="at least 12"):
        refit(s, random_maps(s, 3), [1.0, 2.0, 3.0])
