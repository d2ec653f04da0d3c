from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from mpqsearch.errors import SolverError
from mpqsearch.search import storage as storage_module
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import counts
from mpqsearch.search.workers import SignOfLife, fail_dead_trials, is_alive, run_local_workers, sign, worker_identity
from tests.unit.search import postgres
from tests.unit.search.a_worker import STUDY

ROOT = Path(__file__).parents[3]
TRIALS = int(os.environ.get("MPQSEARCH_TRIALS", "48"))
"""The number of trials that four workers share; the benchmark runs 200."""

SCRIPT = Path(__file__).with_name("a_worker.py")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    reason = postgres.missing()
    if reason:
        pytest.skip(reason)
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "journal":
        yield str(tmp_path / "study.journal")
        return
    url = request.getfixturevalue("postgres_url")
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
        word for line in (folder / "measured.txt").read_text().splitlines() for word in line.split(" ")[2:] if len(word) == 64
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
    lost = [t for t in study.get_trials() if t.state == optuna.trial.TrialState.FAIL and not t.user_attrs.get("surplus")]
    retried = [t.system_attrs["failed_trial"] for t in study.get_trials() if "failed_trial" in t.system_attrs]
    assert sorted(retried) == [t.number for t in lost]
    assert all(study.get_trials()[t.number].params.items() <= _retry_of(study, t.number).params.items() for t in lost)


def _retry_of(study: optuna.Study, number: int) -> optuna.trial.FrozenTrial:
    return next(t for t in study.get_trials() if t.system_attrs.get("failed_trial") == number)


def test_a_database_gives_trials_of_workers_that_died_before_their_first_heartbeat_to_others(tmp_path: Path) -> None:
    """Optuna makes the first heartbeat in a thread, and takes no trial without one for dead: the study would wait for it for ever."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    database = optuna.storages.RDBStorage(url, heartbeat_interval=1, grace_period=60, heartbeat_stale_trial_callback=retry)
    study = optuna.create_study(storage=database)
    dead, living = study.ask(), study.ask()
    dead.suggest_float("exponent", 0.5, 2.0)
    sign(study, living, "another host")
    assert fail_dead_trials(study, None, grace_s=60) == 0  # it may have begun a moment ago
    assert fail_dead_trials(study, None, grace_s=0) == 1
    states = [t.state for t in study.get_trials()]
    assert states == [optuna.trial.TrialState.FAIL, optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING]
    again = study.ask()
    assert study.get_trials()[again.number].system_attrs["failed_trial"] == dead.number
    assert again.suggest_float("exponent", 0.5, 2.0) == dead.params["exponent"]
    assert fail_dead_trials(study, None, grace_s=0) == 1  # the second one's worker is dead too
    assert study.get_trials()[living.number].state == optuna.trial.TrialState.RUNNING
    # A signature has a heartbeat before it: the storage itself notices when its worker dies.
    database.grace_period = -1
    fail_dead_trials(study, None, grace_s=60)
    assert study.get_trials()[living.number].state == optuna.trial.TrialState.FAIL


def test_a_worker_lives_while_it_shows_signs_and_its_process_runs(tmp_path: Path) -> None:
    identity = worker_identity(0)
    assert not is_alive(tmp_path, identity)
    with SignOfLife(tmp_path, identity, interval=0.05) as sign:
        first = sign.path.stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while sign.path.stat().st_mtime_ns == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sign.path.stat().st_mtime_ns > first
        assert is_alive(tmp_path, identity)
    assert not is_alive(tmp_path, identity)

    foreign = tmp_path / "other-1-0.json"  # on another host only the time of the last sign counts
    foreign.write_text(json.dumps({"host": "other", "pid": 1}))
    assert is_alive(tmp_path, "other-1-0", grace_s=60)
    os.utime(foreign, (0, 0))
    assert not is_alive(tmp_path, "other-1-0", grace_s=60)

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = tmp_path / "here.json"
    here.write_text(json.dumps({"host": json.loads(_sign(tmp_path))["host"], "pid": ended.pid}))
    assert not is_alive(tmp_path, "here")  # killed a moment ago: noticed at once, without waiting for the grace


def _sign(folder: Path) -> str:
    with SignOfLife(folder, "x") as sign:
        return sign.path.read_text()


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


def test_a_connection_that_the_server_closed_while_it_rested_is_replaced(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    monkeypatch.setattr(storage_module, "REST_S", 0.0)
    study = optuna.create_study(study_name="rested", storage=open_storage(postgres_url))
    try:
        with psycopg.connect(postgres_url, autocommit=True) as other:
            others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
            closed = other.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}").fetchall()
        assert closed
        study.set_user_attr("a", 1)
        assert study.user_attrs == {"a": 1}
    finally:
        optuna.delete_study(study_name="rested", storage=open_storage(postgres_url))
