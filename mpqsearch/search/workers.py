"""Processes that work on one study: signs of life, trials of the dead given to the living, and N local workers."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import threading
import time
import typing
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.errors import SolverError
from mpqsearch.search.storage import GRACE_S, HEARTBEAT_S, has_heartbeat, redact

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger("mpqsearch")

WORKER = "worker"
"""User attribute of a trial: the identity of the worker that runs it."""

RETRIES = 3
"""Times that a trial whose worker died is given to another one."""

RESTARTS = 3
"""Times that a local worker that died is started again."""


def worker_identity(index: int) -> str:
    """Host, process and number of this worker, and a token of the session: one process may work on a study again after an error."""
    return f"{socket.gethostname()}-{os.getpid()}-{index}-{uuid.uuid4().hex[:6]}"


@dataclass
class SignOfLife:
    """Context manager: while it is open, a file of this worker is touched every ``interval`` seconds by a thread."""

    folder: Path
    identity: str
    interval: float = HEARTBEAT_S
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        """The file whose time of change says that the worker lives."""
        return self.folder / f"{self.identity}.json"

    def __enter__(self) -> SignOfLife:
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()})
        artifacts.write_text(self.path, text + "\n")
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.interval):
            if self.path.exists():
                os.utime(self.path)


def is_alive(folder: Path, identity: str, grace_s: float = GRACE_S) -> bool:
    """Whether a worker has shown a sign of life; on this host its process is looked up too, so that a killed one is noticed at once."""
    path = folder / f"{identity}.json"
    try:
        age = time.time() - path.stat().st_mtime
        known: Mapping[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    if known.get("host") == socket.gethostname():
        try:
            os.kill(int(known["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return age <= grace_s


def fail_dead_trials(study: Study, folder: Path | None, grace_s: float = GRACE_S) -> int:
    """Fail running trials of dead workers and queue them again with the same parameters; returns how many.

    Databases do this themselves, by their heartbeat, except for a trial whose worker died before its first one: that has no signature
    (see `sign`) and is failed here when it is older than ``grace_s``. For a journal the worker files in ``folder`` say who lives. Of several
    processes that notice the same dead trial, the storage lets one fail it, and only that one queues it again.
    """
    import warnings

    import optuna

    watched = has_heartbeat(study._storage)
    if watched:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
    elif folder is None:
        return 0
    failed = 0
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        owner = trial.user_attrs.get(WORKER)
        if owner is None:  # its worker has only just begun, or died before it could sign
            started = trial.datetime_start
            if started is None or time.time() - started.timestamp() <= grace_s:
                continue
        elif watched or folder is None or is_alive(folder, str(owner), grace_s):
            continue
        if _fail(study, trial):
            failed += 1
            log.warning("trial %d: its worker %s is dead; it is tried again", trial.number, owner or "(unknown)")
    return failed


def sign(study: Study, trial: Trial, identity: str) -> None:
    """Write whose trial this is, after its first heartbeat where the storage has them: Optuna makes that in a thread, which may come too late,
    and never takes a trial without one for dead."""
    if has_heartbeat(study._storage):
        typing.cast("RDBStorage", study._storage).record_heartbeat(trial._trial_id)
    trial.set_user_attr(WORKER, identity)


def _fail(study: Study, trial: FrozenTrial) -> bool:
    import warnings

    import optuna

    try:
        if not study._storage.set_trial_state_values(trial._trial_id, state=optuna.trial.TrialState.FAIL):
            return False
    except optuna.exceptions.UpdateFinishedTrialError:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, trial)
    return True


def run_local_workers(
    command: Callable[[int], Sequence[str]],
    count: int,
    *,
    environment: Mapping[str, str],
    finished: Callable[[], bool],
    tick: Callable[[], None],
    logs: Path,
    poll_s: float = 1.0,
) -> None:
    """Run ``count`` local processes until the study is finished; one that dies is started again, up to `RESTARTS` times.

    ``command(i)`` is the command line of worker ``i``; its output goes to ``logs/worker-<i>.log``. Every worker computes with one
    thread: two threads a process on busy cores are many times slower than one. ``tick`` is called about every ``poll_s`` seconds.

    Raises:
        SolverError: A worker died more often than it is started again; the end of its log is quoted.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    running: dict[int, subprocess.Popen[bytes]] = {}
    deaths = dict.fromkeys(range(count), 0)

    def start(index: int) -> None:
        with (logs / f"worker-{index}.log").open("ab") as handle:
            running[index] = subprocess.Popen(  # noqa: S603 - our own command line
                list(command(index)), stdout=handle, stderr=subprocess.STDOUT, env={**os.environ, **threads, **environment}
            )

    try:
        for index in range(count):
            start(index)
        while running:
            time.sleep(poll_s)
            tick()
            for index, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[index]
                if code == 0 or finished():
                    continue
                deaths[index] += 1
                if deaths[index] > RESTARTS:
                    raise SolverError(
                        f"worker {index} died {deaths[index]} times (exit code {code}). The end of its log:\n"
                        + redact(_tail(logs / f"worker-{index}.log"))
                    )
                log.warning("worker %d died (exit code %d); it is started again", index, code)
                start(index)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tail(path: Path, lines: int = 12) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
