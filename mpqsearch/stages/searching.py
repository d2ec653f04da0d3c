"""The outer search as a stage: set the study up, run or join its workers, write what came out."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from mpqsearch import artifacts, untrusted
from mpqsearch._version import __version__
from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError, SolverError
from mpqsearch.methods import MethodSpec
from mpqsearch.methods.spec import PROGRAMS
from mpqsearch.secrets import redact
from mpqsearch.stages.base import Run
from mpqsearch.stages.preflight import check_sampling
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.references import quantized_module, reference
from mpqsearch.stages.reuse import SEARCH, current
from mpqsearch.stages.searched import budgets_of, map_file, results_file, search_inputs
from mpqsearch.stages.selecting import plain_method
from mpqsearch.stages.statistics import moment_inputs, priced

if TYPE_CHECKING:
    from collections.abc import Callable

    from optuna import Study
    from optuna.storages import BaseStorage

    from mpqsearch.search.measure import ModelEvaluator
    from mpqsearch.search.objective import Objective
    from mpqsearch.search.study import Plan


def search(
    run: Run,
    *,
    storage: str | None = None,
    workers: int = 1,
    worker: int | None = None,
) -> dict[str, Any]:
    """Run the outer search, continue it, or reuse ``search/search.json``; returns what that file holds.

    ``storage`` is a URL or a journal file (default: the environment variable ``MPQSEARCH_STORAGE``, else
    ``search/study.journal`` in the run folder). ``workers`` local processes share the study. With ``worker`` this
    process is one of many: it works until the study has its trials and writes nothing but measurements.
    """
    check_search(run, storage=storage, workers=workers)
    check_sampling(run, "a search that is scored by samples (search)")
    inputs = search_inputs(run)
    # What a study depends on is checked when it is opened; with more trials it goes on, and its results are drawn up
    # again.
    if worker is None and not run.overwrite and (results := current(SEARCH, results_file(run), inputs)) is not None:
        run.say(f"search: reused {results_file(run)}")
        return dict(results)
    if run.dry_run:
        c, budgets = run.config.search, ", ".join(b.label() for b in budgets_of(run))
        run.say(f"search: would run {c.trials} trials of {c.samples} samples at the budgets {budgets}")
        return {}
    from mpqsearch.search.storage import joined, open_storage
    from mpqsearch.search.study import fail_interrupted

    where = _where(run, storage)
    opened = open_storage(where, workers=workers)  # first: a server that does not answer is said at once
    objective, plan = study_of(run)
    with joined(_identity_file(run)) as alone:
        study = _opened(run, plan, opened, fresh=run.overwrite and worker is None)
        if alone and where == _own_journal(run):
            fail_interrupted(study)
        with run.timed("search"), _progress(study, plan) as progress:
            if workers > 1 and worker is None:
                _run_workers(run, study, plan, where, workers, progress)
            else:
                _work(study, plan, objective, opened, worker or 0, progress)
    if worker is not None:
        return {}
    with run.timed("search"):
        data = _finish(run, objective, study, inputs)
    run.say(f"search: {results_file(run)}")
    return data


def check_search(run: Run, *, storage: str | None = None, workers: int = 1) -> None:
    """Raise `ConfigError` for a search that cannot be run, before anything long begins."""
    from mpqsearch.search.storage import check_storage, open_storage

    if not run.config.search.trials:
        raise ConfigError("search.trials is 0: no search is asked for. Set it, for example --set search.trials=60")
    where = str(_where(run, storage))
    check_storage(where, workers=workers)
    if "://" in where and not run.dry_run and not results_file(run).exists():
        open_storage(where, workers=workers)  # a server that does not answer


def searched_method(run: Run) -> MethodSpec:
    """The method that is searched around."""
    named = run.config.search.method
    known = [plain_method(m, run.profile) if m.allocator == "measured" else m for m in run.config.methods]
    if named:
        _ = run.config.method(named)
        return next(m for m in known if m.name == named)
    programs = [m for m in known if m.allocator in PROGRAMS]
    if not programs:
        raise ConfigError(
            "a search needs a method with an integer program (ilp-layer or ilp-channel) to search around; add one"
        )
    return programs[-1]


def study_of(run: Run) -> tuple[Objective, Plan]:
    """The objective and the plan of a run's search."""
    from mpqsearch.search.measure import Measurements, ValueCache
    from mpqsearch.search.objective import Objective
    from mpqsearch.search.space import parse_space
    from mpqsearch.search.study import Plan
    from mpqsearch.search.surrogate import Surrogate

    c = run.config.search
    surrogate = Surrogate(
        table=run.table,
        profile=run.profile,
        policy=run.config.policy,
        format=run.config.quantizer.format(),
        method=searched_method(run),
        priced=lambda method: priced(run, method),
    )
    first_final = c.first_seed + c.samples
    measurements = Measurements(
        evaluator=_evaluator(run),
        seeds=tuple(range(c.first_seed, first_final)),
        chunk=c.chunk,
        final=tuple(range(first_final, first_final + c.final_samples)),
        cache=ValueCache(run.path("search", "cache")),
    )
    runner, module = run.denoiser.runner, run.denoiser.module
    runner.encode(module, measurements.seeds, batch=min(c.chunk, runner.batch))
    runner.encode(module, measurements.final)
    objective = Objective(
        surrogate=surrogate, space=parse_space(c.space), measurements=measurements, budgets=budgets_of(run)
    )
    plan = Plan(
        name=c.study or f"{run.folder.resolve().name}-{_identity(run)}",
        folder=_identity(run),
        trials=c.trials,
        sampler=c.sampler,
        pruner=c.pruner,
        seed=c.seed,
        starts=objective.space.starts(),
        context=objective.context | {"sampler": artifacts.digest_of([c.sampler, c.pruner, c.seed])},
    )
    return objective, plan


