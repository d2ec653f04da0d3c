"""``mpqsearch report``."""

from __future__ import annotations

from mpqsearch.cli.app import (
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
from mpqsearch.cli.printing import print_lines


@app.command()
def report(
    config: ConfigOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Draw the front, tables, bit maps and sample grids into one report.html.

    Example: `mpqsearch report -c studies/quickstart.toml`
    """
    from mpqsearch import stages

    run = open_run(
        config,
        set_,
        settings={"model.source": model, "model.device": device},
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    table = stages.layers(run)
    run.require_sampler("a report of samples (report)")
    measured = stages.profile(run, table)
    if measured is None:
        return
    records = stages.evaluate(run, table, measured)
    records += stages.trained(run, table, measured, records)
    print_lines([stages.report(run, table, measured, records)], as_json=as_json)
