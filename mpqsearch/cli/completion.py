"""What a shell may put in the place of a value that is half written; nothing here loads torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import typer

Found = list[tuple[str, str]]
"""Values, each with what it means."""


def among(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes to one of the names, which are looked up when they are asked for."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def targets() -> Iterable[str]:
    """Export targets."""
    from mpqsearch.specs.targets import TARGETS

    return TARGETS


def sources() -> Iterable[str]:
    """What maps can be imported from."""
    from mpqsearch.specs.targets import SOURCES

    return SOURCES


def model(incomplete: str) -> list[str]:
    """Embedded models, and folders."""
    from mpqsearch.sources import EMBEDDED

    folders = [f"{path.as_posix()}/" for path in sorted(Path().glob(f"{incomplete}*")) if path.is_dir()]
    return [name for name in (*EMBEDDED, *folders) if name.startswith(incomplete)]


def method(ctx: typer.Context, incomplete: str) -> list[str]:
    """Methods of the study that ``--config`` names; those of a study without any, else."""
    from mpqsearch.config import load_config

    config = ctx.params.get("config")
    names = (m.name for m in load_config(None if config is None else Path(config)).methods)
    return [name for name in names if name.startswith(incomplete)]


def setting(incomplete: str) -> Found:
    """Keys of a study, with the sign that their value follows."""
    from mpqsearch.settings import settings

    return [(f"{key}=", one.meaning) for key, one in settings().items() if key.startswith(incomplete)]


def budget(incomplete: str) -> Found:
    """Budgets in the usual notations."""
    known = {"uniform:3": "the bytes of 3 bits everywhere", "3bit": "3 bits a parameter", "450kB": "a size in bytes"}
    return [(name, text) for name, text in known.items() if name.startswith(incomplete)]