def _identity(run: Run) -> str:
    """What tells this run folder from all others, on whatever machine: drawn once, and kept in it. Of workers that draw
    one at the same time the first is kept."""
    path, drawn = _identity_file(run), secrets.token_hex(6)
    if not path.exists():
        own = path.with_name(f"{artifacts.temporary_prefix()}{drawn}.json")
        artifacts.write_json(own, "mpqsearch/identity", {"identity": drawn}, {})
        try:
            os.link(own, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            own.replace(path)
        own.unlink(missing_ok=True)
    return untrusted.build(_Identity, artifacts.read_json(path, "mpqsearch/identity").data, str(path))["identity"]


def _identity_file(run: Run) -> Path:
    return run.path("search", "identity.json")


class _Identity(TypedDict):
    identity: str


def _evaluator(run: Run) -> ModelEvaluator:
    from mpqsearch.search.measure import ModelEvaluator

    calibration = [__version__, profile_inputs(run), moment_inputs(run), run.evaluation_inputs]
    calibration += [run.config.to_data()[k] for k in ("activations", "quantizer")]
    return ModelEvaluator(
        denoiser=run.denoiser,
        quantized=lambda candidate: quantized_module(run, candidate.bit_map, bias_correction=candidate.bias_correction),
        calibration=artifacts.digest_of(calibration),
        reference=reference(run),
        extractor=run.extractor,
        error=run.config.search.error,
        keep=len(budgets_of(run)),
    )


def _where(run: Run, storage: str | None) -> str | Path:
    from mpqsearch.search.storage import STORAGE_VARIABLE

    return storage or os.environ.get(STORAGE_VARIABLE) or _own_journal(run)


def _own_journal(run: Run) -> Path:
    return run.path("search", "study.journal").resolve()


def _opened(run: Run, plan: Plan, storage: BaseStorage, *, fresh: bool) -> Study:
    from mpqsearch.search.study import delete_study, finished_trials, open_study

    if fresh:
        delete_study(plan, storage)
    study = open_study(plan, storage)
    if finished := len(finished_trials(study)):
        run.say(f"search: continuing at {finished} of {plan.trials} trials")
    return study


def _work(
    study: Study,
    plan: Plan,
    objective: Objective,
    storage: BaseStorage,
    worker: int,
    progress: Callable[[], None],
) -> None:
    from mpqsearch.search.study import work
    from mpqsearch.search.workers import end_with_parent

    end_with_parent()
    work(study, plan, objective, storage=storage, worker=worker, callbacks=[lambda _study, _trial: progress()])


def _run_workers(
    run: Run, study: Study, plan: Plan, where: str | Path, workers: int, progress: Callable[[], None]
) -> None:
    """Local worker processes: this command again, as a worker. The storage goes through the environment, where no
    list of processes shows it."""
    from mpqsearch.search.storage import STORAGE_VARIABLE
    from mpqsearch.search.study import finished_trials
    from mpqsearch.search.workers import run_workers, tail

    base = [sys.executable, "-m", "mpqsearch.cli", "search", "-c", str(run.path("config.toml"))]
    commands = [[*base, "--run-dir", str(run.folder), "--worker", str(i)] for i in range(workers)]
    logs = run.path("search", "workers")
    codes = run_workers(commands, logs=logs, environment={STORAGE_VARIABLE: str(where)}, progress=progress)
    failed = [i for i, code in enumerate(codes) if code]
    for i in failed:
        run.say(f"search: worker {i} ended with exit code {codes[i]}; its log is {logs / f'worker-{i}.log'}")
    finished = len(finished_trials(study))
    if finished < plan.trials:
        first = failed[0] if failed else 0
        raise SolverError(
            f"the workers ended at {finished} of {plan.trials} trials; the same command continues. The end of the log "
            f"of worker {first}:\n" + redact(tail(logs / f"worker-{first}.log"))
        )


def _finish(run: Run, objective: Objective, study: Study, inputs: dict[str, str]) -> dict[str, Any]:
    """Measure what is missing, and write the maps, the table and ``search.json``; the report draws them."""
    from mpqsearch.export import neutral_extra
    from mpqsearch.search.results import summarize, trials_csv

    c = run.config.search
    data, chosen = summarize(objective, study, k=c.top_k)
    for entry in data["budgets"]:
        bit_map = chosen[entry["budget"]].bit_map
        provenance = {"method": "search", "budget": entry["budget"], "trial": entry["rows"][-1]["trial"]}
        extra = neutral_extra(objective.surrogate.table, bit_map, provenance=provenance)
        artifacts.save_bit_map(map_file(run, Budget.parse(entry["budget"])), bit_map, inputs, extra)
        if entry["worse_than_uniform"] or entry["worse_than_plain"]:
            arm = "uniform map" if entry["worse_than_uniform"] else "map of the plain integer program"
            run.say(f"search: at {entry['budget']} the chosen map measures worse than the {arm} of the same size")
    for row in data["predicted_vs_measured"]:
        if row["weak"]:
            run.say(
                f"search: the predicted loss ranks measured maps poorly at {row['budget']}: Spearman "
                f"{row['spearman']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
            )
    artifacts.write_text(run.path("search", "trials.csv"), trials_csv(study))
    SEARCH.save(results_file(run), data, inputs)
    return data


@contextmanager
def _progress(study: Study, plan: Plan) -> Iterator[Callable[[], None]]:
    """A bar of finished trials and the best value so far; yields what reads the study and draws it again."""
    from mpqsearch.progress import bar_of
    from mpqsearch.search.study import finished_trials

    bar = bar_of("search", plan.trials, unit="trial")

    def update() -> None:
        trials = finished_trials(study)
        values = [t.value for t in trials if t.state.name == "COMPLETE" and t.value is not None]
        if values:
            bar.set_postfix_str(f"best {min(values):+.3f} (log error to uniform)", refresh=False)
        bar.update(min(len(trials), plan.trials) - bar.n)

    try:
        update()
        yield update
    finally:
        bar.close()
