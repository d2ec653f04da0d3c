"""The outer search as a stage: set the study up, run or join its workers, write what came out."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile, average_bits
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.methods import MethodSpec
from mpqsearch.specs.search import INPUT_SEEDS
from mpqsearch.stages.base import Run
from mpqsearch.stages.gptq import moments_of, priced
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.smoothing import alphas_of, ranges_of

if TYPE_CHECKING:
    from optuna import Study

    from mpqsearch.search.objective import Objective
    from mpqsearch.search.refine import Refinement, RefineSpec
    from mpqsearch.search.study import Plan
    from mpqsearch.search.surrogate import Remeasure

MAPS = "maps"


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
    if worker is None and artifacts.is_current(path, "mpqsearch/search", inputs, overwrite=True) and not run.overwrite:
        run.say(f"search: reused {path}")
        return dict(artifacts.read_json(path, "mpqsearch/search").data)
    if run.dry_run:
        budgets = ", ".join(b.label() for b in budgets_of(run))
        run.say(f"search: would run {c.trials} trials of {c.samples} samples at the budgets {budgets}")
        return {}
    objective, plan = study_of(run, table, measured)
    study = _opened(run, plan, storage, workers, fresh=run.overwrite and worker is None)
    if worker is not None:
        _work(run, study, plan, objective, worker)
        return {}
    with run.timed("search"):
        if workers > 1:
            _spread(run, study, plan, storage, workers)
        else:
            _work(run, study, plan, objective, 0)
        data = _finish(run, objective, study, inputs)
    run.say(f"search: {path}")
    return data


def check_search(run: Run, *, storage: str | None = None, workers: int = 1) -> None:
    """Raise `ConfigError` for a search that cannot be run, before anything long begins."""
    from mpqsearch.search.storage import check_storage

    if not run.config.search.trials:
        raise ConfigError("search.trials is 0: no search is asked for. Set it, for example --set search.trials=60")
    where = str(_where(run, storage))
    check_storage(where, workers=workers)
    if "://" in where and not run.dry_run and not run.path("search", "search.json").exists():
        _storage(run, storage, workers)  # a server that does not answer


def search_inputs(run: Run, table: LayerTable) -> dict[str, str]:
    """Digests of all that the result of a search depends on."""
    c = run.config.to_data()
    own = {k: c[k] for k in ("methods", "policy", "quantizer")} | {"evaluate": run.evaluation_inputs}
    own["methods"] = [m for m in own["methods"] if m["allocator"] != "map"]
    settings = {k: v for k, v in c["search"].items() if k != "start_from"} | {
        "budgets": [b.label() for b in budgets_of(run)]
    }
    start = start_map(run, table)
    return profile_inputs(run, table) | {
        "search": artifacts.digest_of(settings | ({"start_from": start.digest} if start is not None else {})),
        **{k: artifacts.digest_of(v) for k, v in own.items()},
    }


def start_map(run: Run, table: LayerTable) -> BitMap | None:
    """The map that the search starts from, read from its file; None without one."""
    from mpqsearch.export import import_map

    named = run.config.search.start_from
    if not named:
        return None
    return import_map(
        Path(run.config.allocate.maps.get(named, named)), table, fmt=run.config.quantizer.format()
    ).bit_map


def budgets_of(run: Run) -> tuple[Budget, ...]:
    """The budget grid of the search."""
    texts = run.config.search.budgets or run.config.allocate.budgets
    return tuple(Budget.parse(t) for t in texts)


def searched_method(run: Run) -> MethodSpec:
    """The method that is searched around."""
    programs = [m for m in run.config.methods if m.allocator in ("ilp-layer", "ilp-channel")]
    if run.config.search.method:
        return next(m for m in run.config.methods if m.name == run.config.search.method)
    if not programs:
        raise ConfigError(
            "a search needs a method with an integer program (ilp-layer or ilp-channel) to search around; add one"
        )
    return programs[-1]


def study_of(run: Run, table: LayerTable, measured: SensitivityProfile) -> tuple[Objective, Plan]:
    """The objective and the plan of a run's search."""
    from mpqsearch.search.cache import EvaluationCache
    from mpqsearch.search.evaluator import ModelEvaluator
    from mpqsearch.search.ladder import Ladder
    from mpqsearch.search.objective import TARGET, Objective, check_budgets
    from mpqsearch.search.space import parse_space
    from mpqsearch.search.study import Plan, pruning_of
    from mpqsearch.search.surrogate import Surrogate

    c = run.config.search
    surrogate = Surrogate(
        table=table,
        profile=measured,
        policy=run.config.policy,
        format=run.config.quantizer.format(),
        method=searched_method(run),
        act_bits=c.act_bits,
        remeasure=_remeasure(run, table),
        alphas=alphas_of(run, table, measured),
        priced=lambda method: priced(run, table, measured, method),
    )
    reference, extractor = _reference(run, table)
    after = c.first_seed + c.samples
    evaluator = ModelEvaluator(
        denoiser=run.denoiser,
        table=table,
        profile=measured,
        sampler=run.config.sampler,
        input_seeds=tuple(range(after, after + INPUT_SEEDS)),
        inputs=max(c.inputs, 1),
        reference=reference,
        extractor=extractor,
        error=c.error,
        ranges=ranges_of(run),
        moments=moments_of(run, table),
    )
    ladder = Ladder(
        evaluator=evaluator,
        seeds=tuple(range(c.first_seed, c.first_seed + c.samples)),
        chunk=c.chunk,
        final=tuple(range(after + INPUT_SEEDS, after + INPUT_SEEDS + c.final_samples)),
        cache=EvaluationCache(run.path("search", "cache")),
    )
    objective = Objective(
        surrogate=surrogate,
        space=parse_space(c.space),
        ladder=ladder,
        budgets=check_budgets(budgets_of(run)),
        bits_range=(c.low_bits, c.high_bits),
        pruning=pruning_of(c.pruner),
        use_output=c.inputs > 0,
    )
    starts = objective.space.starts()
    if c.mode == "pareto":
        starts = [
            {**p, TARGET: t} for t in (c.low_bits, (c.low_bits + c.high_bits) / 2, c.high_bits) for p in starts[:1]
        ]
    start = start_map(run, table)
    if start is not None:
        from mpqsearch.search.start import start_point, with_start

        own_size = {TARGET: min(max(c.low_bits, average_bits(table, start)), c.high_bits)} if c.mode == "pareto" else {}
        starts = with_start(starts, start_point(surrogate, objective.space, start) | own_size)
    plan = Plan(
        name=c.study or run.folder.resolve().name,
        mode="pareto" if c.mode == "pareto" else "front",
        trials=c.trials,
        sampler=c.sampler,
        pruner=c.pruner,
        seed=c.seed,
        starts=starts,
        context=objective.context
        | {"sampler": artifacts.digest_of([c.sampler, c.pruner, c.seed])}
        | ({"start_from": start.digest} if start is not None else {}),
    )
    return objective, plan


