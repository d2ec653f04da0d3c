"""``mpqsearch run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli.app import (
    DeviceOption,
    DryRunOption,
    JsonOption,
    OverwriteOption,
    RunDirOption,
    SetOption,
    VerboseOption,
    app,
    open_run,
)
from mpqsearch.cli.printing import print_lines, print_records


@app.command("run")
def run_study(
    study: Annotated[Path, typer.Argument(help="A study in TOML, such as studies/quickstart.toml.")],
    device: DeviceOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Run a whole study: layers, profile, allocate, evaluate, report, export. Run it again to continue or to reuse.

    Example: `mpqsearch run studies/quickstart.toml`
    """
    from mpqsearch import stages

    run = open_run(
        study,
        set_,
        settings={"model.device": device},
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    print_records(stages.everything(run), as_json=as_json)
    if not (run.dry_run or as_json):
        print_lines([run.path("report.html")], as_json=False)
