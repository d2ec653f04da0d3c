"""The outer search as a stage: set the study up, run or join its workers, write what came out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch._version import __version__
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile, bops, size_bits
from mpqsearch.errors import ArtifactError, ConfigError, SolverError
from mpqsearch.methods import MethodSpec
from mpqsearch.stages.base import Run
from mpqsearch.stages.gptq import moment_inputs, priced
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.references import quantized_module, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from optuna import Study

    from mpqsearch.search.measure import ModelEvaluator
    from mpqsearch.search.objective import Objective
    from mpqsearch.search.study import Plan

SCHEMA = "mpqsearch/search"


def search(
    run: Run,
    table: LayerTable,
    measured: SensitivityProfile,
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
    run.require_sampler("a search that is scored by samples (search)")
    c = run.config.search
    path = run.path("search", "search.json")
    inputs = search_inputs(run, table)
    # What a study depends on is checked when it is opened; with more trials it goes on, and its results are drawn up
    # again.
    if worker is None and not run.overwrite and artifacts.is_current(path, SCHEMA, inputs, overwrite=True):
        run.say(f"search: reused {path}")
        return dict(artifacts.read_json(path, SCHEMA).data)
    if run.dry_run:
        budgets = ", ".join(b.label() for b in budgets_of(run))
        run.say(f"search: would run {c.trials} trials of {c.samples} samples at the budgets {budgets}")
        return {}
    objective, plan = study_of(run, table, measured)
    study = _opened(run, plan, storage, workers, fresh=run.overwrite and worker is None)
    if worker is not None:
        _work(study, plan, objective, worker)
        return {}
    with run.timed("search"):
        if workers > 1:
            _run_workers(run, study, plan, storage, workers)
        else:
            _work(study, plan, objective, 0)
        data = _finish(run, objective, study, inputs)
    run.say(f"search: {path}")
    return data


def check_search(run: Run, *, storage: str | None = None, workers: int = 1) -> None:
    """Raise `ConfigError` for a search that cannot be run, before anything long begins."""
    from mpqsearch.search.storage import check_storage, open_storage

    if not run.config.search.trials:
        raise ConfigError("search.trials is 0: no search is asked for. Set it, for example --set search.trials=60")
    where = str(_where(run, storage))
    check_storage(where, workers=workers)
    if "://" in where and not run.dry_run and not run.path("search", "search.json").exists():
        open_storage(where, workers=workers)  # a server that does not answer


def search_inputs(run: Run, table: LayerTable) -> dict[str, str]:
    """Digests of all that the result of a search depends on."""
    c = run.config.to_data()
    c["methods"] = [m for m in c["methods"] if m["allocator"] != "map"]
    c["search"]["budgets"] = [b.label() for b in budgets_of(run)]
    c["evaluate"] = run.evaluation_inputs
    parts = ("methods", "policy", "quantizer", "evaluate", "search")
    return profile_inputs(run, table) | {k: artifacts.digest_of(c[k]) for k in parts}


def budgets_of(run: Run) -> tuple[Budget, ...]:
    """The budget grid of the search."""
    texts = run.config.search.budgets or run.config.allocate.budgets
    return tuple(Budget.parse(t) for t in texts)


def searched_method(run: Run) -> MethodSpec:
    """The method that is searched around."""
    if run.config.search.method:
        return run.config.method(run.config.search.method)
    programs = [m for m in run.config.methods if m.allocator in ("ilp-layer", "ilp-channel")]
    if not programs:
        raise ConfigError(
            "a search needs a method with an integer program (ilp-layer or ilp-channel) to search around; add one"
        )
    return programs[-1]


def study_of(run: Run, table: LayerTable, measured: SensitivityProfile) -> tuple[Objective, Plan]:
    """The objective and the plan of a run's search."""
    from mpqsearch.search.measure import Measurements, ValueCache
    from mpqsearch.search.objective import Objective
    from mpqsearch.search.space import parse_space
    from mpqsearch.search.study import Plan
    from mpqsearch.search.surrogate import Surrogate

    c = run.config.search
    surrogate = Surrogate(
        table=table,
        profile=measured,
        policy=run.config.policy,
        format=run.config.quantizer.format(),
        method=searched_method(run),
        priced=lambda method: priced(run, table, measured, method),
    )
    first_final = c.first_seed + c.samples
    measurements = Measurements(
        evaluator=_evaluator(run, table, measured),
        seeds=tuple(range(c.first_seed, first_final)),
        chunk=c.chunk,
        final=tuple(range(first_final, first_final + c.final_samples)),
        cache=ValueCache(run.path("search", "cache")),
    )
    objective = Objective(
        surrogate=surrogate, space=parse_space(c.space), measurements=measurements, budgets=budgets_of(run)
    )
    plan = Plan(
        name=c.study or run.folder.resolve().name,
        trials=c.trials,
        sampler=c.sampler,
        pruner=c.pruner,
        seed=c.seed,
        starts=objective.space.starts(),
        context=objective.context | {"sampler": artifacts.digest_of([c.sampler, c.pruner, c.seed])},
    )
    return objective, plan


