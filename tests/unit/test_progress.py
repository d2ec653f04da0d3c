from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from mpqsearch import progress


@pytest.fixture
def own_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "_interrupted", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("own_handler")
def test_an_interrupt_that_something_swallows_is_raised_by_the_next_step_of_a_bar() -> None:
    progress.keep_interrupts()
    with progress.bar_of("work", 3) as bar, progress.bars_of() as steps:
        bar.update()
        steps("more", 1, 3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            bar.update()
        with pytest.raises(KeyboardInterrupt):
            bar.update()
        with pytest.raises(KeyboardInterrupt):
            steps("more", 2, 3)


@pytest.mark.usefixtures("own_handler")
def test_an_interrupt_in_a_finalizer_leaves_no_trace_and_is_raised_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    class Wrong:
        def __del__(self) -> None:
            raise ValueError

    said = list[type]()
    monkeypatch.setattr(sys, "unraisablehook", lambda swallowed: said.append(swallowed.exc_type))
    progress.keep_interrupts()
    Interrupted()
    with pytest.raises(KeyboardInterrupt):
        progress.check_interrupt()
    Wrong()
    assert said == [ValueError]


@pytest.mark.usefixtures("own_handler")
def test_a_handler_that_is_there_stays() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    progress.keep_interrupts()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGINT)
    with progress.bar_of("work", 1) as bar:
        bar.update()


def test_without_a_terminal_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.1)
    with progress.bar_of("export", 0):
        with progress.bars_of() as steps:
            steps("calibrate", 3, 4)
            time.sleep(0.4)  # one long step reports nothing, and is reported
        time.sleep(0.4)
    time.sleep(0.2)
    lines = capfd.readouterr().err.splitlines()
    assert 2 <= sum(line.startswith("calibrate: 3 of 4 steps, 0 s so far, about 0 s left") for line in lines) <= 5
    assert 2 <= sum(line.startswith("export: ") for line in lines) <= 5
    assert not progress.LINES._bars


def test_nothing_is_printed_for_work_that_wants_none(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    with progress.bar_of("work", 3, enabled=False) as bar:
        bar.update()
        time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    with progress.bar_of("work", 4) as bar:
        bar.update(2)
        bar.set_postfix_str("loss 0.1")
    shown = capfd.readouterr().err
    assert "work:" in shown
    assert "2/4" in shown
    assert "loss 0.1" in shown
