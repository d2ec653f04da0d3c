"""Command lines in processes forked from one that has imported the heavy libraries: as separate as new ones, without
seconds of imports each. All workers of a test run share that one process, `serve`, which ends with them.

For the same reason what `export --verify` has a new process read is read in the same one; the tests of all consumers
(tests/conformance) have it read in a new one."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

PRELOADED = (
    "torch", "diffusers.models.unets.unet_2d", "diffusers.models.transformers", "pandas", "matplotlib.figure",
    "optuna", "pulp", "scipy.linalg",
    "mpqsearch.cli.app", "mpqsearch.stages", "mpqsearch.search.study", "mpqsearch.report", "mpqsearch.export",
    "mpqsearch.distill", "tests.e2e.warm",
)  # fmt: skip
"""What any verb may import. That verbs import no more than they need is tested elsewhere, in new processes."""

NUMBER = 12
"""Bytes of a number in an answer of the server: the process, and in the end its exit code."""


class Forked:
    """A process that was forked for a request on ``connection``."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(connection.recv(NUMBER))
        self.exitcode: int | None = None

    def join(self, seconds: float | None = None) -> None:
        """Wait for its end, at most so long."""
        if self.exitcode is None:
            self._connection.settimeout(seconds)
            try:
                self.exitcode = int(self._connection.recv(NUMBER))
            except TimeoutError:
                return
            self._connection.close()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        self.join(1e-6)
        return self.exitcode is None


def start(arguments: list[str], folder: Path, out: Path, err: Path, *, script: str = "", **more: str) -> Forked:
    """``mpqsearch <arguments>`` in ``folder``, or a ``script`` loaded and not run, with ``more`` in its environment;
    output goes to two files."""
    request = {
        "arguments": arguments,
        "folder": str(folder),
        "files": [str(out), str(err)],
        "environment": {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more},
        "path": sys.path,
        "script": script,
    }
    connection = _connected()
    connection.sendall(json.dumps(request).encode() + b"\n")
    return Forked(connection)


def stop(process: Forked, number: int) -> int | None:
    """The exit code of a process after a signal, minus the signal when it was killed by it."""
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def run(
    arguments: list[str], folder: Path, out: Path, err: Path, *, timeout: float = 300, script: str = ""
) -> subprocess.CompletedProcess[str]:
    """As `start`, to the end; output comes back as text."""
    process = start(arguments, folder, out, err, script=script)
    process.join(timeout)
    if process.exitcode is None:
        stop(process, signal.SIGKILL)
        raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
    return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _connected() -> socket.socket:
    """A connection to the server of this test run; the first worker that needs it starts it."""
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    base = Path(tempfile.gettempdir()) / f"mpqsearch-tests-{owner}"
    address, log = str(base.with_suffix(".socket")), base.with_suffix(".log")
    with base.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (connection := _connection(address)) is not None:
            return connection
        server = subprocess.Popen(
            [sys.executable, "-c", "from tests.e2e.forked import serve; serve()", address, str(owner)],
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that a Ctrl-C does not reach it
        )
        while (connection := _connection(address)) is None:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        return connection


def _connection(address: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    return connection


def preload() -> None:
    """Import what any verb may import; in a new environment that also writes its bytecode."""
    for name in PRELOADED:
        importlib.import_module(name)


def serve() -> None:
    """Import everything, then fork a process for each request, until the process that owns the test run has ended."""
    address, owner = Path(sys.argv[1]), int(sys.argv[2])
    preload()
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        listener.settimeout(1)
        while _exists(owner):
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
    for suffix in (".socket", ".log", ".lock"):
        address.with_suffix(suffix).unlink(missing_ok=True)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _answer(connection: socket.socket) -> None:
    """In a process of its own: fork what was asked for, tell its number, and in the end its exit code."""
    connection.settimeout(None)
    request = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        os._exit(_exit_code(request))
    try:
        connection.sendall(b"%12d" % pid)
        connection.sendall(b"%12d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        os._exit(0)


def _exit_code(request: dict[str, Any]) -> int:
    """Do what was asked for; what a new process would end with."""
    try:
        _main(**request)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - told as Python tells it
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _main(
    arguments: list[str], folder: str, files: list[str], environment: dict[str, str], path: list[str], script: str
) -> None:
    os.chdir(folder)
    os.environ.clear()  # that of the server is of its start
    os.environ.update(environment)
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background ignores
    for name, number in zip(files, (1, 2), strict=True):
        with Path(name).open("wb") as handle:
            os.dup2(handle.fileno(), number)
    from mpqsearch.export import __main__ as check
    from mpqsearch.export import target

    target.fresh_process = lambda exports: [check.report(name, path) for name, path in exports]
    if script:
        sys.path.insert(0, str(Path(script).parent))
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="loaded")
        return
    sys.argv = ["mpqsearch", *arguments]
    from mpqsearch.cli.app import main

    main()