def search_results(run: Run, table: LayerTable) -> dict[str, Any] | None:
    """What ``search.json`` holds, when this run has a search and it is finished."""
    path = run.path("search", "search.json")
    if not run.config.search.trials or not path.exists():
        return None
    if not artifacts.is_current(path, SCHEMA, search_inputs(run, table)):
        return None
    return dict(artifacts.read_json(path, SCHEMA).data)


def searched_map(run: Run, table: LayerTable, budget: Budget) -> tuple[BitMap, dict[str, Any]]:
    """The map that a finished search hands out at a budget, with what ``allocation.json`` would hold."""
    path = run.path("search", "search.json")
    if not artifacts.is_current(path, SCHEMA, search_inputs(run, table)):
        raise ArtifactError(f"{path} does not exist: run `mpqsearch search` first (or `mpqsearch run`, which does)")
    entries = {b["budget"]: b for b in artifacts.read_json(path, SCHEMA).data["budgets"]}
    if budget.label() not in entries:
        raise ConfigError(
            f"the search has no map at the budget {budget.label()}; it has {', '.join(entries)}. Add it to "
            "search.budgets."
        )
    entry = entries[budget.label()]
    row = next(r for r in entry["rows"] if r["arm"] == "search")
    bit_map = artifacts.load_bit_map(_map_path(run, budget))
    if bit_map.digest != row["bit_map"]:
        raise ArtifactError(
            f"the map of the search at {budget.label()} is not the one that search.json names; search again"
        )
    stored, operations = size_bits(table, bit_map), bops(table, bit_map)
    in_bops = budget.quantity == "bops"
    limit = int(budget.limit) if in_bops else budget.limit_bits(table, run.config.policy)
    notes = ["it measures worse than the uniform map of the same size"] if entry["worse_than_uniform"] else []
    return bit_map, {
        "budget": budget.label(),
        "limit": limit,
        "size_bits": stored,
        "bops": operations,
        "within_budget": (operations if in_bops else stored) <= limit,
        "predicted_loss": row["predicted"],
        "bit_map_digest": bit_map.digest,
        "bias_correction": row["bias_correction"],
        "result": None,
        "notes": notes,
        "trial": row["trial"],
        "params": row["params"],
    }


def _evaluator(run: Run, table: LayerTable, measured: SensitivityProfile) -> ModelEvaluator:
    from mpqsearch.search.measure import ModelEvaluator

    calibration = [__version__, profile_inputs(run, table), moment_inputs(run, table), run.evaluation_inputs]
    calibration += [run.config.to_data()[k] for k in ("activations", "quantizer")]
    return ModelEvaluator(
        denoiser=run.denoiser,
        sampler=run.config.sampler,
        quantized=lambda candidate: quantized_module(
            run, table, measured, candidate.bit_map, bias_correction=candidate.bias_correction
        ),
        calibration=artifacts.digest_of(calibration),
        reference=reference(run, table)[0],
        extractor=run.extractor,
        error=run.config.search.error,
        keep=len(budgets_of(run)),
    )


def _where(run: Run, storage: str | None) -> str | Path:
    from mpqsearch.search.storage import STORAGE_VARIABLE

    return storage or os.environ.get(STORAGE_VARIABLE) or run.path("search", "study.journal")


