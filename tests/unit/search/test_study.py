from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from mpqsearch.errors import ConfigError, NumericsError, StaleArtifactError, UnknownNameError
from mpqsearch.search.arms import control_candidates
from mpqsearch.search.objective import Objective, finished_record
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import (
    SAMPLERS,
    Plan,
    counts,
    make_pruner,
    make_sampler,
    objective_of,
    open_study,
    pruning_of,
    reseed,
    work,
)
from mpqsearch.search.workers import WORKER, Worker


def plan_for(o: Objective, **more: Any) -> Plan:
    settings: dict[str, Any] = {
        "name": "s",
        "trials": 12,
        "starts": o.space.starts(),
        "context": o.context,
        "pruner": "none",
    } | more
    return Plan(**settings)


def run(o: Objective, plan: Plan, storage: Any = None, **more: Any) -> optuna.Study:
    study = open_study(plan, storage or optuna.storages.InMemoryStorage())
    work(study, plan, objective_of(o, plan.mode), **more)
    return study


def by_draw(study: optuna.Study) -> list[tuple[int, dict[str, Any], list[float] | None]]:
    done = [t for t in study.get_trials() if t.state.is_finished() and t.state != optuna.trial.TrialState.FAIL]
    return sorted(((t.user_attrs["draw"], t.params, t.values) for t in done), key=lambda row: row[0])


def test_the_first_trial_is_the_plain_program_and_its_value_is_what_it_says(
    make_objective: Callable[..., Objective],
) -> None:
    o = make_objective()
    study = run(o, plan_for(o, trials=3))
    first = study.get_trials()[0]
    expected = []
    for budget in o.budgets:
        arms = control_candidates(o.surrogate, budget)
        expected.append(math.log(o.ladder.paired_error(arms["plain"][0]) / o.ladder.paired_error(arms["uniform"][0])))
    assert first.value == pytest.approx(np.mean(expected))
    record = finished_record(first)
    assert record is not None
    assert [p["budget"] for p in record["points"]] == ["uniform:2.5", "uniform:3.5"]
    assert record["forwards"] >= record["new_forwards"] > 0


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in ("gp", "cmaes")])
def test_every_sampler_runs_the_study_to_its_number(make_objective: Callable[..., Objective], sampler: str) -> None:
    o = make_objective()
    study = run(o, plan_for(o, sampler=sampler, trials=8))
    assert counts(study).finished == 8


@pytest.mark.parametrize(("sampler", "package"), [("gp", "scipy"), ("cmaes", "cmaes")])
def test_samplers_with_a_package_of_their_own(
    make_objective: Callable[..., Objective], sampler: str, package: str
) -> None:
    pytest.importorskip(package)
    o = make_objective(space={"exponent": [0.5, 2.0], "low_bits": [-1.0, 1.0]})
    assert counts(run(o, plan_for(o, sampler=sampler, trials=13))).finished == 13


def test_the_search_beats_the_plain_program_where_the_profile_is_wrong(
    make_objective: Callable[..., Objective],
) -> None:
    o = make_objective()
    study = run(o, plan_for(o, trials=40, seed=1))
    assert study.best_value < study.get_trials()[0].value - 0.05  # a lognormal truth that no first-order profile shows


def test_two_objectives_give_a_front_over_bits(make_objective: Callable[..., Objective]) -> None:
    o = make_objective()
    study = run(o, plan_for(o, mode="pareto", trials=16, starts=()))
    bits = sorted(t.values[0] for t in study.best_trials)
    assert len(bits) >= 4
    assert bits[-1] - bits[0] > 0.5
    assert all(o.bits_range[0] <= t.params["target_bits"] <= o.bits_range[1] for t in study.get_trials())


@pytest.mark.filterwarnings("ignore:WilcoxonPruner is experimental")
@pytest.mark.parametrize("kind", ["wilcoxon", "median", "optuna"])
def test_pruning_saves_measurements_and_cannot_win(make_objective: Callable[..., Objective], kind: str) -> None:
    pruner = optuna.pruners.WilcoxonPruner(n_startup_steps=6) if kind == "optuna" else kind
    space = {"exponent": [0.25, 3.0], "low_bits": [-3.0, 3.0], "depth": [-3.0, 3.0], "role_linear": [0.01, 100.0]}
    o = make_objective(space=space, pruning=pruning_of(pruner))
    study = run(o, plan_for(o, sampler="random", trials=40, pruner=pruner, starts=o.space.starts()[:1]))
    records = [finished_record(t) for t in study.get_trials()]
    pruned = [r["pruned"] for r in records if r is not None]
    assert 2 <= sum(pruned) < 40
    assert not finished_record(study.best_trial)["pruned"]
    full = max(r["forwards"] for r in records if r is not None)
    assert all(r["forwards"] < full for r in records if r is not None and r["pruned"])


