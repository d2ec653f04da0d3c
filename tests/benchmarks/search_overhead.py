"""Time that the machinery of the outer search takes beside the model, at trials of one second; and 200 trials by four workers.

    python tests/benchmarks/search_overhead.py [journal|postgresql|mysql|redis|grpc ...]

Everything but the measurements counts as machinery: sampler, storage, allocation, cache, bookkeeping. Measurements are pauses of
known length, so the overhead is the rest. What the stand-in for a model computes beside its pauses is timed by itself and taken off too.
CPU time and wall time are both printed: on a busy machine only the first means anything.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import counts, open_study, work
from tests.unit.search import servers
from tests.unit.search.a_worker import STUDY, objective_in, plan_of

SCRIPT = Path(__file__).parents[1] / "unit/search/a_worker.py"
ROOT = Path(__file__).parents[2]


def overhead(where: str | Path, folder: Path, sampler: str, trials: int = 20, trial_s: float = 1.0) -> None:
    """Run trials of about a second in this process."""
    o = objective_in(folder, trial_s / 2)  # two measurements a trial
    plan = plan_of(o, trials, sampler)
    study = open_study(plan, open_storage(where))
    for b in o.budgets:
        o.ladder.errors(o.uniform(b))  # the uniform maps are measured once a study
    statements = count_statements(study)
    before = len(o.ladder.evaluator.measured)
    own = count_seconds(o.ladder.evaluator)
    cpu, wall = time.process_time(), time.perf_counter()
    work(study, plan, o.front)
    cpu, wall = time.process_time() - cpu - own[0], time.perf_counter() - wall - own[0]
    paused = (len(o.ladder.evaluator.measured) - before) * trial_s / 2
    print(
        f"{name_of(where):10} {sampler:7} {trials} trials of up to {trial_s:g} s (maps that repeat cost nothing): machinery "
        f"{1000 * cpu / trials:.0f} ms of CPU a trial, {100 * cpu / trials / trial_s:.1f} % of a trial; with waiting "
        f"{1000 * (wall - paused) / trials:.0f} ms, {100 * (wall - paused) / trials / trial_s:.1f} %"
        + (f"; {statements[0] / trials:.0f} SQL statements a trial" if statements[0] else ""),
        flush=True,
    )


def count_seconds(evaluator: Any) -> list[float]:
    """Processor seconds that grow with every measurement of the stand-in for a model."""
    seconds = [0.0]
    measure = evaluator.sample_errors

    def timed(*arguments: Any) -> Any:
        began = time.thread_time()
        found = measure(*arguments)
        seconds[0] += time.thread_time() - began
        return found

    evaluator.sample_errors = timed
    return seconds


def count_statements(study: Any) -> list[int]:
    """A count that grows with every SQL statement of a study in a database, heartbeats included."""
    from sqlalchemy import event

    count = [0]
    engine = getattr(study._storage, "engine", None) or getattr(getattr(study._storage, "_backend", None), "engine", None)
    if engine is not None:

        @event.listens_for(engine, "before_cursor_execute")
        def counts_one(*_: Any) -> None:
            count[0] += 1

    return count


def four_workers(where: str | Path, folder: Path, trials: int = 200) -> None:
    """A cheap objective, four processes: every trial once, no map measured twice."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    workers = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(where), str(folder), str(i), str(trials), "0.0"], env=environment)
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
        f"{name_of(where):10} four workers: {state.finished} of {trials} finished in {seconds:.0f} s, exit codes {codes}, "
        f"every draw once: {len(set(draws)) == trials}, maps measured more than once: {sum(n > 1 for n in measured.values())}",
        flush=True,
    )


def name_of(where: str | Path) -> str:
    """Kind of a storage."""
    return str(where).split("://", 1)[0] if "://" in str(where) else "journal"


def main() -> None:
    """All storages of the command line, or those that are named."""
    import optuna

    for kind in sys.argv[1:] or ["journal", *servers.DRIVERS]:
        if kind != "journal" and (reason := servers.missing(kind)):
            print(f"{kind} not run: {reason}")
            continue
        with servers.server(kind) if kind != "journal" else contextlib.nullcontext() as url:
            for what in ("random", "tpe", "four"):
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    where = url or folder / "study.journal"
                    if what == "four":
                        four_workers(where, folder)
                    else:
                        overhead(where, folder, what)
                    if url:
                        optuna.delete_study(study_name=STUDY, storage=open_storage(url))


if __name__ == "__main__":
    main()
