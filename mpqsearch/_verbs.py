"""Rooms whose names are verbs of the front door, too.

``mpqsearch.profile`` is a package, which people import from, and a thing that people do: ``mpq.profile(model)``. Python
gives a package the submodule of that name as an attribute as soon as it is imported, whatever the package defines, so
the submodule itself has to be what can be called.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

VERBS = ("allocate", "distill", "export", "profile", "search")
"""Rooms that are called; each says so with `make_callable` when it is imported."""


class CallableRoom(ModuleType):
    """A package that is called like the function of its name in `mpqsearch.api`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """See the function of this name in `mpqsearch.api`."""
        return self._function()(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function, for `help`, notebooks and editors."""
        return inspect.signature(self._function())

    def _function(self) -> Any:
        from mpqsearch import api

        return getattr(api, self.__name__.rpartition(".")[2])


def make_callable(name: str) -> None:
    """Let the package ``name`` be called."""
    sys.modules[name].__class__ = CallableRoom