def test_an_interrupted_random_search_goes_on_exactly_as_if_it_had_not_been(
    make_objective: Callable[..., Objective], tmp_path: Path
) -> None:
    o = make_objective(space={"exponent": [0.5, 2.0], "low_bits": [-1.0, 1.0]})
    plan = plan_for(o, sampler="random", trials=14, starts=o.space.starts()[:1])
    whole = by_draw(run(o, plan))
    assert len({v for _, _, (v,) in whole}) > 3

    path = tmp_path / "study.journal"
    for session, steps in enumerate(
        (2, 1, 4)
    ):  # three sessions that end early, the last trial of each begun and not finished
        study = open_study(plan, open_storage(path))
        done: list[int] = []
        work(
            study,
            plan,
            o.front,
            grace_s=-1,
            stop=lambda done=done, steps=steps: len(done) >= steps,
            after_trial=lambda t, done=done: done.append(t.number),
        )

        def dies(trial: optuna.Trial, session: int = session) -> float:
            o.space.suggest(trial)
            if session == 0:  # as if elsewhere: this death is noticed late, after another trial
                trial.set_user_attr(WORKER, "elsewhere-1a2b3c-1-0-abcdef")
            raise SystemExit

        plan_of_one = replace(plan, trials=100)
        with pytest.raises(SystemExit):
            work(study, plan_of_one, dies)
        if session == 2:  # interrupted from the keyboard: Optuna itself fails the trial
            last = study.get_trials()[-1]
            study._storage.set_trial_state_values(last._trial_id, state=optuna.trial.TrialState.FAIL)
    finished = run(o, plan, open_storage(path), grace_s=-1)
    assert by_draw(finished) == whole
    assert counts(finished).running == 0


def test_tpe_does_not_repeat_itself_after_a_restart(make_objective: Callable[..., Objective], tmp_path: Path) -> None:
    o = make_objective(space={"exponent": [0.5, 2.0], "low_bits": [-1.0, 1.0]})
    path = tmp_path / "study.journal"
    for trials in (5, 10):
        study = run(o, plan_for(o, trials=trials, starts=()), open_storage(path))
    points = [tuple(t.params.values()) for t in study.get_trials()]
    assert len(set(points)) == 10


def test_a_study_of_other_settings_is_refused_by_name(make_objective: Callable[..., Objective], tmp_path: Path) -> None:
    o = make_objective()
    run(o, plan_for(o, trials=2), open_storage(tmp_path / "a.journal"))
    other = make_objective(space={"exponent": [0.5, 3.0]})
    with pytest.raises(StaleArtifactError, match="space differ"):
        open_study(plan_for(other), open_storage(tmp_path / "a.journal"))


def test_failed_trials_are_replaced_and_many_in_a_row_end_the_study(make_objective: Callable[..., Objective]) -> None:
    o = make_objective()
    plan = plan_for(o, trials=6)
    study = open_study(plan, optuna.storages.InMemoryStorage())

    def sometimes(trial: optuna.Trial) -> float:
        if trial.number in (1, 3):
            raise NumericsError("not finite")
        return o.front(trial)

    state = work(study, plan, sometimes)
    assert (state.finished, state.failed) == (6, 2)

    def never(trial: optuna.Trial) -> float:
        raise NumericsError("a weight is NaN")

    with pytest.raises(NumericsError, match="a weight is NaN"):
        work(open_study(plan, optuna.storages.InMemoryStorage()), plan, never)


