"""How the command line ends: exit codes, and one line that says why."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpqsearch import progress
from mpqsearch.errors import ConfigError, StaleArtifactError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "_interrupted", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("a\x1b[31mb"), 2, "mpqsearch: a\\x1b[31mb\n"),
        (StaleArtifactError("old"), 4, "mpqsearch: old\n"),
        (
            RuntimeError("postgresql://me:hunter22@host/db"),
            70,
            "a mistake of mpqsearch: RuntimeError: postgresql://me:***@host",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a.json"), 2, "mpqsearch: a.json: Permission denied."),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the output cannot be written: No space left"),
        (KeyboardInterrupt(), 130, "the same command continues"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_every_end_has_its_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fail(**_: object) -> None:
        raise error

    module = importlib.import_module("mpqsearch.cli.app")  # the package has the application under this name
    monkeypatch.setattr(module, "app", fail)
    monkeypatch.setattr(module.State, "verbose", 0)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == code
    text = capsys.readouterr().err
    assert said in text
    assert len(text.splitlines()) == (1 if said else 0)
    assert "hunter22" not in text


def test_an_error_that_a_library_makes_of_an_interrupt_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise UnboundLocalError("updated_state")  # as Optuna does

    module = importlib.import_module("mpqsearch.cli.app")
    monkeypatch.setattr(module, "app", fail)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 143


def started(*arguments: str, stdout: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mpqsearch", *arguments]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)  # type: ignore[call-overload, no-any-return]


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = started("--help", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_a_full_disk_behind_stdout_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        process = started("--version", stdout=full)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (2, "mpqsearch: the output cannot be written: No space left on device\n")
