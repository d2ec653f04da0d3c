"""Roads that this machine does not take: a system without `fcntl` and `resource`, such as Windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(("fcntl", "resource", "termios", "pwd", "grp")))  # what Windows lacks
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "200", "HOME": "/nowhere", "OMP_NUM_THREADS": "1"},
    )


def test_every_module_is_imported_without_fcntl() -> None:
    done = run(
        "import importlib, pkgutil, mpqsearch\n"
        "names = [m.name for m in pkgutil.walk_packages(mpqsearch.__path__, 'mpqsearch.')]\n"
        "for name in names:\n"
        "    if not name.endswith('__main__'):\n"
        "        importlib.import_module(name)\n"
        "assert sys.modules['fcntl'] is None\n"
        "print(len(names))"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100


@pytest.mark.parametrize("verb", ["layers", "profile", "search", "distill", "export", "run", "inspect"])
def test_verbs_are_parsed_without_fcntl(verb: str) -> None:
    done = run("from mpqsearch.cli import main; main()", verb, "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"mpqsearch {verb}" in done.stdout


def test_folders_are_not_opened_on_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mpqsearch.distill import checkpoint

    def refuse(*_arguments: object) -> int:
        raise PermissionError("Windows opens no folders")

    monkeypatch.setattr(checkpoint.os, "open", refuse)
    monkeypatch.setattr(checkpoint.os, "name", "nt")
    checkpoint._flush(tmp_path)
