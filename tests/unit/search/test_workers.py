from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from mpqsearch.errors import SolverError
from mpqsearch.search import storage as storage_module
from mpqsearch.search import workers as workers_module
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import counts
from mpqsearch.search.workers import BEAT, WORKER, Lookout, Worker, run_local_workers
from tests.unit.search import servers
from tests.unit.search.a_worker import STUDY

ROOT = Path(__file__).parents[3]
TRIALS = int(os.environ.get("MPQSEARCH_TRIALS", "48"))
"""The number of trials that four workers share; the benchmark runs 200."""

SCRIPT = Path(__file__).with_name("a_worker.py")


@pytest.fixture(params=["journal", *servers.KINDS])
def storage(request: pytest.FixtureRequest, tmp_path: Path, urls: Callable[[str], str]) -> Iterator[str]:
    if request.param == "journal":
        yield str(tmp_path / "study.journal")
        return
    url = urls(request.param)
    yield url
    optuna.delete_study(study_name=STUDY, storage=open_storage(url))


def start(storage: str, folder: Path, index: int, trials: int, pause_s: float, *rest: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), storage, str(folder), str(index), str(trials), str(pause_s), *rest]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = (folder / f"worker-{index}.log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def wait(processes: list[subprocess.Popen[bytes]], folder: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.wait(timeout=max(1.0, end - time.monotonic()))
    logs = "\n".join(p.read_text()[-2000:] for p in sorted(folder.glob("worker-*.log")))
    assert [p.returncode for p in processes] == [0] * len(processes), logs


def check_whole(storage: str, folder: Path, trials: int) -> optuna.Study:
    """Exactly ``trials`` finished ones, no draw twice, no map measured twice, nothing left running."""
    study = optuna.load_study(study_name=STUDY, storage=open_storage(storage))
    state = counts(study)
    assert (state.finished, state.running, state.waiting) == (trials, 0, 0)
    done = [t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]
    assert len({t.user_attrs["draw"] for t in done}) == trials
    assert len({tuple(sorted(t.params.items())) for t in done}) == trials
    measured = Counter(
        word
        for line in (folder / "measured.txt").read_text().splitlines()
        for word in line.split(" ")[2:]
        if len(word) == 64
    )
    assert measured
    assert max(measured.values()) == 1
    return study


@pytest.mark.slow
def test_four_workers_lose_no_trial_and_repeat_none(storage: str, tmp_path: Path) -> None:
    wait([start(storage, tmp_path, i, TRIALS, 0.0) for i in range(4)], tmp_path)
    study = check_whole(storage, tmp_path, TRIALS)
    assert len({t.user_attrs["worker"] for t in study.get_trials() if "worker" in t.user_attrs}) > 1


@pytest.mark.slow
def test_a_killed_worker_costs_no_trial(storage: str, tmp_path: Path) -> None:
    workers = [start(storage, tmp_path, i, 24, 0.15) for i in range(3)]
    victim = workers[1]
    log = tmp_path / "measured.txt"
    end = time.monotonic() + 60
    while not (log.exists() and any(line.startswith("1 ") for line in log.read_text().splitlines())):
        assert time.monotonic() < end, "the victim never finished a trial"
        time.sleep(0.05)
    time.sleep(0.1)  # in the middle of its next trial
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    wait([workers[0], workers[2]], tmp_path)
    study = check_whole(storage, tmp_path, 24)
    lost = [
        t for t in study.get_trials() if t.state == optuna.trial.TrialState.FAIL and not t.user_attrs.get("surplus")
    ]
    retried = [t.system_attrs["failed_trial"] for t in study.get_trials() if "failed_trial" in t.system_attrs]
    assert sorted(retried) == [t.number for t in lost]
    assert all(study.get_trials()[t.number].params.items() <= _retry_of(study, t.number).params.items() for t in lost)


def _retry_of(study: optuna.Study, number: int) -> optuna.trial.FrozenTrial:
    return next(t for t in study.get_trials() if t.system_attrs.get("failed_trial") == number)


def test_trials_of_the_dead_are_tried_again_with_the_same_parameters() -> None:
    study = optuna.create_study()
    dead = study.ask()
    dead.suggest_float("exponent", 0.5, 2.0)
    with Worker(study, 3) as mine:
        mine.begins(dead)
        assert Lookout(grace_s=0).fail_dead_trials(study) == 0
    assert (
        Lookout(grace_s=60).fail_dead_trials(study) == 1
    )  # it worked in this process, and does so no more: noticed at once
    failed, queued = study.get_trials()
    assert (failed.state, queued.state) == (optuna.trial.TrialState.FAIL, optuna.trial.TrialState.WAITING)
    assert failed.user_attrs[WORKER] == mine.identity
    again = study.ask()
    assert again.suggest_float("exponent", 0.5, 2.0) == dead.params["exponent"]
    assert WORKER not in again.user_attrs  # or it would be failed again before its new worker could sign it
    assert Lookout(grace_s=60).fail_dead_trials(study) == 0


def test_a_worker_that_died_before_it_could_sign_is_given_the_grace_from_its_start() -> None:
    study = optuna.create_study()
    study.ask()
    assert Lookout(grace_s=60).fail_dead_trials(study) == 0
    assert Lookout(grace_s=-1).fail_dead_trials(study) == 1


def test_a_process_that_is_gone_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with monkeypatch.context() as there:
        there.setattr(os, "getpid", lambda: ended.pid)
        worker = Worker(study)
    with worker:
        worker.begins(study.ask())
        assert Lookout(grace_s=60).fail_dead_trials(study) == 1


def test_of_another_machine_only_the_beats_count_on_the_clock_of_who_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    study, clock = optuna.create_study(), [1000.0]
    monkeypatch.setattr(workers_module.time, "monotonic", lambda: clock[0])
    trial = study.ask()
    trial.set_user_attr(WORKER, "some-other-host-1a2b3c-1-0-abcdef")
    look = Lookout(grace_s=60)
    assert look.fail_dead_trials(study) == 0  # the first look: it may have beaten a moment ago
    clock[0] += 59
    trial.set_user_attr(BEAT, 1)
    assert look.fail_dead_trials(study) == 0
    clock[0] += 59
    assert look.fail_dead_trials(study) == 0
    assert Lookout(grace_s=60).fail_dead_trials(study) == 0  # who looks for the first time
    clock[0] += 2
    assert look.fail_dead_trials(study) == 1


def test_a_long_trial_beats_and_a_short_one_writes_nothing() -> None:
    study = optuna.create_study()
    with Worker(study, heartbeat_s=0.05) as worker:
        long = study.ask()
        worker.begins(long)
        end = time.monotonic() + 10
        while study.get_trials()[0].user_attrs.get(BEAT, 0) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        study.tell(long, 1.0)
        time.sleep(0.2)  # beats on a trial that has ended do no harm
    with Worker(study, heartbeat_s=30) as worker:
        worker.begins(short := study.ask())
        study.tell(short, 1.0)
    assert BEAT not in study.get_trials()[1].user_attrs


def test_a_local_worker_that_dies_is_started_again_and_then_given_up(tmp_path: Path) -> None:
    ticks: list[int] = []
    once = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'once')!r}); e = p.exists(); p.touch(); sys.exit(0 if e else 3)"
    run_local_workers(
        lambda _: [sys.executable, "-c", once],
        1,
        environment={},
        finished=lambda: False,
        tick=lambda: ticks.append(1),
        logs=tmp_path,
        poll_s=0.05,
    )
    assert ticks
    broken = "import sys; print('postgresql://me:hidden@host/db is down'); sys.exit(5)"
    with pytest.raises(SolverError, match="exit code 5") as caught:
        run_local_workers(
            lambda _: [sys.executable, "-c", broken],
            1,
            environment={},
            finished=lambda: False,
            tick=lambda: None,
            logs=tmp_path,
            poll_s=0.05,
        )
    assert "me:***@host" in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("kind", ["postgresql", "journal+postgresql"])
def test_a_connection_that_the_server_closed_while_it_rested_is_replaced(
    kind: str, urls: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = urls(kind)
    import psycopg

    monkeypatch.setattr(storage_module, "REST_S", 0.0)
    study = optuna.create_study(study_name="rested", storage=open_storage(url))
    try:
        with psycopg.connect(url.removeprefix(servers.JOURNAL), autocommit=True) as other:
            others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
            closed = other.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}").fetchall()
        assert closed
        study.set_user_attr("a", 1)
        assert study.user_attrs == {"a": 1}
    finally:
        optuna.delete_study(study_name="rested", storage=open_storage(url))
