"""Local workers: the same command, started several times on the same storage."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PARENT_VARIABLE = "MPQSEARCH_PARENT"
"""Environment variable of a local worker: the process that started it and without which it ends."""

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
    shared = {**dict.fromkeys(THREADS, threads), **os.environ, PARENT_VARIABLE: str(os.getpid()), **environment}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i, command in enumerate(commands):
            with (logs / f"worker-{i}.log").open("ab") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=shared))  # noqa: S603
        while any(p.poll() is None for p in processes):
            time.sleep(poll_s)
            progress()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return [p.returncode for p in processes]


def is_orphan() -> bool:
    """Whether this process is a local worker whose parent is gone."""
    parent = os.environ.get(PARENT_VARIABLE)
    return parent is not None and os.name != "nt" and os.getppid() != int(parent)


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
