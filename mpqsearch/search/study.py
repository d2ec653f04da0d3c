"""The Optuna study: samplers, pruners, a warm start, workers that share it, and resuming.

Optuna's own objects are used as they are: every sampler, pruner and storage of the user's is accepted. What is added
here is bookkeeping: exactly so many trials over all workers, none lost and none counted twice, and seeds that do not
repeat on resume.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mpqsearch.errors import ConfigError, MpqsearchError, NumericsError, StaleArtifactError, UnknownNameError
from mpqsearch.search.objective import Objective, ObjectiveFunction, Pruning
from mpqsearch.search.workers import GRACE_S, HEARTBEAT_S, Lookout, Worker
from mpqsearch.specs.search import MODES, PRUNERS, SAMPLERS

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger("mpqsearch")

Mode = Literal["front", "pareto"]

MAX_FAILURES = 10
"""A study is given up after so many failed trials of one worker in a row."""

NEAR_END = 8
"""So many trials before the last the study is looked at before every trial."""

STARTUP = 4
"""Random trials of ``tpe`` and ``gp`` before they model, the warm start among them. Optuna's ten are half of a short
study."""

CONTEXT = "mpqsearch context"
SURPLUS = "surplus"
DRAW = "draw"
"""User attribute of a trial: which draw of the random sampler it is. A retried trial keeps it."""


class _SurplusError(Exception):
    """This trial began after the study had all its trials."""


def seed_of(base: int, *parts: object) -> int:
    """A sampler seed from a base seed and whatever tells one session from another."""
    text = repr((base, *parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") % (2**31)


def make_sampler(name: str, seed: int, mode: Mode = "front", *, fixed_seed: int | None = None) -> BaseSampler:
    """A sampler by name.

    ``tpe`` is multivariate, also with two objectives; ``gp`` for expensive trials; ``nsga2`` for thousands of cheap
    ones; ``cmaes`` refines numbers in front mode; ``random`` and ``qmc`` are controls. ``fixed_seed`` is for ``qmc``,
    whose sequence must be the same in every session.

    Raises:
        UnknownNameError: There is no such sampler.
        ConfigError: ``cmaes`` with two objectives, or its package is missing.
    """
    import warnings

    import optuna

    if name not in SAMPLERS:
        raise UnknownNameError("sampler of the search", name, SAMPLERS)
    if name == "cmaes" and mode == "pareto":
        raise ConfigError("the sampler cmaes takes one objective; use tpe, nsga2 or gp in the mode 'pareto'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        made: BaseSampler
        if name == "tpe":
            made = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, constant_liar=True, n_startup_trials=STARTUP
            )
        elif name == "gp":
            made = optuna.samplers.GPSampler(seed=seed, deterministic_objective=True, n_startup_trials=STARTUP)
        elif name == "nsga2":
            made = optuna.samplers.NSGAIISampler(seed=seed, population_size=24)
        elif name == "cmaes":
            made = _cmaes(seed)
        elif name == "qmc":
            made = optuna.samplers.QMCSampler(
                seed=seed if fixed_seed is None else fixed_seed, scramble=True, warn_independent_sampling=False
            )
        else:
            made = optuna.samplers.RandomSampler(seed=seed)
    return made


def reseed(sampler: BaseSampler, seed: int) -> None:
    """Let a ``random`` or ``tpe`` sampler draw what a new one of this seed would: making one takes a hundred times as
    long, for its generators ask the system for seeds first. Optuna's own ``reseed_rng`` takes no seed.
    """
    own: Any = sampler
    for one in (
        own,
        getattr(own, "_random_sampler", None),
    ):  # with too few trials to model, TPE draws from a sampler inside
        if one is not None:
            one._rng.rng.seed(seed)


def _cmaes(seed: int) -> BaseSampler:
    import optuna

    try:
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    except ImportError as error:
        raise ConfigError(
            f"the sampler cmaes needs the package cmaes ({error}). Install it: pip install 'mpqsearch[search]'"
        ) from error


def make_pruner(name: str, mode: Mode = "front") -> BasePruner:
    """A pruner of Optuna's by name; there is none for ``wilcoxon``, which is a test of the objective's own, and none
    with two objectives."""
    import optuna

    if name not in PRUNERS:
        raise UnknownNameError("pruner of the search", name, PRUNERS)
    if name == "median" and mode == "front":
        return optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=3)
    return optuna.pruners.NopPruner()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One study: how many trials, by which sampler and pruner, under which name.

    ``sampler`` and ``pruner`` are names or Optuna's objects. ``warm_start`` tries the plain integer program and its
    simplest variants first. ``context`` are digests of what values depend on: a study of the same name under another
    one is refused.
    """

    name: str
    mode: Mode = "front"
    trials: int = 60
    sampler: str | BaseSampler = "tpe"
    pruner: str | BasePruner = "wilcoxon"
    seed: int = 0
    starts: Sequence[Mapping[str, Any]] = ()
    context: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownNameError("mode of the search", self.mode, MODES)
        if self.trials < 1:
            raise ConfigError(f"search.trials must be at least 1, got {self.trials}")


