"""Command lines in processes forked from one that has imported the heavy libraries: as separate as new ones, without
seconds of imports each."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

PRELOADED = (
    "torch", "diffusers.models.unets.unet_2d", "diffusers.models.transformers", "pandas", "matplotlib.figure",
    "optuna", "pulp", "scipy.linalg",
    "mpqsearch.cli.app", "mpqsearch.stages", "mpqsearch.search.study", "mpqsearch.report", "mpqsearch.export",
    "mpqsearch.distill", "tests.e2e.warm",
)  # fmt: skip
"""What any verb may import. That verbs import no more than they need is tested elsewhere, in new processes."""


def run(
    arguments: list[str], folder: Path, out: Path, err: Path, *, timeout: float = 300, script: str = ""
) -> subprocess.CompletedProcess[str]:
    """``mpqsearch <arguments>`` in ``folder``, or a ``script`` loaded and not run; output goes to two files and comes
    back as text."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    process = context.Process(target=_main, args=(arguments, folder, out, err, dict(os.environ), script))
    process.start()
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
    for path, number in ((out, 1), (err, 2)):
        with path.open("wb") as handle:
            os.dup2(handle.fileno(), number)
    if script:
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="loaded")
        return
    sys.argv = ["mpqsearch", *arguments]
    from mpqsearch.cli.app import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
