from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from mpqsearch.errors import ConfigError, NumericsError, StaleArtifactError, UnknownNameError
from mpqsearch.search.measure import Measurements
from mpqsearch.search.objective import REASON, SAMPLES, Objective, points_of
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import Plan, finished_trials, make_pruner, make_sampler, open_study, work
from mpqsearch.specs.search import PRUNERS, SAMPLERS

Make = Callable[..., Objective]
NUMBERS = {"exponent": [0.5, 2.0], "low_bits": [-1.0, 1.0]}


def plan_for(o: Objective, **more: Any) -> Plan:
    settings = {"name": "s", "trials": 12, "starts": o.space.starts(), "context": o.context, "pruner": "none"}
    return Plan(**settings | more)


def run(o: Objective, plan: Plan, storage: Any = None, **more: Any) -> optuna.Study:
    study = open_study(plan, storage or optuna.storages.InMemoryStorage())
    work(study, plan, o, **more)
    return study


def test_the_first_trial_is_the_plain_program_and_its_value_is_what_it_says(make_objective: Make) -> None:
    o = make_objective()
    first = run(o, plan_for(o, trials=3)).get_trials()[0]
    expected, plain = [], []
    for budget in o.budgets:
        plain.append(o.surrogate.candidate({}, budget))
        uniform = o.surrogate.uniform(budget)
        expected.append(math.log(o.measurements.error(plain[-1]) / o.measurements.error(uniform)))
    assert first.value == pytest.approx(np.mean(expected))
    points = points_of(first)
    assert [p["budget"] for p in points] == ["uniform:2.5", "uniform:3.5"]
    assert [p["digest"] for p in points] == [c.digest for c in plain]
    assert [p["error"] for p in points] == [o.measurements.error(c) for c in plain]
    assert first.user_attrs[SAMPLES] == 16  # eight seeds at two budgets


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_the_study_to_its_number_and_equal_seeds_give_equal_maps(
    make_objective: Make, sampler: str
) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    maps = []
    for _ in range(2):
        o = make_objective(NUMBERS)
        study = run(o, plan_for(o, sampler=sampler, trials=8, starts=o.space.starts()))
        assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE] * 8
        maps.append([p["digest"] for t in study.get_trials() for p in points_of(t)])
    assert maps[0] == maps[1]
    assert len(set(maps[0])) > 4


def test_another_seed_gives_other_trials(make_objective: Make) -> None:
    o = make_objective(NUMBERS)
    params = [run(o, plan_for(o, sampler="random", seed=s, starts=())).get_trials()[0].params for s in (0, 1)]
    assert params[0] != params[1]


def test_the_search_beats_the_plain_program_where_the_profile_is_wrong(make_objective: Make) -> None:
    o = make_objective()
    study = run(o, plan_for(o, trials=40, seed=1))
    assert study.best_value < study.get_trials()[0].value - 0.05  # a lognormal truth that no first-order profile shows


@pytest.mark.parametrize("pruner", [p for p in PRUNERS if p != "none"])
def test_pruning_saves_samples_and_cannot_win(make_objective: Make, pruner: str) -> None:
    space = {"exponent": [0.25, 3.0], "low_bits": [-3.0, 3.0], "depth": [-3.0, 3.0], "role_linear": [0.01, 100.0]}
    o = make_objective(space)
    study = run(o, plan_for(o, sampler="random", trials=40, pruner=pruner))
    pruned = [t for t in study.get_trials() if t.state == TrialState.PRUNED]
    assert 2 <= len(pruned) < 40
    assert study.best_trial not in pruned
    assert all(t.user_attrs[SAMPLES] < 16 for t in pruned)
    assert all(p["error"] is None for t in pruned for p in points_of(t))
    assert all(t.user_attrs[SAMPLES] == 16 for t in study.get_trials() if t.state == TrialState.COMPLETE)
    again = optuna.create_study(pruner=optuna.pruners.NopPruner())
    for trial in pruned:
        again.enqueue_trial(trial.params)
    again.optimize(o, n_trials=len(pruned))
    assert again.best_value > study.best_value  # what was cut short would not have won


def test_the_same_call_continues_a_study_and_repeats_no_trial(make_objective: Make, tmp_path: Path) -> None:
    o = make_objective(NUMBERS, tmp_path / "cache")
    for trials in (5, 10):
        study = run(o, plan_for(o, trials=trials, sampler="random"), open_storage(tmp_path / "study.journal"))
        assert len(finished_trials(study)) == trials
    assert len({tuple(t.params.items()) for t in study.get_trials()}) == 10
    before = list(o.measurements.evaluator.measured)
    again = make_objective(NUMBERS, tmp_path / "cache")
    assert run(again, plan_for(again, trials=10), open_storage(tmp_path / "study.journal")) is not None
    assert before
    assert not again.measurements.evaluator.measured