def _opened(run: Run, plan: Plan, storage: str | None, workers: int, *, fresh: bool) -> Study:
    from mpqsearch.search.storage import open_storage
    from mpqsearch.search.study import delete_study, finished_trials, open_study

    where = open_storage(_where(run, storage), workers=workers)
    if fresh:
        delete_study(plan.name, where)
    study = open_study(plan, where)
    finished = len(finished_trials(study))
    if finished:
        run.say(f"search: continuing at {finished} of {plan.trials} trials")
    return study


def _work(study: Study, plan: Plan, objective: Objective, worker: int) -> None:
    from mpqsearch.search.study import work
    from mpqsearch.search.workers import is_orphan

    with _progress(study, plan) as update:

        def after_trial(study: Study, _trial: Any) -> None:
            update()
            if is_orphan():
                study.stop()

        work(study, plan, objective, worker=worker, callbacks=[after_trial])


def _run_workers(run: Run, study: Study, plan: Plan, storage: str | None, workers: int) -> None:
    """Local worker processes: this command again, as a worker. The storage goes through the environment, where no
    list of processes shows it."""
    from mpqsearch.search.storage import STORAGE_VARIABLE, redact
    from mpqsearch.search.study import finished_trials
    from mpqsearch.search.workers import run_workers, tail

    base = [sys.executable, "-m", "mpqsearch.cli", "search", "-c", str(run.path("config.toml"))]
    commands = [[*base, "--run-dir", str(run.folder), "--worker", str(i)] for i in range(workers)]
    logs = run.path("search", "workers")
    where = storage or os.environ.get(STORAGE_VARIABLE)
    with _progress(study, plan) as update:
        codes = run_workers(
            commands, logs=logs, environment={STORAGE_VARIABLE: where} if where else {}, progress=update
        )
    for i, code in enumerate(codes):
        if code:
            run.say(f"search: worker {i} ended with exit code {code}; its log is {logs / f'worker-{i}.log'}")
    finished = len(finished_trials(study))
    if finished < plan.trials:
        failed = next((i for i, code in enumerate(codes) if code), 0)
        raise SolverError(
            f"the workers ended at {finished} of {plan.trials} trials; the same command continues. The end of the log "
            f"of worker {failed}:\n" + redact(tail(logs / f"worker-{failed}.log"))
        )


def _finish(run: Run, objective: Objective, study: Study, inputs: dict[str, str]) -> dict[str, Any]:
    """Measure what is missing, and write the maps, tables, figures and ``search.json``."""
    from mpqsearch.export import neutral_extra
    from mpqsearch.report import save_drawings
    from mpqsearch.report.search import search_drawings, search_tables
    from mpqsearch.search.results import summarize, trials_csv

    c = run.config.search
    data, chosen = summarize(objective, study, k=c.top_k, repeats=c.repeats)
    for entry in data["budgets"]:
        bit_map = chosen[entry["budget"]].bit_map
        provenance = {"method": "search", "budget": entry["budget"], "trial": entry["rows"][-1]["trial"]}
        extra = neutral_extra(objective.surrogate.table, bit_map, provenance=provenance)
        artifacts.save_bit_map(_map_path(run, Budget.parse(entry["budget"])), bit_map, inputs, extra)
        if entry["worse_than_uniform"] or entry["worse_than_plain"]:
            arm = "uniform map" if entry["worse_than_uniform"] else "map of the plain integer program"
            run.say(f"search: at {entry['budget']} the chosen map measures worse than the {arm} of the same size")
    for row in data["predicted_vs_measured"]:
        if row["weak"]:
            run.say(
                f"search: the predicted loss ranks measured maps poorly at {row['budget']}: Spearman "
                f"{row['spearman']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
            )
    for name, text in {"trials": trials_csv(study), **search_tables(data)}.items():
        artifacts.write_text(run.path("search", f"{name}.csv"), text)
    save_drawings(run.path("search", "figures"), search_drawings(data))
    artifacts.write_json(run.path("search", "search.json"), SCHEMA, data, inputs)
    return data


def _map_path(run: Run, budget: Budget) -> Path:
    return run.path("search", "maps", f"{budget.label().replace(':', '-')}.json")


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