def search_results(run: Run, table: LayerTable) -> dict[str, Any] | None:
    """What ``search.json`` holds, when this study has a search and it is finished."""
    path = run.path("search", "search.json")
    if (
        not run.config.search.trials
        or not path.exists()
        or not artifacts.is_current(path, "mpqsearch/search", search_inputs(run, table))
    ):
        return None
    return dict(artifacts.read_json(path, "mpqsearch/search").data)


def searched_map(run: Run, table: LayerTable, budget: Budget) -> tuple[BitMap, dict[str, Any]]:
    """The map that a finished search hands out at a budget, with what ``allocation.json`` would hold."""
    path = run.path("search", "search.json")
    if not artifacts.is_current(path, "mpqsearch/search", search_inputs(run, table)):
        raise ArtifactError(f"{path} does not exist: run `mpqsearch search` first (or `mpqsearch run`, which does)")
    data = artifacts.read_json(path, "mpqsearch/search").data
    entry = next((b for b in data["budgets"] if b["budget"] == budget.label()), None)
    if entry is None or entry["winner"] is None:
        known = ", ".join(b["budget"] for b in data["budgets"] if b["winner"])
        raise ConfigError(
            f"the search has no map at the budget {budget.label()}; it has {known}. Add it to search.budgets."
        )
    row = next(r for r in entry["rows"] if r["arm"] == "search")
    bit_map = artifacts.load_bit_map(run.path("search", MAPS, f"{_slug(budget)}.json"))
    if bit_map.digest != row["bit_map"]:
        raise ArtifactError(
            f"the map of the search at {budget.label()} is not the one that search.json names; search again"
        )
    limit = budget.limit_bits(table, run.config.policy)
    from mpqsearch.core import bops, size_bits

    stored = size_bits(table, bit_map)
    notes = ["it measures worse than the uniform map of the same size"] if entry["worse_than_uniform"] else []
    return bit_map, {
        "budget": budget.label(),
        "limit": limit,
        "size_bits": stored,
        "bops": bops(table, bit_map),
        "within_budget": stored <= limit,
        "predicted_loss": row["predicted"],
        "bit_map_digest": bit_map.digest,
        "bias_correction": row["bias_correction"],
        "result": None,
        "notes": notes,
        "trial": entry["trial"],
        "params": entry["params"],
    }


