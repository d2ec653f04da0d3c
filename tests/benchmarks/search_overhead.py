"""Time that the machinery of the outer search takes beside the model, at trials of one second; and 200 trials by four
workers.

    python tests/benchmarks/search_overhead.py [journal|postgresql|mysql|redis|grpc|journal+postgresql|journal+mysql
    ...] python tests/benchmarks/search_overhead.py model     # the second one with the model itself, some minutes

Two searches, both with TPE and the Wilcoxon test, as they stand by default. ``small``: 14 layers by layer, two budgets,
three parameters, two measurements a trial. ``fmnist-unet``: `mpqsearch search` on that model, 65 layers with 3,977
channels, by channel or by layer at three budgets, eleven parameters, 16 seeds in chunks of 4: 15 measurements a trial.
Only the model is a stand-in, whose measurements are pauses, a second in a trial that is not cut short. Everything else
counts as machinery: sampler, storage, allocation, cache, bookkeeping. What the stand-in computes beside its pauses is
timed by itself and taken off, and what a process loads once is loaded before. CPU time and wall time are both printed:
on a busy machine only the first means anything.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from mpqsearch.allocate import warm_up
from mpqsearch.config import SearchConfig, config_from
from mpqsearch.core import Budget, Policy, QuantFormat
from mpqsearch.methods import MethodSpec
from mpqsearch.models import discover, load_model
from mpqsearch.search.cache import EvaluationCache
from mpqsearch.search.ladder import Ladder
from mpqsearch.search.objective import Objective
from mpqsearch.search.space import parse_space
from mpqsearch.search.sql_journal import SqlJournalBackend
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import Plan, counts, open_study, pruning_of, work
from mpqsearch.search.surrogate import Surrogate
from mpqsearch.stages import Run, layers, profile
from mpqsearch.stages.searching import study_of
from tests.support.synthetic import SyntheticEvaluator
from tests.support.tiny import tiny_profile
from tests.unit.search import servers
from tests.unit.search.a_worker import STUDY, objective_in

SCRIPT = Path(__file__).parents[1] / "unit/search/a_worker.py"
ROOT = Path(__file__).parents[2]
TRIALS = 30
BUDGETS = tuple(Budget.parse(f"uniform:{bits}") for bits in (2, 3, 4))


def small(folder: Path, trial_s: float) -> Objective:
    """Of the tests."""
    o = objective_in(folder, trial_s / 2)
    o.pruning = pruning_of(SearchConfig().pruner)
    return o


def fmnist_unet(folder: Path, trial_s: float) -> Objective:
    """The default search of the model."""
    c, table = SearchConfig(), discover(load_model("fmnist-unet"))
    profile = tiny_profile(table)
    method = MethodSpec(name="plain", allocator="ilp-channel", loss="gain", scheme="auto", bias_correction=True)
    measurements = len(BUDGETS) * (1 + -(-c.samples // c.chunk))
    return Objective(
        surrogate=Surrogate(table=table, profile=profile, policy=Policy(), format=QuantFormat(), method=method),
        space=parse_space(c.space),
        ladder=Ladder(
            evaluator=SyntheticEvaluator(table=table, profile=profile, pause_s=trial_s / measurements),
            seeds=tuple(range(c.samples)),
            chunk=c.chunk,
            cache=EvaluationCache(folder / "cache"),
        ),
        budgets=BUDGETS,
        pruning=pruning_of(c.pruner),
    )


SEARCHES = {"small": small, "fmnist-unet": fmnist_unet}


def overhead(which: str, where: str | Path, folder: Path, trial_s: float = 1.0) -> None:
    """Run trials of about a second in this process."""
    c, o = SearchConfig(), SEARCHES[which](folder, trial_s)
    plan = Plan(
        name=STUDY, trials=TRIALS, sampler=c.sampler, pruner=c.pruner, starts=o.space.starts(), context=o.context
    )
    study = open_study(plan, open_storage(where))
    evaluator = o.ladder.evaluator
    for b in o.budgets:  # the uniform maps are measured once a study
        o.ladder.errors(o.uniform(b))
        o.ladder.output_error(o.uniform(b))
    o.candidates({})
    statements = count_statements(study)
    own, before = count_seconds(evaluator), len(evaluator.measured)
    cpu, wall = time.process_time(), time.perf_counter()
    work(study, plan, o.front)
    cpu, wall = time.process_time() - cpu - own[0], time.perf_counter() - wall - own[0]
    paused = (len(evaluator.measured) - before) * evaluator.pause_s
    print(
        f"{name_of(where):18} {which:11} {TRIALS} trials of up to {trial_s:g} s ({paused:.0f} s, what is cut short or "
        "repeated left out): machinery "
        f"{1000 * cpu / TRIALS:.0f} ms of CPU a trial, {100 * cpu / TRIALS / trial_s:.1f} %; with waiting "
        f"{1000 * (wall - paused) / TRIALS:.0f} ms"
        + (f"; {statements[0] / TRIALS:.0f} SQL statements a trial" if statements[0] else ""),
        flush=True,
    )


def model_itself(folder: Path, budgets: tuple[Budget, ...], samples: int) -> None:
    """The search of fmnist-unet, whose measurements are real; what they take is taken off."""
    config = config_from(
        {
            "model": {"source": "fmnist-unet"},
            "allocate": {"budgets": [b.label() for b in budgets]},
            "calibration": {"samples": 8, "probe_inputs": 80, "probes": 2},
            "search": {"trials": TRIALS, "samples": samples},
        }
    )
    run = Run(config=config, folder=folder)
    table = layers(run)
    measured = profile(run, table)
    assert measured is not None
    o, plan = study_of(run, table, measured)
    study = open_study(plan, open_storage(folder / "study.journal"))
    for b in o.budgets:
        o.ladder.errors(o.uniform(b))
        o.ladder.output_error(o.uniform(b))
    o.candidates({})
    own, cpu = count_seconds(o.ladder.evaluator), time.process_time()
    work(study, plan, o.front)
    cpu = time.process_time() - cpu - own[0]
    print(
        f"model              fmnist-unet, budgets: {len(budgets)}, seeds: {samples}: {TRIALS} trials, "
        f"{own[0] / TRIALS:.1f} s of measurements each: machinery "
        f"{1000 * cpu / TRIALS:.0f} ms of CPU a trial, {100 * cpu / own[0]:.2f} %",
        flush=True,
    )


def count_seconds(evaluator: Any) -> list[float]:
    """Processor seconds that grow with every measurement of the stand-in for a model."""
    seconds = [0.0]

    def timed(measure: Any) -> Any:
        def measured(*arguments: Any) -> Any:
            began = time.process_time()
            found = measure(*arguments)
            seconds[0] += time.process_time() - began
            return found

        return measured

    for name in ("sample_errors", "output_error"):
        setattr(evaluator, name, timed(getattr(evaluator, name)))
    return seconds


def count_statements(study: Any) -> list[int]:
    """A count that grows with every SQL statement of a study in a database, heartbeats included; what is sent at once
    counts as one."""
    from sqlalchemy import event

    count = [0]
    storage = study._storage
    backend = getattr(storage, "_backend", None)  # of a journal, or Optuna's tables behind its cache
    if isinstance(backend, SqlJournalBackend):  # past SQLAlchemy
        execute = backend._execute

        def counted(*arguments: Any) -> Any:
            count[0] += 1
            return execute(*arguments)

        backend._execute = counted
    elif engine := getattr(storage, "engine", None) or getattr(backend, "engine", None):

        @event.listens_for(engine, "before_cursor_execute")
        def counts_one(*_: Any) -> None:
            count[0] += 1

    return count


def four_workers(where: str | Path, folder: Path, trials: int = 200) -> None:
    """A cheap objective, four processes: every trial once, no map measured twice."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(where), str(folder), str(i), str(trials), "0.0"], env=environment
        )
        for i in range(4)
    ]
    codes = [w.wait() for w in workers]
    seconds = time.perf_counter() - began
    import optuna

    study = optuna.load_study(study_name=STUDY, storage=open_storage(where))
    state = counts(study)
    draws = sorted(t.user_attrs["draw"] for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE)
    words = (folder / "measured.txt").read_text().split()
    measured = Counter(w for w in words if len(w) == 64)
    print(
        f"{name_of(where):18} four workers: {state.finished} of {trials} finished in {seconds:.0f} s, exit codes "
        f"{codes}, "
        f"every draw once: {len(set(draws)) == trials}, maps measured more than once: "
        f"{sum(n > 1 for n in measured.values())}",
        flush=True,
    )


def name_of(where: str | Path) -> str:
    """Kind of a storage."""
    return str(where).split("://", 1)[0] if "://" in str(where) else "journal"


def main() -> None:
    """All storages of the command line, or those that are named."""
    import optuna

    warm_up()
    for kind in sys.argv[1:] or ["journal", *servers.KINDS]:
        if kind == "model":
            # As it stands by default, and with trials of about a second.
            for budgets, samples in ((BUDGETS, SearchConfig().samples), (BUDGETS[1:2], 8)):
                with tempfile.TemporaryDirectory() as name:
                    model_itself(Path(name), budgets, samples)
            continue
        if kind != "journal" and (reason := servers.missing(kind)):
            print(f"{kind} not run: {reason}")
            continue
        with servers.server(kind) if kind != "journal" else contextlib.nullcontext() as url:
            for run in (*(functools.partial(overhead, which) for which in SEARCHES), four_workers):
                with tempfile.TemporaryDirectory() as name:
                    where = url or Path(name) / "study.journal"
                    run(where, Path(name))
                    if url:
                        optuna.delete_study(study_name=STUDY, storage=open_storage(url))


if __name__ == "__main__":
    main()
