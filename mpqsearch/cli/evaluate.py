"""``mpqsearch evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_records


def map_settings(files: list[Path] | None) -> dict[str, str]:
    """Each file as an entry of ``[allocate.maps]``, by the name of its folder or its own."""
    named = {(f.parent.name if f.name == "bitmap.json" else f.stem).replace(".", "-"): f for f in files or ()}
    return {f"allocate.maps.{name}": str(file) for name, file in named.items()}


@app.command()
def evaluate(
    config: options.Config = None,
    budget: options.Budgets = None,
    map_: Annotated[
        list[Path] | None,
        typer.Option(
            "--map", metavar="PATH", help="Also measure this map (`mpqsearch import` writes one). May be repeated."
        ),
    ] = None,
    model: options.Model = None,
    prompts: options.Prompts = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    batch: options.Batch = None,
    call: options.Call = None,
    device: options.Device = None,
    set_: options.Set = None,
    run_dir: options.RunDir = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Sample from every allocated map and measure it against full precision and data.

    Example: `mpqsearch evaluate -c studies/quickstart.toml --set evaluate.samples=64`

    Example: `mpqsearch evaluate --model ./my-pipeline --prompts prompts.txt --budget 4bit`
    """
    from mpqsearch import stages

    settings = {
        "model.source": model,
        "model.device": device,
        **options.drawing(prompts, steps, guidance, batch, call),
        "allocate.budgets": budget,
        **map_settings(map_),
    }
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    stages.start(run)
    if stages.prepare(run, "an evaluation of samples (evaluate)"):
        print_records(stages.evaluate(run), as_json=as_json)
