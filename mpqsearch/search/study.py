"""The Optuna study: samplers and pruners by name, starting points, and workers that share it.

Everything is Optuna's own. A study ends when it has its number of trials that are complete or pruned, counted over all
workers; each of them finishes the trial that it is at, so there may be one more for each further worker. A trial whose
worker died counts for nothing: with a database its heartbeat stops, and it is failed and tried again; in a journal it
is failed when a process continues the study alone, see `fail_interrupted`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpqsearch.errors import ConfigError, StaleArtifactError, UnknownNameError, install
from mpqsearch.search.storage import outage, unwarned, wait_for
from mpqsearch.specs.search import PRUNERS, SAMPLERS

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

STARTUP = 4
"""Trials of ``tpe`` and ``gp`` before they model, the starting points among them. Optuna's ten are half of a short
study."""

CONTEXT = "mpqsearch context"
FOLDER = "mpqsearch folder"
"""User attribute of a study: the run folder that made it, which alone may delete it."""

START = "start"
"""User attribute of a trial: which of the plan's starting points it is."""

WORKER = "worker"
"""User attribute of a trial: number of the worker that ran it."""

Callback = Callable[["Study", "FrozenTrial"], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One study: how many trials, by which sampler and pruner, under which name.

    ``starts`` are points that are tried first. ``context`` are digests of what values depend on: a study of the same
    name under another one is refused. ``folder``: who makes it; nobody else may delete it.
    """

    name: str
    trials: int = 60
    sampler: str = "tpe"
    pruner: str = "wilcoxon"
    seed: int = 0
    starts: Sequence[Mapping[str, Any]] = ()
    context: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"search.trials must be at least 1, got {self.trials}")


def make_sampler(name: str, seed: int) -> BaseSampler:
    """A sampler of Optuna's: ``tpe`` (multivariate) and ``gp`` model after a few trials, ``nsga2`` is for thousands of
    cheap ones, ``cmaes`` for numbers alone, ``random`` is the control.

    Raises `UnknownNameError`, or `ConfigError` when the package of ``cmaes`` is missing.
    """
    from optuna import samplers

    if name not in SAMPLERS:
        raise UnknownNameError("sampler of the search", name, SAMPLERS, "(search.sampler)")
    with unwarned():
        if name == "tpe":
            return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=STARTUP)
        if name == "gp":
            return samplers.GPSampler(seed=seed, deterministic_objective=True, n_startup_trials=STARTUP)
        if name == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=24)
        if name == "random":
            return samplers.RandomSampler(seed=seed)
        try:
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        except ImportError as error:
            raise ConfigError(f"the sampler cmaes needs the package cmaes ({error}): {install('search')}") from error


def make_pruner(name: str) -> BasePruner:
    """A pruner of Optuna's. Raises `UnknownNameError`."""
    from optuna import pruners

    if name not in PRUNERS:
        raise UnknownNameError("pruner of the search", name, PRUNERS, "(search.pruner)")
    with unwarned():
        if name == "wilcoxon":
            return pruners.WilcoxonPruner(n_startup_steps=6)
        return pruners.MedianPruner(n_startup_trials=8) if name == "median" else pruners.NopPruner()


def open_study(plan: Plan, storage: BaseStorage) -> Study:
    """Create the study or continue it.

    Raises `StaleArtifactError` that names what differs when the study was made under another context.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name=plan.name,
        storage=storage,
        sampler=make_sampler(plan.sampler, plan.seed),
        pruner=make_pruner(plan.pruner),
        load_if_exists=True,
    )
    before = study.user_attrs.get(CONTEXT)
    if before is None:
        study.set_user_attr(FOLDER, plan.folder)
        study.set_user_attr(CONTEXT, dict(plan.context))
    elif dict(before) != dict(plan.context):
        changed = sorted(k for k in {*before, *plan.context} if before.get(k) != plan.context.get(k))
        raise StaleArtifactError(
            f"the study {plan.name!r} in this storage was made with other settings: {', '.join(changed)} differ. Its "
            "values cannot be compared with new ones. Use another --run-dir or study name, or --overwrite to begin it "
            "again."
        )
    return study


def fail_interrupted(study: Study) -> None:
    """Fail the trials that are said to be running; only for a process that knows that nobody else runs any."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _queue_start(study: Study, plan: Plan) -> None:
    """Queue the first starting point that no trial stands for (any more: it may have been interrupted)."""
    begun = {t.user_attrs.get(START) for t in study.get_trials(deepcopy=False) if t.state.name != "FAIL"}
    left = (i for i in range(len(plan.starts)) if i not in begun)
    if (i := next(left, None)) is not None and len(finished_trials(study)) < plan.trials:
        study.enqueue_trial(dict(plan.starts[i]), user_attrs={START: i})


def delete_study(plan: Plan, storage: BaseStorage) -> None:
    """Remove the study of that name with all its trials, if it exists. Raises `StaleArtifactError` when it belongs to
    another run folder."""
    import optuna

    if plan.name not in optuna.get_all_study_names(storage):
        return
    study = optuna.load_study(study_name=plan.name, storage=storage)
    owner = study.user_attrs.get(FOLDER, "")
    if owner != plan.folder:
        raise StaleArtifactError(
            f"the study {plan.name!r} in this storage belongs to another run folder ({owner or 'unknown'}), and "
            "--overwrite deletes only this one's. Give another name: --set search.study=NAME"
        )
    optuna.delete_study(study_name=plan.name, storage=storage)


def finished_trials(study: Study) -> list[FrozenTrial]:
    """Trials that are complete or pruned, which is what a plan's number counts, in the order in which they ended."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return sorted(trials, key=lambda t: (t.datetime_complete is None, t.datetime_complete, t.number))


def work(
    study: Study,
    plan: Plan,
    objective: Callable[[Any], float],
    *,
    storage: BaseStorage | None = None,
    worker: int = 0,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Run trials until the study has ``plan.trials`` finished ones, by whatever worker. A ``storage`` that is given is
    waited for when it goes away for a while.

    The same call continues an interrupted study. Each trial is drawn from a seed of its own, made of its worker and the
    number of finished trials: with one worker, equal seeds give equal trials however often it was interrupted. The
    first worker tries the starting points, one after the other.
    """
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    if len(finished_trials(study)) >= plan.trials:
        return

    def ready(*_: Any) -> None:
        study.sampler = make_sampler(plan.sampler, seed_of(plan.seed, worker, len(finished_trials(study))))
        if worker == 0:
            _queue_start(study, plan)

    def numbered(trial: Any) -> float:
        trial.set_user_attr(WORKER, worker)
        return objective(trial)

    enough = MaxTrialsCallback(plan.trials, states=(TrialState.COMPLETE, TrialState.PRUNED))
    while True:
        try:
            ready()
            with unwarned():
                study.optimize(numbered, callbacks=[*callbacks, ready, enough])
        except Exception as error:
            away = None if storage is None else outage(error)
            if storage is None or away is None:
                raise
            wait_for(storage, away)
            if len(finished_trials(study)) < plan.trials:
                continue
        return


def seed_of(base: int, *parts: object) -> int:
    """A sampler seed from a base seed and what tells one trial from another."""
    digest = hashlib.sha256(repr((base, *parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % (2**31)
