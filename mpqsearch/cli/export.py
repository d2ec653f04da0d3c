"""``mpqsearch export``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_lines

if TYPE_CHECKING:
    from mpqsearch.stages import Run

_KEYS = {"target": "export.targets", "budget": "export.budget", "method": "report.chosen"}


def _settings(own: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(own[option])}" for option, key in _KEYS.items() if own[option]]


@study_verb(settings=_settings)
def export(
    run: Run,
    *,
    as_json: bool,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="neutral, gguf, torchao ... Repeatable.")] = None,  # noqa: ARG001
    budget: Annotated[str | None, typer.Option("--budget", "-b", help="Budget of the map to export.")] = None,  # noqa: ARG001
    method: Annotated[str | None, typer.Option("--method", help="Method of the study (default: the best one).")] = None,  # noqa: ARG001
) -> None:
    """Write a map for another quantizer and let that quantizer read it back.

    Example: `mpqsearch export -c studies/quickstart.toml --target quanto --budget uniform:4`
    """
    from mpqsearch import stages

    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is not None:
        print_lines(stages.export(run, table, measured, []), as_json=as_json)
