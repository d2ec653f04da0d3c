"""Progress of long work on stderr: a bar in a terminal or a notebook, elsewhere a line at least every half minute. And
Ctrl-C, which no step lets get lost."""

from __future__ import annotations

import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

Progress = Callable[[str, int, int], None]
"""Called with a label, the number of finished units and their total."""

EVERY_S = 30.0
"""Seconds between two lines where there is no terminal."""

_interrupted: list[int] = []


def silent(_label: str, _done: int, _total: int) -> None:
    """Progress of callers that want none."""


def keep_interrupts() -> None:
    """From now on SIGTERM ends the work as a Ctrl-C does, and the next step of any bar raises `KeyboardInterrupt` again
    after either.

    The exception surfaces wherever the main thread is just then, which may be inside a library that swallows every
    exception, such as one that tries an optional import: the work would go on as if nothing had been asked. In a
    finalizer Python swallows it and prints its trace, which is left out. Does nothing where Ctrl-C has another meaning
    already.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)
    if getattr(sys.unraisablehook, "func", None) is not _finalizer:
        sys.unraisablehook = functools.partial(_finalizer, sys.unraisablehook)


def _finalizer(before: Callable[[Any], Any], swallowed: Any) -> None:
    """What is said of an exception that nothing can catch: nothing of an interrupt."""
    if not issubclass(swallowed.exc_type, KeyboardInterrupt):
        before(swallowed)


def check_interrupt() -> None:
    """Raise `KeyboardInterrupt` after a signal that something swallowed."""
    if _interrupted:
        raise KeyboardInterrupt


def interrupt_code() -> int:
    """What a process ends with that was interrupted: 128 and the number of the last signal, 130 after Ctrl-C."""
    return 128 + (_interrupted[-1] if _interrupted else signal.SIGINT)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _interrupted.append(number)
    raise KeyboardInterrupt


class Bar:
    """Finished units of one piece of work. It has the few methods of a bar of tqdm that we use, and draws one where
    someone looks; elsewhere `Lines` reports it."""

    def __init__(self, label: str, total: int, unit: str = "sample", *, enabled: bool = True) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.n, self.note = 0, ""
        self._began = time.monotonic()
        self._drawn = _drawn(self) if enabled and is_watched() else None
        self._listed = enabled and self._drawn is None
        if self._listed:
            LINES.add(self)

    def update(self, n: int = 1) -> None:
        """``n`` more units are finished. Raises `KeyboardInterrupt` after a Ctrl-C that something swallowed."""
        check_interrupt()
        self.n += n
        if self._drawn is not None:
            self._drawn.update(n)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What stands behind the numbers."""
        self.note = text
        if self._drawn is not None:
            self._drawn.set_postfix_str(text, refresh=refresh)

    def close(self) -> None:
        """The work is done, or given up."""
        if self._drawn is not None:
            self._drawn.close()
        if self._listed:
            LINES.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    def line(self) -> str:
        """Label, share, time so far and time left."""
        spent = time.monotonic() - self._began
        if not self.total:
            return f"{self.label}: {_minutes(spent)} so far"
        left = f", about {_minutes(spent / self.n * (self.total - self.n))} left" if 0 < self.n < self.total else ""
        done = f"{self.n} of {self.total} {self.unit}s" if self.unit != "B" else f"{self.n / self.total:.0%}"
        return f"{self.label}: {done}, {_minutes(spent)} so far{left}{', ' + self.note if self.note else ''}"


class Lines:
    """Prints a line of the innermost work whenever nothing was printed for `EVERY_S` seconds."""

    def __init__(self) -> None:
        self._bars: list[Bar] = []
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def add(self, bar: Bar) -> None:
        """Watch one more piece of work."""
        with self._lock:
            if not self._bars:
                self._last = time.monotonic()
            self._bars.append(bar)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="mpqsearch-progress", daemon=True)
                self._thread.start()
            self._wake.set()

    def remove(self, bar: Bar) -> None:
        """Stop watching it."""
        with self._lock:
            if bar in self._bars:
                self._bars.remove(bar)

    def said(self) -> None:
        """Something else was printed just now."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while True:
            self._wake.wait(min(1.0, EVERY_S / 4))
            self._wake.clear()
            with self._lock:
                if not self._bars:
                    self._thread = None
                    return
                due = time.monotonic() - self._last >= EVERY_S
                text = self._bars[-1].line()
            if due:
                print(text, file=sys.stderr, flush=True)  # noqa: T201
                self.said()


LINES = Lines()


def bar_of(label: str, total: int, unit: str = "sample", *, enabled: bool = True) -> Bar:
    """A bar over ``total`` units (0: not known), with rate and time left."""
    return Bar(label, total, unit, enabled=enabled)


@contextmanager
def bars_of(*, enabled: bool = True, unit: str = "step") -> Iterator[Progress]:
    """A function of (label, finished units, their total) that shows one bar for each label, one after the other.

    Units of ``"B"`` are shown as kB, MB and so on.
    """
    current: list[Bar] = []

    def progress(label: str, done: int, total: int) -> None:
        if not enabled:
            return
        if not current or current[0].label != label:
            for bar in current:
                bar.close()
            current[:] = [bar_of(label, total, unit=unit)]
        current[0].update(done - current[0].n)

    try:
        yield progress
    finally:
        for bar in current:
            bar.close()


def say(text: str) -> None:
    """A line for people on stderr, beside bars."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    LINES.said()


def is_watched() -> bool:
    """True in a terminal and in a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


def _drawn(bar: Bar) -> Any:
    from tqdm import auto, std

    drawn: Any = auto.tqdm if _in_notebook() else std.tqdm
    look: dict[str, Any] = {
        "leave": False,
        "disable": False,
        "file": sys.stderr,
        "dynamic_ncols": True,
        "unit_scale": bar.unit == "B",
    }
    return drawn(total=bar.total or None, desc=bar.label, unit=bar.unit, **look)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
