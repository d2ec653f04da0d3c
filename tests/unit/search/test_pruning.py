from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import optuna
import pytest

from mpqsearch.search.objective import Objective
from mpqsearch.search.pruning import LEAST, is_clearly_worse, signed_rank_p


def by_enumeration(differences: list[float]) -> float:
    """All sign patterns, one by one."""
    from scipy.stats import rankdata

    d = np.array(differences)
    ranks = rankdata(np.abs(d))
    sums = [ranks[d != 0][np.array(s, dtype=bool)].sum() for s in itertools.product((0, 1), repeat=int((d != 0).sum()))]
    return float(np.mean(np.array(sums) >= ranks[d > 0].sum()))


@pytest.mark.parametrize("seed", range(30))
def test_the_test_is_the_share_of_sign_patterns_that_are_as_bad(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = [float(x) for x in rng.integers(-4, 6, rng.integers(1, 11))]  # ties and zeros are the rule
    assert signed_rank_p(d) == pytest.approx(by_enumeration(d), abs=1e-12)


def test_the_test_is_scipys_where_that_is_exact() -> None:
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(0)
    for n in (1, 5, 20, 48):  # without ties
        d = rng.normal(0.3, 1.0, n)
        assert signed_rank_p(d.tolist()) == pytest.approx(
            wilcoxon(d, alternative="greater", zero_method="zsplit").pvalue, rel=1e-9
        )
    d = [0.0, 0.0, 1.0, 2.0, 2.0, -1.0, 3.0]  # with ties: SciPy tries all patterns
    assert signed_rank_p(d) == pytest.approx(wilcoxon(d, alternative="greater", zero_method="zsplit").pvalue, abs=1e-12)
    assert signed_rank_p([0.0] * 5) == 1.0


def test_many_differences_are_no_more_work_than_few() -> None:
    """All positive: one pattern of 2**200 is as bad."""
    assert signed_rank_p([float(i) for i in range(1, 201)]) == pytest.approx(2.0**-200, rel=1e-9)


def test_a_trial_is_cut_short_only_where_it_is_worse_on_what_both_have_and_on_the_mean() -> None:
    best = dict.fromkeys(range(12), 0.0)
    assert is_clearly_worse(dict.fromkeys(range(LEAST), 1.0), best)
    assert not is_clearly_worse(dict.fromkeys(range(LEAST - 1), 1.0), best)  # too few for a verdict
    assert not is_clearly_worse(dict.fromkeys(range(12), -1.0), best)
    assert not is_clearly_worse(dict.fromkeys(range(100, 112), 1.0), best)  # nothing in common
    assert not is_clearly_worse(dict.fromkeys(range(12), 1.0), {})
    worse_but_for_one = dict.fromkeys(range(12), 0.1) | {50: -100.0}
    assert not is_clearly_worse(worse_but_for_one, best)


def test_a_trial_is_compared_with_the_best_one_of_its_own_study(make_objective: Callable[..., Objective]) -> None:
    """One objective may serve several studies, as the arms of a comparison do, whose trials have the same numbers."""
    o = make_objective(pruning="test")
    done, empty = optuna.create_study(), optuna.create_study()
    done.add_trial(optuna.trial.create_trial(value=-1.0, user_attrs={"record": {"ratios": {"3": -0.5}}}))
    empty.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    assert o._best(done.ask()) == (-1.0, {3: -0.5})
    assert o._best(empty.ask()) == (math.inf, {})