def test_a_trial_that_was_taken_away_is_no_error_but_one_of_the_objective_is(
    make_objective: Callable[..., Objective], monkeypatch: pytest.MonkeyPatch
) -> None:
    o = make_objective()
    plan = plan_for(o, trials=3)
    study = open_study(plan, optuna.storages.InMemoryStorage())
    taken: list[int] = []

    def held_up(trial: optuna.Trial) -> float:
        value = o.front(trial)
        if not taken:  # others took this worker for dead
            taken.append(trial.number)
            study._storage.set_trial_state_values(trial._trial_id, state=optuna.trial.TrialState.FAIL)
        return value

    assert work(study, plan, held_up).finished == 3
    assert taken == [0]

    begins = Worker.begins

    def late(self: Worker, trial: optuna.Trial) -> None:
        if trial.number == 1:  # before its worker could even sign it
            trial.storage.set_trial_state_values(trial._trial_id, state=optuna.trial.TrialState.FAIL)
        begins(self, trial)

    with monkeypatch.context() as slow:
        slow.setattr(Worker, "begins", late)
        assert work(open_study(plan, optuna.storages.InMemoryStorage()), plan, o.front).finished == 3

    def wrong(trial: optuna.Trial) -> float:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        work(open_study(plan, optuna.storages.InMemoryStorage()), plan, wrong)


def test_optunas_own_objects_are_taken_as_they_are(make_objective: Callable[..., Objective]) -> None:
    o = make_objective()
    sampler = optuna.samplers.BruteForceSampler()
    pruner = optuna.pruners.ThresholdPruner(upper=1e9)
    storage = optuna.storages.InMemoryStorage()
    assert open_storage(storage) is storage
    o2 = make_objective(space={"granularity": ["layer", "channel"]})
    study = run(o2, plan_for(o2, sampler=sampler, pruner=pruner, trials=2, starts=()), storage)
    assert study.sampler is sampler
    assert study.pruner is pruner
    assert {t.params["granularity"] for t in study.get_trials()} == {"layer", "channel"}
    assert o.context != o2.context


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_a_sampler_with_a_new_seed_draws_as_a_new_one(name: str) -> None:
    def drawn(*, anew: bool) -> list[dict[str, Any]]:
        study = optuna.create_study(sampler=make_sampler(name, 0))
        for seed in range(3, 12):
            if anew:
                study.sampler = make_sampler(name, seed)
            else:
                reseed(study.sampler, seed)
            study.optimize(lambda t: t.suggest_float("x", 0, 1) + t.suggest_int("n", 1, 5), n_trials=1)
        return [t.params for t in study.get_trials()]

    assert drawn(anew=False) == drawn(anew=True)


def test_unknown_names_and_impossible_pairs_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tpe'"):
        make_sampler("tpee", 0)
    with pytest.raises(ConfigError, match="one objective"):
        make_sampler("cmaes", 0, "pareto")
    with pytest.raises(UnknownNameError, match="wilcoxon"):
        make_pruner("wilcox")
    assert isinstance(make_pruner("wilcoxon", "pareto"), optuna.pruners.NopPruner)  # Optuna cannot prune two objectives


def test_a_point_whose_widths_do_not_fit_is_infeasible_and_finite(make_objective: Callable[..., Objective]) -> None:
    o = make_objective(space={"min_bits": [1, 6]})
    study = run(o, plan_for(o, sampler="random", trials=10, starts=()))
    hard = [t for t in study.get_trials() if t.params["min_bits"] > 3]
    assert hard
    assert all(math.isfinite(t.value) and t.value >= 4 for t in hard)
    assert study.best_trial.params["min_bits"] <= 2


@pytest.mark.parametrize("frozen_by_the_caller", [False, True])
def test_what_is_old_is_collected_again_after_the_trials(
    frozen_by_the_caller: bool, make_objective: Callable[..., Objective], tmp_path: Path
) -> None:
    o = make_objective()
    plan = Plan(name="s", trials=3, sampler="random", context=o.context)
    study = open_study(plan, open_storage(tmp_path / "j"))
    seen: list[int] = []

    def looks(trial: optuna.Trial) -> float:
        seen.append(gc.get_freeze_count())
        if len(seen) == 3:
            raise ConfigError("stop here")
        return trial.suggest_float("x", 0, 1)

    if frozen_by_the_caller:
        gc.freeze()
    before = gc.get_freeze_count()
    try:
        with pytest.raises(ConfigError, match="stop here"):
            work(study, plan, looks)
        assert len(seen) == 3
        assert min(seen) > 10_000
        assert (gc.get_freeze_count() > 0) == frozen_by_the_caller
        assert (max(seen) <= before) == frozen_by_the_caller
    finally:
        gc.unfreeze()
