"""Progress bars on stderr for long work; silent where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def bar_of(label: str, total: int, unit: str = "sample") -> Any:
    """A bar over ``total`` units, with rate and time left."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=label, unit=unit, leave=False, disable=None, file=sys.stderr, dynamic_ncols=True, unit_scale=unit == "B"
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
