"""Progress bars on stderr for long work, silent where stderr is no terminal; and Ctrl-C, which they do not let get
lost."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_interrupted: list[int] = []


def keep_interrupts() -> None:
    """From now on, the next step of any bar raises `KeyboardInterrupt` again after a Ctrl-C.

    The exception surfaces wherever the main thread is just then, which may be inside a library that swallows every
    exception, such as one that tries an optional import: the work would go on as if nothing had been asked. Does
    nothing where Ctrl-C has another meaning already.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _interrupted.append(number)
    raise KeyboardInterrupt


@functools.cache
def _bar_class() -> type[Any]:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            if _interrupted:
                raise KeyboardInterrupt
            return super().update(n)

    return Bar


def bar_of(label: str, total: int, unit: str = "sample") -> Any:
    """A bar over ``total`` units, with rate and time left."""
    return _bar_class()(
        total=total,
        desc=label,
        unit=unit,
        leave=False,
        disable=None,
        file=sys.stderr,
        dynamic_ncols=True,
        unit_scale=unit == "B",
    )


@contextmanager
def bars_of(*, enabled: bool = True, unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A function of (label, finished units, their total) that draws one bar for each label, one after the other.

    Units of ``"B"`` are shown as kB, MB and so on.
    """
    current: dict[str, Any] = {}

    def progress(label: str, done: int, total: int) -> None:
        if not enabled:
            return
        if label not in current:
            for bar in current.values():
                bar.close()
            current.clear()
            current[label] = bar_of(label, total, unit=unit)
        current[label].update(done - current[label].n if not current[label].disable else 0)

    try:
        yield progress
    finally:
        for bar in current.values():
            bar.close()
