"""Which implementation of the inner loops runs: compiled (numba, an optional dependency) or plain numpy.

Loading numba takes most of a second, so ``auto`` leaves small problems of a fresh process to numpy; ``warm_up`` loads
the compiled loops for a process that solves many.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Literal

from mpqsearch.errors import ConfigError

Backend = Literal["auto", "numpy", "numba"]

COMPILED_CELLS = 1 << 18
"""Table cells from which ``auto`` loads numba: there numpy's own time exceeds the load."""

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


def has_numba() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def warm_up() -> bool:
    """Load the compiled loops if numba is there, so that the next solve does not pay for it."""
    return kernels(COMPILED_CELLS) is not None


def kernels(cells: int) -> ModuleType | None:
    """The compiled loops for a table of so many cells, or None for numpy."""
    if _chosen[0] == "numpy":
        return None
    if _chosen[0] == "auto" and not _loaded and (cells < COMPILED_CELLS or not has_numba()):
        return None
    if not _loaded:
        _loaded.append(importlib.import_module("mpqsearch.allocate.kernels"))
    return _loaded[0]
