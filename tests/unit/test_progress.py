from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from mpqsearch import progress


@pytest.fixture
def own_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "_interrupted", [])
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
def test_a_handler_that_is_there_stays() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    progress.keep_interrupts()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGINT)
    with progress.bar_of("work", 1) as bar:
        bar.update()
