"""Local workers: the same command, started several times on the same storage."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PARENT_VARIABLE = "MPQSEARCH_PARENT"
"""Environment variable of a local worker, which ends when its standard input does."""

GRACE_S = 10
"""Seconds that a process has to end by itself."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_workers(
    commands: Sequence[Sequence[str]],
    *,
    logs: Path,
    environment: Mapping[str, str],
    progress: Callable[[], None],
    poll_s: float = 1.0,
) -> list[int]:
    """Run a process for every command and wait for all of them; returns their exit codes.

    The output of number i goes to ``logs/worker-<i>.log``. The processors are shared out: more threads than processors
    are many times slower. ``progress`` is called about every ``poll_s`` seconds. Whatever ends this function ends the
    processes.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // len(commands)))
    shared = {**dict.fromkeys(THREADS, threads), **os.environ, PARENT_VARIABLE: "1", **environment}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i, command in enumerate(commands):
            with (logs / f"worker-{i}.log").open("ab") as log:
                process = subprocess.Popen(  # noqa: S603
                    command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=shared
                )
            processes.append(process)
        while any(p.poll() is None for p in processes):
            time.sleep(poll_s)
            progress()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
    return [p.returncode for p in processes]


def end_with_parent() -> None:
    """In a local worker: from now on end, as after a Ctrl-C, when the process that started it ends, however it ends.

    The parent holds the other end of standard input, which the system closes with it.
    """
    if os.environ.pop(PARENT_VARIABLE, None) is None:
        return

    main = threading.main_thread().ident or 0

    def watch() -> None:
        sys.stdin.buffer.read()
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, signal.SIGTERM)
        else:
            _thread.interrupt_main(signal.SIGTERM)
        time.sleep(GRACE_S)  # in the middle of something that lets no signal through
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="mpqsearch-parent", daemon=True).start()


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