def open_study(plan: Plan, storage: BaseStorage) -> Study:
    """Create the study or continue it; `StaleArtifactError` names what differs when it was made under another
    context."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions: list[Literal["minimize", "maximize"]] = (
        ["minimize"] if plan.mode == "front" else ["minimize", "minimize"]
    )
    study = optuna.create_study(
        study_name=plan.name,
        storage=storage,
        directions=directions,
        sampler=make_sampler("random", plan.seed) if isinstance(plan.sampler, str) else plan.sampler,
        pruner=make_pruner(plan.pruner, plan.mode) if isinstance(plan.pruner, str) else plan.pruner,
        load_if_exists=True,
    )
    before = study.user_attrs.get(CONTEXT)
    if before is None:
        study.set_user_attr(CONTEXT, dict(plan.context))
    elif dict(before) != dict(plan.context):
        changed = sorted(k for k in {*before, *plan.context} if before.get(k) != plan.context.get(k))
        raise StaleArtifactError(
            f"the study {plan.name!r} in this storage was made with other settings: {', '.join(changed)} differ. Its "
            "values cannot be "
            "compared with new ones. Use another --run-dir or study name, or --overwrite to begin it again."
        )
    if not study.get_trials(deepcopy=False):
        for start in plan.starts:
            study.enqueue_trial(dict(start), user_attrs={"source": "warm start"}, skip_if_exists=True)
    return study


def delete_study(name: str, storage: BaseStorage) -> None:
    """Remove a study with all its trials, if it exists."""
    import optuna

    if name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)


@dataclass(frozen=True, slots=True)
class Counts:
    """Trials by what has become of them; surplus and failed ones are in none of the first three."""

    finished: int
    running: int
    waiting: int
    failed: int


def counts(study: Study) -> Counts:
    """How far a study is."""
    return counts_of(study.get_trials(deepcopy=False))


def counts_of(trials: Sequence[FrozenTrial]) -> Counts:
    """How far a study with these trials is."""
    from optuna.trial import TrialState

    by = {s: sum(t.state == s for t in trials) for s in TrialState}
    surplus = sum(bool(t.user_attrs.get(SURPLUS)) for t in trials if t.state == TrialState.FAIL)
    return Counts(
        finished=by[TrialState.COMPLETE] + by[TrialState.PRUNED],
        running=by[TrialState.RUNNING],
        waiting=by[TrialState.WAITING],
        failed=by[TrialState.FAIL] - surplus,
    )


def work(
    study: Study,
    plan: Plan,
    objective: ObjectiveFunction,
    *,
    worker: int = 0,
    heartbeat_s: float = HEARTBEAT_S,
    grace_s: float = GRACE_S,
    poll_s: float = 0.5,
    stop: Callable[[], bool] = lambda: False,
    after_trial: Callable[[Trial], None] = lambda _trial: None,
) -> Counts:
    """Run trials until the study has ``plan.trials`` finished ones, by whatever worker; the same call continues an
    interrupted study.

    Workers may start and die at any time. A trial that begins when the study already has its number is dropped at once.
    Trials of dead workers are failed and queued again: those whose process on this machine is gone, and those that gave
    no sign of life for ``grace_s`` seconds. A worker that finds nothing to do waits until the others have finished,
    since it may have to take over.

    Raises:
        MpqsearchError: What the objective raised, when `MAX_FAILURES` trials of this worker failed in a row.
    """
    import optuna

    me, lookout = Worker(study, worker, heartbeat_s), Lookout(grace_s)
    errors: list[MpqsearchError] = []
    ended: list[int] = []
    begun: list[Trial] = []  # the trial of this round, unless it is surplus
    known: list[FrozenTrial] = []  # the last look at the study
    look_again = 0.0
    seen = 0  # trials of the study, as far as this worker knows

    def guarded(trial: Trial) -> Any:
        ended.clear()
        try:
            value = measured(trial)
        except optuna.exceptions.UpdateFinishedTrialError:
            ended.append(trial._trial_id)
            raise
        errors.clear()
        ended.append(trial._trial_id)
        return value

    def measured(trial: Trial) -> Any:
        nonlocal seen
        me.begins(trial)
        draw = _draw(study, trial, known) if plan.sampler == "random" else 0
        if (
            trial.number >= plan.trials and plan.sampler != "random"
        ):  # one of a smaller number cannot be surplus: no need to look
            known[:] = study.get_trials(deepcopy=False)
        seen = max(len(known), trial.number + 1)
        if trial.number >= plan.trials and _before(trial, known) >= plan.trials:
            trial.set_user_attr(SURPLUS, True)
            raise _SurplusError
        begun.append(trial)
        if plan.sampler == "random":  # one seed a draw: an interrupted study goes on exactly as if it had not been
            reseed(study.sampler, seed_of(plan.seed, draw))
        try:
            return objective(trial)
        except NumericsError as error:
            errors.append(error)
            trial.set_user_attr("error", str(error))
            raise

    with me, _nothing_old_collected():
        session = len(study.get_trials(deepcopy=False))
        if isinstance(plan.sampler, str):
            study.sampler = make_sampler(
                plan.sampler, seed_of(plan.seed, worker, session), plan.mode, fixed_seed=plan.seed
            )
        while not stop():
            # Far from the end a look a heartbeat is enough: a database takes longer for one than for all else. Near it
            # every look counts.
            if time.monotonic() >= look_again or seen + NEAR_END >= plan.trials:
                look_again = time.monotonic() + heartbeat_s
                known[:] = study.get_trials(deepcopy=False)
                if lookout.fail_dead_trials(study, known):
                    known[:] = study.get_trials(deepcopy=False)
                seen = len(known)
                state = counts_of(known)
                if state.finished >= plan.trials:
                    break
                if state.finished + state.running >= plan.trials and not state.waiting:
                    time.sleep(poll_s)
                    continue
            if plan.sampler == "tpe":  # it keeps no state but its generators
                reseed(study.sampler, seed_of(plan.seed, worker, seen))
            begun.clear()
            try:
                study.optimize(guarded, n_trials=1, catch=(NumericsError, _SurplusError))
                me.ends()
                for trial in begun:  # no callback of Optuna's, for which it reads the whole trial again
                    after_trial(trial)
            except Exception:
                # A worker that was held up for long finds that others have failed its trial meanwhile and queued it
                # again: what it measured is in the cache, and it takes the next one. Optuna says this with three kinds
                # of errors.
                if not any(study._storage.get_trial(i).state == optuna.trial.TrialState.FAIL for i in ended):
                    raise
            if len(errors) >= MAX_FAILURES:
                raise errors[-1]
    return counts(study)


@contextlib.contextmanager
def _nothing_old_collected() -> Iterator[None]:
    """Leave what is there now out of garbage collection: going through a model and its libraries takes longer than the
    machinery of ten trials."""
    frozen = gc.get_freeze_count() > 0  # by the caller, whose business it is
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def _before(trial: Trial, known: Sequence[FrozenTrial]) -> int:
    """Trials that began earlier and did not fail."""
    from optuna.trial import TrialState

    return sum(t.number < trial.number and t.state != TrialState.FAIL for t in known)


def _draw(study: Study, trial: Trial, known: list[FrozenTrial]) -> int:
    """The smallest number that no other trial draws: those of interrupted trials come again, those of failed
    measurements do not.

    Several workers may claim the same number at once. Each writes its claim and then looks: of two claims at least one
    is seen by the other side, and whoever sees one moves on, since the other may have begun already. A number that both
    leave is drawn by a later trial.

    ``known`` is an earlier look at the study, good enough for a first claim; it holds the last look when this returns.
    """
    from optuna.trial import TrialState

    shift, looked = 0, False
    while True:
        others = [t for t in known if t.number != trial.number and DRAW in t.user_attrs]
        taken = {int(t.user_attrs[DRAW]) for t in others if t.state != TrialState.FAIL or "error" in t.user_attrs}
        mine = trial.user_attrs.get(DRAW)
        if looked and mine is not None and mine not in taken:
            return int(mine)
        if (
            looked or mine is None
        ):  # of a retried trial the earlier look may say that its dead predecessor has the number still
            free = [i for i in range(len(taken) + shift + 1) if i not in taken]
            trial.set_user_attr(DRAW, free[shift])
        known[:], looked = study.get_trials(deepcopy=False), True
        # Those that collided spread out by their order among the running ones, or they would meet again.
        shift = sum(t.state == TrialState.RUNNING and t.number < trial.number for t in known)


def objective_of(objective: Objective, mode: Mode) -> ObjectiveFunction:
    """The function of one mode."""
    return objective.front if mode == "front" else objective.pareto


def pruning_of(pruner: str | BasePruner) -> Pruning:
    """How an objective cuts trials short under a pruner."""
    if not isinstance(pruner, str):
        return "instances" if type(pruner).__name__ == "WilcoxonPruner" else "means"
    by_name: Mapping[str, Pruning] = {"wilcoxon": "test", "median": "means", "none": "none"}
    return by_name[pruner]
