"""``mpqsearch report``."""

from __future__ import annotations

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_lines


@app.command()
def report(
    config: options.Config = None,
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
    """Draw the front, tables, bit maps and sample grids into one report.html, from what was measured before.

    Nothing is measured here: what is missing is named with the verb that makes it. `mpqsearch run` does all.

    Example: `mpqsearch report -c studies/quickstart.toml`
    """
    from mpqsearch import stages
    from mpqsearch.models.devices import resolve_device

    settings = {"model.source": model, "model.device": device} | options.drawing(prompts, steps, guidance, batch, call)
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=False, verbose=verbose)
    resolve_device(run.config.model.device)  # nothing is computed, but a study that names no device is wrong
    run.reads_only = True
    stages.prepare(run)
    records = stages.evaluate(run)
    records += stages.trained(run, records)
    records += stages.delivered_records(run)
    if overwrite and not dry_run:
        run.path("pareto.json").unlink(missing_ok=True)
    print_lines([stages.report(run, records)], as_json=as_json)
