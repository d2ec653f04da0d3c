"""Which implementation of the inner loops runs: compiled (numba, an optional dependency) or plain numpy.

Loading numba takes most of a second, and compiling the loops for the first time on a machine many, so ``auto`` leaves
problems to numpy until it has taken about as long as loading would, or compiling where they never were compiled:
whatever comes after, a process takes at most twice the time of the better choice. A single large problem counts as that
from the start. The solution is the same but for ties among solutions of equal loss. Machine code is kept between
processes (numba's cache beside this file, or ``NUMBA_CACHE_DIR``). ``warm_up`` loads, and if need be compiles, at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Literal

from mpqsearch.errors import ConfigError

Backend = Literal["auto", "numpy", "numba"]

COMPILED_CELLS = 1 << 18
"""Table cells from which ``auto`` loads numba: there numpy's own time exceeds the load."""

UNCACHED_CELLS = 1 << 28
"""Cells that numpy passes over in this process before the loops are compiled where they never were: some ten seconds of
either."""

CALL_CELLS = 2500
"""What a pass of numpy takes beside its cells, in cells: a fifth of a millisecond."""

LOADED_CELLS = 6_000_000
"""Cells that numpy passes over in small problems, ``CALL_CELLS`` for each pass among them, before the loops are loaded:
half a second of either."""

_passed: list[int] = [0, 0]  # cells of large problems, and of small ones
_chosen: list[Backend] = ["auto"]
_loaded: list[ModuleType] = []


def use_backend(name: Backend) -> Backend:
    """Choose the inner loops for this process; returns the previous choice.

    Raises:
        ConfigError: numba is asked for and not installed, or the name is unknown.
    """
    if name not in ("auto", "numpy", "numba"):
        raise ConfigError(f"unknown backend {name!r}; known: auto, numpy, numba.")
    if name == "numba" and not has_numba():
        raise ConfigError("backend 'numba' needs numba: pip install numba.")
    previous, _chosen[0] = _chosen[0], name
    return previous


@functools.cache
def has_numba() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def warm_up() -> bool:
    """Load the compiled loops if numba is there, so that the next solve does not pay for it."""
    return _chosen[0] != "numpy" and has_numba() and _load() is not None


def kernels(cells: int) -> ModuleType | None:
    """The compiled loops for a pass over so many table cells, or None for numpy."""
    if _chosen[0] == "numpy":
        return None
    if _chosen[0] == "auto" and not _loaded:
        small = cells < COMPILED_CELLS
        _passed[small] += cells + CALL_CELLS
        if small and _passed[True] < LOADED_CELLS:
            return None
        if not has_numba() or (sum(_passed) < UNCACHED_CELLS and not _compiled_before()):
            return None
    return _load()


def _load() -> ModuleType:
    if not _loaded:
        _loaded.append(importlib.import_module("mpqsearch.allocate.kernels"))
    return _loaded[0]


@functools.cache
def _compiled_before() -> bool:
    """Whether numba's cache holds the loops: then loading them is quick."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(given) if given else Path(__file__).with_name("__pycache__")
    return next(folder.rglob("kernels.*.nbi"), None) is not None
