"""``mpqsearch evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli.app import (
    BudgetsOption,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    RunDirOption,
    SetOption,
    VerboseOption,
    app,
    open_run,
)
from mpqsearch.cli.printing import print_records


def map_settings(files: list[Path] | None) -> dict[str, str]:
    """Each file as an entry of ``[allocate.maps]``, by the name of its folder or its own."""
    named = {(f.parent.name if f.name == "bitmap.json" else f.stem).replace(".", "-"): f for f in files or ()}
    return {f"allocate.maps.{name}": str(file) for name, file in named.items()}


@app.command()
def evaluate(
    config: ConfigOption = None,
    budget: BudgetsOption = None,
    map_: Annotated[
        list[Path] | None,
        typer.Option("--map", help="A map from elsewhere (`mpqsearch import`) to measure beside. Repeatable."),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Sample from every allocated map and measure it against full precision and data.

    Example: `mpqsearch evaluate -c studies/quickstart.toml --set evaluate.samples=64`
    """
    from mpqsearch import stages

    run = open_run(
        config,
        set_,
        settings={
            "model.source": model,
            "model.device": device,
            "allocate.budgets": budget or None,
            **map_settings(map_),
        },
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    stages.start(run)
    table = stages.layers(run)
    run.require_sampler("an evaluation of samples (evaluate)")
    measured = stages.profile(run, table)
    if measured is not None:
        print_records(stages.evaluate(run, table, measured), as_json=as_json)
