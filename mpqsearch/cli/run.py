"""``mpqsearch run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_lines, print_records


@app.command("run")
def run_study(
    study: Annotated[Path, typer.Argument(help="A study in TOML, such as studies/quickstart.toml.")],
    select: options.Select = None,
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
    """Run a whole study: layers, profile, allocate, evaluate, report, export. Run it again to continue or to reuse.

    Example: `mpqsearch run studies/quickstart.toml`

    Example: `mpqsearch run study.toml --prompts prompts.txt --steps 20 --guidance 5 --batch 2`
    """
    from mpqsearch import stages

    settings = {"model.device": device, "allocate.select": select} | options.drawing(
        prompts, steps, guidance, batch, call
    )
    run = open_run(study, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    print_records(stages.everything(run), as_json=as_json)
    if not (run.dry_run or as_json):
        print_lines([run.path("report.html")], as_json=False)
