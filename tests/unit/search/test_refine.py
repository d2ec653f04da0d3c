from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError
from mpqsearch.search import refine as refine_module
from mpqsearch.search.ladder import Ladder, Slopes
from mpqsearch.search.refine import RefineSpec, refine, steps
from mpqsearch.search.surrogate import Surrogate
from tests.support.synthetic import SyntheticEvaluator

BUDGET = Budget.parse("uniform:3")
SPEC = RefineSpec(rounds=4, slope_samples=8, samples=8, batch=2)


def parts(make_surrogate: Callable[..., Surrogate]) -> tuple[Surrogate, Ladder, SyntheticEvaluator]:
    s = make_surrogate("ilp-channel")
    evaluator = SyntheticEvaluator(table=s.table, profile=s.profile)
    return s, Ladder(evaluator=evaluator, seeds=(0, 1), chunk=2, final=(2, 3)), evaluator


def test_descent_finds_what_no_profile_shows(make_surrogate: Callable[..., Surrogate]) -> None:
    s, ladder, evaluator = parts(make_surrogate)
    plain = s.candidate({}, BUDGET)
    found = refine(s, ladder, plain, SPEC, first_seed=100)
    assert found.moved
    assert evaluator.truth(found.candidate) < 0.9 * evaluator.truth(
        plain
    )  # the hidden factors of layers are what it learns
    assert 8 * found.candidate.size_bytes <= s.limit_bits(BUDGET) + 7
    accepted = [r for r in found.rounds if r["accepted"]]
    assert accepted
    assert all(r["change"] < 0 for r in accepted)
    assert all(t["changed"] <= SPEC.changed for r in found.rounds for t in r["tried"])
    assert found.forwards == ladder.asked
    slopes, judged = 40 * SPEC.slope_samples, 10 * SPEC.samples
    assert found.forwards == sum(slopes + judged * (1 + len(r["tried"])) for r in found.rounds)


def test_seeds_that_choose_are_used_once(make_surrogate: Callable[..., Surrogate]) -> None:
    s, ladder, _ = parts(make_surrogate)
    with pytest.raises(ConfigError, match="choose twice"):
        refine(s, ladder, s.candidate({}, BUDGET), SPEC, first_seed=3)


def test_slopes_of_nothing_but_noise_leave_the_map_alone(
    make_surrogate: Callable[..., Surrogate], monkeypatch: pytest.MonkeyPatch
) -> None:
    s, ladder, evaluator = parts(make_surrogate)
    plain = s.candidate({}, BUDGET)
    rng = np.random.default_rng(0)
    shape = (4, sum(s.profile.channels), len(s.profile.widths))
    noise = lambda *_: Slopes(rows=rng.standard_normal(shape), error=1.0, forwards=1)  # noqa: E731
    monkeypatch.setattr(evaluator, "slopes", noise)
    found = refine(s, ladder, plain, replace(SPEC, rounds=3), first_seed=100)
    assert evaluator.truth(found.candidate) <= 1.02 * evaluator.truth(plain)
    if not found.moved:
        assert len(found.rounds) == 2  # two rounds without a better map end it


def test_longer_steps_change_more_and_promise_no_more_than_asked(make_surrogate: Callable[..., Surrogate]) -> None:
    s, ladder, _ = parts(make_surrogate)
    plain = s.candidate({}, BUDGET)
    slopes = ladder.slopes(plain, range(8), 2)
    made = steps(s, plain, [slopes], replace(SPEC, shares=(0.05, 0.2), changed=1.0))
    assert [share for share, *_ in made] == [0.05, 0.2]
    assert 0 < made[0][2] < made[1][2]
    column = {b: j for j, b in enumerate(s.profile.widths)}
    mean = slopes.rows.mean(0)
    for share, candidate, _ in made:
        widths = np.concatenate([candidate.bit_map.channel_widths(n, s.table[n].n_channels) for n in s.profile.names])
        promised = -2 * mean[np.arange(len(mean)), [column[int(b)] for b in widths]].sum()
        assert 0 < promised <= 1.1 * share * slopes.error  # shrinking takes a few percent off the measured slopes


def test_noise_is_shrunk_and_signal_is_not(make_surrogate: Callable[..., Surrogate]) -> None:
    s, _, _ = parts(make_surrogate)
    rng = np.random.default_rng(1)
    shape = (sum(s.profile.channels), len(s.profile.widths))
    signal = rng.standard_normal(shape)
    clear = refine_module._shrunk(s.profile, signal + 0.01 * rng.standard_normal((4, *shape)))
    np.testing.assert_allclose(clear, signal, atol=0.05)
    noise = rng.standard_normal((4, *shape))
    assert np.square(refine_module._shrunk(s.profile, noise)).mean() < 0.6 * np.square(noise.mean(0)).mean()


def test_settings_that_cannot_work_are_refused() -> None:
    for bad in ({"slope_samples": 2, "batch": 2}, {"samples": 1}, {"shares": ()}, {"shares": (3.0,)}, {"changed": 0.0}):
        with pytest.raises(ConfigError, match="refinement"):
            RefineSpec(**bad)