def test_an_interrupted_trial_counts_for_nothing_and_its_start_is_queued_again(
    make_objective: Make, tmp_path: Path
) -> None:
    o = make_objective()
    plan = plan_for(o, trials=4)
    study = open_study(plan, open_storage(tmp_path / "study.journal"))

    def interrupted(trial: optuna.Trial) -> float:
        o.space.suggest(trial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(study, plan, interrupted)
    assert study.get_trials()[0].state == TrialState.FAIL
    study = run(o, plan, open_storage(tmp_path / "study.journal"))
    finished = finished_trials(study)
    assert len(finished) == 4
    assert any(t.params == plan.starts[0] for t in finished)


def test_a_trial_left_running_by_a_dead_worker_is_replaced(make_objective: Make, tmp_path: Path) -> None:
    o = make_objective(NUMBERS)
    plan = plan_for(o, trials=4, starts=())
    open_study(plan, open_storage(tmp_path / "study.journal")).ask()  # and nobody tells
    study = run(o, plan, open_storage(tmp_path / "study.journal"))
    assert [t.state for t in study.get_trials()] == [TrialState.RUNNING] + [TrialState.COMPLETE] * 4


def test_a_study_of_other_settings_is_refused_by_name(make_objective: Make, tmp_path: Path) -> None:
    o = make_objective()
    run(o, plan_for(o, trials=2), open_storage(tmp_path / "a.journal"))
    other = make_objective({"exponent": [0.5, 3.0]})
    with pytest.raises(StaleArtifactError, match="space differ"):
        open_study(plan_for(other), open_storage(tmp_path / "a.journal"))


def test_maps_that_cannot_be_measured_are_pruned_with_the_reason(
    make_objective: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = make_objective(NUMBERS)
    baseline = {o.surrogate.uniform(b).digest for b in o.budgets}
    honest = Measurements.chunk_errors

    def chunk_errors(self: Measurements, candidate: Any, seeds: Any) -> list[float]:
        if candidate.digest not in baseline:
            raise NumericsError("the samples are not finite")
        return honest(self, candidate, seeds)

    monkeypatch.setattr(Measurements, "chunk_errors", chunk_errors)
    trials = run(o, plan_for(o, trials=3)).get_trials()
    assert [t.state for t in trials] == [TrialState.PRUNED] * 3  # the study ends
    assert {t.user_attrs[REASON] for t in trials} == {"the samples are not finite"}
    baseline.clear()
    broken = make_objective(NUMBERS)
    with pytest.raises(NumericsError, match="not finite"):  # the uniform maps: nothing can be compared
        run(broken, plan_for(broken, trials=3))


def test_samples_that_are_not_finite_are_no_values(make_objective: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    o = make_objective()
    candidate = o.surrogate.candidate({}, o.budgets[0])
    monkeypatch.setattr(type(o.measurements.evaluator), "errors", lambda *_: [1.0, math.inf])
    for _ in range(2):  # nor are they kept
        with pytest.raises(NumericsError, match=r"map .* at uniform:2.5 are not finite"):
            o.measurements.chunk_errors(candidate, (0, 1))


def test_values_are_kept_in_the_folder_and_shared(make_objective: Make, tmp_path: Path) -> None:
    first, second = (make_objective(None, tmp_path).measurements for _ in range(2))
    candidate = make_objective().surrogate.candidate({}, make_objective().budgets[0])
    assert first.errors(candidate) == second.errors(candidate) == first.errors(candidate)
    assert len(first.evaluator.measured) == 4  # four chunks, once
    assert not second.evaluator.measured
    assert make_objective().measurements.errors(candidate) == first.errors(candidate)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tpe'"):
        make_sampler("tpee", 0)
    with pytest.raises(UnknownNameError, match="wilcoxon"):
        make_pruner("wilcox")
    with pytest.raises(ConfigError, match="at least 1"):
        Plan(name="s", trials=0)


def test_a_point_whose_budget_is_out_of_reach_is_pruned(make_objective: Make) -> None:
    o = make_objective({"smooth": ["off", "on"]})
    study = run(o, plan_for(o, sampler="random", trials=6))
    for t in study.get_trials():
        assert (t.state == TrialState.PRUNED) == (REASON in t.user_attrs)
    assert study.best_trial.params["smooth"] in ("off", "on")
