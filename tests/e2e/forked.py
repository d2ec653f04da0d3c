"""Command lines in processes forked from one that has imported the heavy libraries: as separate as new ones, without
seconds of imports each.

For the same reason what `export --verify` has a new process read is read in the same one; the tests of all consumers
(tests/conformance) have it read in a new one."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = (
    "torch", "diffusers.models.unets.unet_2d", "diffusers.models.transformers", "pandas", "matplotlib.figure",
    "optuna", "pulp", "scipy.linalg",
    "mpqsearch.cli.app", "mpqsearch.stages", "mpqsearch.search.study", "mpqsearch.report", "mpqsearch.export",
    "mpqsearch.distill", "tests.e2e.warm",
)  # fmt: skip
"""What any verb may import. That verbs import no more than they need is tested elsewhere, in new processes."""


def start(arguments: list[str], folder: Path, out: Path, err: Path, *, script: str = "", **more: str) -> BaseProcess:
    """``mpqsearch <arguments>`` in ``folder``, or a ``script`` loaded and not run, with ``more`` in its environment;
    output goes to two files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    process = context.Process(target=_main, args=(arguments, folder, out, err, {**os.environ, **more}, script))
    process.start()
    return process


def stop(process: BaseProcess, number: int) -> int | None:
    """The exit code of a process after a signal, minus the signal when it was killed by it."""
    os.kill(process.pid or 0, number)
    process.join(120)
    return process.exitcode


def run(
    arguments: list[str], folder: Path, out: Path, err: Path, *, timeout: float = 300, script: str = ""
) -> subprocess.CompletedProcess[str]:
    """As `start`, to the end; output comes back as text."""
    process = start(arguments, folder, out, err, script=script)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
    return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _main(arguments: list[str], folder: Path, out: Path, err: Path, environment: dict[str, str], script: str) -> None:
    os.chdir(folder)
    os.environ.clear()  # that of the server is of its start
    os.environ.update(environment, COLUMNS="200")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background ignores
    for path, number in ((out, 1), (err, 2)):
        with path.open("wb") as handle:
            os.dup2(handle.fileno(), number)
    from mpqsearch.export import check, target

    target.fresh_process = lambda exports: [check.report(name, path) for name, path in exports]
    if script:
        sys.path.insert(0, str(Path(script).parent))
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="loaded")
        return
    sys.argv = ["mpqsearch", *arguments]
    from mpqsearch.cli.app import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
