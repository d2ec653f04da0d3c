"""``mpqsearch card``."""

from __future__ import annotations

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_lines


@app.command()
def card(
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
    as_json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Write the model card (README.md) of every exported folder of a run again.

    `export` and `run` write it with the files: faults, bytes, each metric compared with full precision,
    samples of the same noise, the formats of the layers, how to load the file, the command, and SHA-256 of the files.

    Example: `mpqsearch card -c studies/quickstart.toml`
    """
    from mpqsearch import stages
    from mpqsearch.models.devices import resolve_device

    settings = {"model.source": model, "model.device": device} | options.drawing(prompts, steps, guidance, batch, call)
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=False, overwrite=False, verbose=verbose)
    resolve_device(run.config.model.device)  # nothing is computed, but a study that names no device is wrong
    run.reads_only = True
    print_lines(stages.cards(run), as_json=as_json)