def watch(
    run: Run, table: LayerTable, measured: SensitivityProfile, *, storage: str | None = None, every_s: float = 2.0
) -> None:
    """Follow a study that others work on: a progress line until it is finished. Measures and writes nothing."""
    from mpqsearch.search.study import counts, open_study

    _, plan = study_of(run, table, measured)
    study = open_study(plan, _storage(run, storage, 1))
    line = _ProgressLine(study, plan)
    while counts(study).finished < plan.trials:
        line.update()
        time.sleep(every_s)
    line.update()
    line.close()


def _remeasure(run: Run, table: LayerTable) -> Remeasure:
    """Sensitivity at a map, on the calibration seeds."""
    from mpqsearch.profile import remeasure

    c = run.config.calibration
    seeds = range(c.first_seed, c.first_seed + c.samples)

    def measured(profile: SensitivityProfile, bit_map: BitMap) -> SensitivityProfile:
        return remeasure(
            run.denoiser,
            table,
            profile,
            replace(bit_map, activations={}),
            run.config.sampler,
            seeds,
            bias_correction=searched_method(run).bias_correction,
        )

    return measured


def refinement_of(run: Run) -> tuple[RefineSpec, int]:
    """How the winners are refined, and the first of the seeds for it."""
    from mpqsearch.search.refine import RefineSpec

    c = run.config.search
    spec = RefineSpec(
        rounds=c.refine, slope_samples=c.refine_samples, samples=c.refine_samples, batch=min(4, c.refine_samples // 4)
    )
    return spec, c.first_seed + c.samples + INPUT_SEEDS + c.final_samples


def _reference(run: Run, table: LayerTable) -> tuple[Any, Any]:
    from mpqsearch.stages.evaluating import reference

    return reference(run, table)[0], run.extractor


def _storage(run: Run, storage: str | None, workers: int) -> Any:
    from mpqsearch.search.storage import open_storage

    where = str(_where(run, storage))
    if where not in run.storages:
        run.storages[where] = open_storage(where, workers=workers)
    return run.storages[where]


def _where(run: Run, storage: str | None) -> str | Path:
    from mpqsearch.search.storage import STORAGE_VARIABLE

    return storage or os.environ.get(STORAGE_VARIABLE) or run.path("search", "study.journal")


def _opened(run: Run, plan: Plan, storage: str | None, workers: int, *, fresh: bool) -> Study:
    from mpqsearch.search.study import delete_study, open_study

    where = _storage(run, storage, workers)
    if fresh:
        delete_study(plan.name, where)
    return open_study(plan, where)


def _work(run: Run, study: Study, plan: Plan, objective: Objective, worker: int) -> None:
    from mpqsearch.search.study import counts, objective_of, work

    before = counts(study)
    if before.finished:
        run.say(f"search: continuing at {before.finished} of {plan.trials} trials")
    line = _ProgressLine(study, plan)
    gc.collect()  # the trials leave what is there now out of collection: garbage would stay as long as they last
    try:
        line.update()
        work(
            study,
            plan,
            objective_of(objective, plan.mode),
            worker=worker,
            after_trial=lambda _trial: line.update(),
        )
    finally:
        line.close()


def _spread(run: Run, study: Study, plan: Plan, storage: str | None, workers: int) -> None:
    """Local worker processes: this command line again, as a worker. The storage goes through the environment, where no
    one sees it."""
    from mpqsearch.search.storage import STORAGE_VARIABLE
    from mpqsearch.search.study import counts
    from mpqsearch.search.workers import run_local_workers

    config = run.path("config.toml")

    def command(index: int) -> list[str]:
        return [
            sys.executable,
            "-m",
            "mpqsearch.cli",
            "search",
            "-c",
            str(config),
            "--run-dir",
            str(run.folder),
            "--worker",
            str(index),
        ]

    where = storage or os.environ.get(STORAGE_VARIABLE)
    line = _ProgressLine(study, plan)
    try:
        run_local_workers(
            command,
            workers,
            environment={STORAGE_VARIABLE: where} if where else {},
            finished=lambda: counts(study).finished >= plan.trials,
            tick=line.update,
            logs=run.path("search", "workers"),
        )
    finally:
        line.close()


def _finish(run: Run, objective: Objective, study: Study, inputs: dict[str, str]) -> dict[str, Any]:
    from mpqsearch.report.search import search_tables, write_search_figures
    from mpqsearch.search.results import refine_winners, summarize, trials_as_lines

    c = run.config.search
    start = start_map(run, objective.surrogate.table)
    spec, first = refinement_of(run)
    refined = refine_winners(objective, study, spec, n_finalists=c.finalists, first_seed=first)
    data = summarize(
        objective, study, top=c.top, repeats=c.repeats, n_finalists=c.finalists, start=start, refined=refined
    )
    from mpqsearch.export import neutral_extra

    for entry in data["budgets"]:
        if entry["winner"] is None:
            continue
        budget = Budget.parse(entry["budget"])
        bit_map = _winner_map(objective, entry, budget, refined)
        provenance = {
            "method": "search",
            "budget": entry["budget"],
            "trial": entry["trial"],
            "refined": entry["refined"],
        }
        artifacts.save_bit_map(
            run.path("search", MAPS, f"{_slug(budget)}.json"),
            bit_map,
            inputs,
            neutral_extra(objective.surrogate.table, bit_map, provenance=provenance),
        )
        if entry["worse_than_uniform"]:
            run.say(
                f"search: WARNING: at {entry['budget']} the map of the search measures worse than the uniform map of "
                "the same size"
            )
        elif entry["worse_than_plain"]:
            run.say(
                f"search: note: at {entry['budget']} the map of the search measures worse than the plain integer "
                "program's"
            )
        if entry.get("worse_than_start"):
            run.say(
                f"search: note: at {entry['budget']} the map that was started from fits and measures better than what "
                "was found"
            )
    for row in data["predicted_vs_measured"]:
        if row["weak"]:
            run.say(
                f"search: the predicted loss ranks measured maps poorly at {row['budget']}: Spearman "
                f"{row['spearman']:.2f} "
                f"({row['low']:.2f}..{row['high']:.2f})"
            )
    if c.refit:
        data["refit"] = _refit(run, objective, study)
    artifacts.write_text(run.path("search", "trials.jsonl"), trials_as_lines(study))
    for name, text in search_tables(data).items():
        artifacts.write_text(run.path("search", f"{name}.csv"), text)
    write_search_figures(run.path("search", "figures"), data)
    artifacts.write_json(run.path("search", "search.json"), "mpqsearch/search", data, inputs)
    return data


def _refit(run: Run, objective: Objective, study: Study) -> dict[str, Any]:
    """Correct the loss table by the maps of the trials, solve again, and say whether it pays."""
    from mpqsearch.search.refit import MIN_MAPS, close_the_loop
    from mpqsearch.search.results import finished_trials, measured_points, winner_candidates

    points = measured_points(finished_trials(study))
    maps = [p["candidate"] for b in objective.budgets for p in winner_candidates(objective, points, b, len(points))]
    if len(maps) < MIN_MAPS:
        run.say(f"search: no re-fit: {len(maps)} measured maps, at least {MIN_MAPS} are needed")
        return {}
    data = close_the_loop(objective.surrogate, objective.ladder, objective.budgets, maps)
    fit, more = data["fit"], 100 * math.expm1(data["mean_log_ratio"])
    run.say(
        f"search: re-fit on {fit['n_maps']} maps: log error of left-out maps {fit['rms_before']:.3f} before, "
        f"{fit['rms_after']:.3f} after; solved "
        f"again, the program gives maps with {abs(more):.0f} % {'more' if more > 0 else 'less'} error than the plain "
        "one's"
    )
    return data


def _winner_map(
    objective: Objective, entry: dict[str, Any], budget: Budget, refined: Mapping[str, Refinement]
) -> BitMap:
    if entry["refined"]:
        return refined[entry["budget"]].candidate.bit_map
    if entry["trial"] is None:  # the plain program's map, which no trial had measured
        return objective.surrogate.candidate({}, budget).bit_map
    from mpqsearch.search.objective import TARGET

    params = dict(entry["params"])
    target = params.pop(TARGET, None)
    own = budget if target is None else Budget(quantity="uniform_bits", limit=target)
    return objective.surrogate.candidate(objective.space.theta(params), own).bit_map


def _slug(budget: Budget) -> str:
    return budget.label().replace(":", "-")


class _ProgressLine:
    """Finished trials, rate and time left, and the best value so far, on stderr."""

    def __init__(self, study: Study, plan: Plan) -> None:
        from mpqsearch.progress import bar_of

        self._study, self._plan = study, plan
        self._bar = bar_of("search", plan.trials, unit="trial")

    def update(self) -> None:
        """Read the study and draw the line again."""
        if self._bar.disable:
            return
        from mpqsearch.search.study import counts

        self._bar.n = min(counts(self._study).finished, self._plan.trials)
        if self._bar.initial == 0 and self._bar.n:
            self._bar.initial = self._bar.n  # what an earlier session did says nothing of the rate
        self._bar.set_postfix_str(self._best(), refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        """End the line."""
        self._bar.close()

    def _best(self) -> str:
        if self._plan.mode == "pareto":
            return f"{len(self._study.best_trials)} on the front"
        try:
            return f"best {self._study.best_value:+.3f} (log error to uniform)"
        except ValueError:
            return "no value yet"
