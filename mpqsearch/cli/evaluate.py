"""``mpqsearch evaluate``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpqsearch.cli.app import BudgetOption, study_verb
from mpqsearch.cli.printing import print_records

if TYPE_CHECKING:
    from mpqsearch.stages import Run


def map_settings(files: list[Path] | None) -> list[str]:
    """Each file as an entry of ``[allocate.maps]``, by the name of its folder or its own."""
    named = {(f.parent.name if f.name == "bitmap.json" else f.stem).replace(".", "-"): f for f in files or ()}
    return [f"allocate.maps.{name}={json.dumps(str(file))}" for name, file in named.items()]


def _settings(own: Mapping[str, Any]) -> list[str]:
    budgets = [f"allocate.budgets={json.dumps(own['budget'])}"] if own["budget"] else []
    return budgets + map_settings(own["map_"])


@study_verb(settings=_settings)
def evaluate(
    run: Run,
    *,
    as_json: bool,
    budget: BudgetOption = None,  # noqa: ARG001  (read through the settings)
    map_: Annotated[  # noqa: ARG001
        list[Path] | None,
        typer.Option("--map", help="A map from elsewhere (`mpqsearch import`) to measure beside. Repeatable."),
    ] = None,
) -> None:
    """Sample from every allocated map and measure it against full precision and data.

    Example: `mpqsearch evaluate -c studies/quickstart.toml --set evaluate.samples=64`
    """
    from mpqsearch import stages

    stages.start(run)
    table = stages.layers(run)
    run.require_sampler("an evaluation of samples (evaluate)")
    measured = stages.profile(run, table)
    if measured is not None:
        print_records(stages.evaluate(run, table, measured), as_json=as_json)
