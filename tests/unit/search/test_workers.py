"""Four processes on one study, one of them killed; and the local workers of a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import WORKER, finished_trials
from mpqsearch.search.workers import PARENT_VARIABLE, end_with_parent, run_workers
from tests.e2e import forked
from tests.support.everything import ALL
from tests.unit.search.a_worker import STUDY

ROOT = Path(__file__).parents[3]
TRIALS = {"journal": 200, "postgresql": 200 if ALL else 80}  # a transaction of the server takes ten times as long


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "journal":
        yield str(tmp_path / "study.journal")
        return
    url = request.getfixturevalue("postgres")
    yield url
    optuna.delete_study(study_name=STUDY, storage=open_storage(url))


def start(storage: str, folder: Path, index: int, trials: int, pause_s: float, heartbeat_s: int = 30) -> forked.Forked:
    script = folder / "script.py"
    script.write_text("from tests.unit.search.a_worker import main\n\nmain()\n")
    arguments = [str(a) for a in (storage, folder, index, trials, pause_s, heartbeat_s)]
    log = folder / f"worker-{index}.log"
    return forked.start(arguments, folder, folder / f"worker-{index}.out", log, script=str(script))


def wait(processes: list[forked.Forked], folder: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(1.0, end - time.monotonic()))
    logs = "\n".join(p.read_text()[-2000:] for p in sorted(folder.glob("worker-*.log")))
    assert [p.exitcode for p in processes] == [0] * len(processes), logs


def ended(folder: Path, index: int) -> list[int]:
    log = folder / f"ended-{index}.txt"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.mark.slow
def test_four_workers_one_of_them_killed_lose_no_trial_and_count_none_twice(storage: str, tmp_path: Path) -> None:
    trials = TRIALS["postgresql" if "://" in storage else "journal"]
    workers = [start(storage, tmp_path, i, trials, 0.002) for i in range(4)]
    victim, end = workers[1], time.monotonic() + 120
    while len(ended(tmp_path, 1)) < 3:
        assert time.monotonic() < end, "the victim never finished its trials"
        time.sleep(0.02)
    forked.stop(victim, signal.SIGKILL)
    wait([w for w in workers if w is not victim], tmp_path)

    study = optuna.load_study(study_name=STUDY, storage=open_storage(storage))
    finished = finished_trials(study)
    assert trials <= len(finished) <= trials + 3  # each worker ends the trial that it is at
    assert len({t.user_attrs[WORKER] for t in finished}) > 1
    # What the workers saw end is finished in the storage, once; the victim may have died before it could say so.
    seen = sorted(n for i in range(4) for n in ended(tmp_path, i))
    assert len(seen) == len(set(seen))
    assert set(seen) <= {t.number for t in finished}
    assert len(finished) - len(seen) <= 1
    assert len({tuple(t.params.items()) for t in finished}) == len(finished)
    # What the victim left counts for nothing.
    left = [t for t in study.get_trials() if t not in finished]
    assert all(t.user_attrs.get(WORKER, 1) == 1 or t.state == TrialState.WAITING for t in left)
    assert len([t for t in left if t.state in (TrialState.RUNNING, TrialState.FAIL)]) <= 1


@pytest.mark.slow
def test_in_a_database_a_trial_of_a_dead_worker_is_tried_again(postgres: str, tmp_path: Path) -> None:
    """A heartbeat every second, four seconds of grace; the others work for longer than that."""
    workers = [start(postgres, tmp_path, i, 60, 0.05, heartbeat_s=1) for i in range(2)]
    study, end = None, time.monotonic() + 60
    while study is None or not any(t.user_attrs.get(WORKER) == 1 and t.params for t in study.get_trials()):
        assert time.monotonic() < end
        time.sleep(0.2)
        if STUDY in optuna.get_all_study_names(open_storage(postgres)):
            study = optuna.load_study(study_name=STUDY, storage=open_storage(postgres))
    try:
        while not (running := [t for t in study.get_trials() if t.user_attrs.get(WORKER) == 1 and t.params][-1:]) or (
            running[0].state != TrialState.RUNNING
        ):
            time.sleep(0.01)
        forked.stop(workers[1], signal.SIGKILL)
        wait([workers[0]], tmp_path)
        trials = study.get_trials()
        lost = [t for t in trials if t.state == TrialState.FAIL]
        retries = [t for t in trials if t.system_attrs.get("failed_trial") in {t.number for t in lost}]
        assert len(lost) == len(retries) == 1
        assert retries[0].params.items() >= lost[0].params.items()
        assert retries[0].state == TrialState.COMPLETE
        assert len(finished_trials(study)) == 60
    finally:
        optuna.delete_study(study_name=STUDY, storage=open_storage(postgres))


def test_local_workers_are_waited_for_and_their_logs_kept(tmp_path: Path) -> None:
    shown: list[int] = []
    scripts = ("print('one')", "import sys; sys.exit('two')")
    codes = run_workers(
        [[sys.executable, "-c", s] for s in scripts],
        logs=tmp_path,
        environment={},
        progress=lambda: shown.append(1),
        poll_s=0.02,
    )
    assert codes == [0, 1]
    assert [p.read_text().strip() for p in sorted(tmp_path.glob("*.log"))] == ["one", "two"]
    assert shown


def test_what_ends_the_parent_ends_its_workers(tmp_path: Path) -> None:
    script = "import os, pathlib, time; pathlib.Path(%r).write_text(str(os.getpid())); time.sleep(60)"
    script %= str(tmp_path / "pid")

    def interrupted() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_workers([[sys.executable, "-c", script]], logs=tmp_path, environment={}, progress=interrupted, poll_s=0.02)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


PARENT = """
import sys
from pathlib import Path
from mpqsearch.search.workers import run_workers
run_workers([[sys.executable, "-c", sys.argv[2]]], logs=Path(sys.argv[1]), environment={}, progress=lambda: None)
"""

WORKER_SCRIPT = """
import os, sys, time
from mpqsearch.progress import interrupt_code, keep_interrupts
from mpqsearch.search.workers import end_with_parent
keep_interrupts()
end_with_parent()
print("pid", os.getpid(), flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("ended", interrupt_code(), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows kills a tree of processes by other means")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM] if os.name != "nt" else [])
def test_a_local_worker_ends_with_its_parent(tmp_path: Path, number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), WORKER_SCRIPT], cwd=ROOT)
    log = tmp_path / "worker-0.log"
    wait_until(lambda: log.exists() and "pid" in log.read_text())
    parent.send_signal(number)
    parent.wait()
    wait_until(lambda: "ended 143" in log.read_text())
    pid = int(log.read_text().split()[1])
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_nobodys_worker_reads_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    before = threading.active_count()
    end_with_parent()
    assert threading.active_count() == before
