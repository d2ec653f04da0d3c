"""Processes that work on one study: signs of life, trials of the dead given to the living, and N local workers.

All of it is kept in the study itself, in user attributes of its trials, so that it is the same with every storage and
asks for no shared disk. Optuna's own heartbeat exists for databases only, takes statements and a thread a trial, and
never notices a worker that died before its first beat; it is left off, and does no harm in a storage object of the
user's that has it on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mpqsearch.errors import SolverError
from mpqsearch.search.storage import redact

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger("mpqsearch")

WORKER = "worker"
"""User attribute of a trial: the identity of the worker that runs it."""

BEAT = "beat"
"""User attribute of a trial that runs for long: how many signs of life its worker has given."""

HEARTBEAT_S = 10.0
"""Seconds between two signs of life of a worker."""

GRACE_S = 60.0
"""Seconds without a sign of life after which a worker is taken for dead."""

RETRIES = 3
"""Times that a trial whose worker died is given to another one."""

RESTARTS = 3
"""Times that a local worker that died is started again."""

_working: set[str] = set()
"""Identities that are at work in this process."""


@functools.cache
def machine() -> str:
    """Host name, and a token of what process numbers are counted in: this start of the machine and this container."""
    try:
        counted_in = Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:  # not Linux
        counted_in = str(uuid.getnode())
    return f"{socket.gethostname()}-{hashlib.sha256(counted_in.encode()).hexdigest()[:6]}"


@dataclass
class Worker:
    """Context manager: a worker at work on a study. Its trial beats every ``heartbeat_s`` seconds, from a thread.

    A process may work on a study again after an error, so that an identity ends in a token of its own.
    """

    study: Study
    index: int = 0
    heartbeat_s: float = HEARTBEAT_S
    identity: str = ""
    _trial: int | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.identity = f"{machine()}-{os.getpid()}-{self.index}-{uuid.uuid4().hex[:6]}"

    def begins(self, trial: Trial) -> None:
        """Write whose trial this is."""
        trial.set_user_attr(WORKER, self.identity)
        self._trial = trial._trial_id

    def ends(self) -> None:
        """The trial has ended: no beats any more."""
        self._trial = None

    def __enter__(self) -> Worker:
        _working.add(self.identity)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _working.discard(self.identity)
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def _beat(self) -> None:
        beats, last = 0, None
        while not self._stop.wait(self.heartbeat_s):
            trial = self._trial
            if trial is None or trial != last:  # a trial is silent for its first interval: most end before
                last = trial
                continue
            beats += 1
            # It may have ended this moment; and where the storage cannot be reached the trial itself says so.
            with contextlib.suppress(Exception):
                self.study._storage.set_trial_user_attr(trial, BEAT, beats)


@dataclass
class Lookout:
    """Finds running trials whose workers are dead.

    A worker of this machine is dead when its process is gone, which is noticed at once. Any other one is when its trial
    did not beat for ``grace_s`` seconds on the clock of whoever looks, so that clocks need not agree. A trial that
    nobody has signed is given as long from its start.
    """

    grace_s: float = GRACE_S
    _seen: dict[int, tuple[object, float]] = field(default_factory=dict)

    def fail_dead_trials(self, study: Study, trials: Sequence[FrozenTrial] | None = None) -> int:
        """Fail the trials of dead workers and queue them again with the same parameters; returns how many.

        ``trials`` is a look at the study that is at hand. Of several processes that notice the same dead trial, the
        storage lets one fail it, and only that one queues it again.
        """
        from optuna.trial import TrialState

        failed = 0
        for trial in study.get_trials(deepcopy=False) if trials is None else trials:
            if trial.state == TrialState.RUNNING and self.is_dead(trial) and _fail(study, trial):
                failed += 1
                log.warning(
                    "trial %d: its worker %s is dead; it is tried again",
                    trial.number,
                    trial.user_attrs.get(WORKER, "(unknown)"),
                )
        return failed

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial is dead, as far as one can tell from here."""
        owner = trial.user_attrs.get(WORKER)
        if owner is None:  # its worker has only just begun, or died before it could sign
            return trial.datetime_start is not None and time.time() - trial.datetime_start.timestamp() > self.grace_s
        where, *numbers = str(owner).rsplit("-", 3)
        if where == machine():
            pid = int(numbers[0])
            if pid == os.getpid():
                return owner not in _working
            if not _is_running(pid):
                return True
        beat, now = trial.user_attrs.get(BEAT), time.monotonic()
        before, since = self._seen.get(trial._trial_id, (None, now))
        if trial._trial_id not in self._seen or beat != before:
            self._seen[trial._trial_id] = (beat, now)
            return False
        return now - since > self.grace_s


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _fail(study: Study, trial: FrozenTrial) -> bool:
    """Fail a trial and queue it again, without the signature of the dead; False when it has ended meanwhile."""
    import copy
    import warnings

    import optuna

    try:
        if not study._storage.set_trial_state_values(trial._trial_id, state=optuna.trial.TrialState.FAIL):
            return False
    except optuna.exceptions.UpdateFinishedTrialError:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        again = copy.copy(trial)
        again.user_attrs = {k: v for k, v in trial.user_attrs.items() if k not in (WORKER, BEAT)}
        optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, again)
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
    """Run ``count`` local processes until the study is finished; one that dies is started again, up to `RESTARTS`
    times.

    ``command(i)`` is the command line of worker ``i``; its output goes to ``logs/worker-<i>.log``. Every worker
    computes with one thread: two threads a process on busy cores are many times slower than one. ``tick`` is called
    about every ``poll_s`` seconds.

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
                list(command(index)),
                stdout=handle,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, **environment},
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
