"""``mpqsearch quantize``."""

from __future__ import annotations

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_lines


@app.command()
def quantize(
    config: options.Config = None,
    budget: options.Budget = "uniform:3",
    method: options.Method = None,
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
    """Write the fake-quantized model of one map as a diffusers folder (safetensors) with its bit map.

    Example: `mpqsearch quantize --model fmnist-unet --budget uniform:3`
    """
    from mpqsearch import stages
    from mpqsearch.core import Budget

    settings = {"model.source": model, "model.device": device} | options.drawing(prompts, steps, guidance, batch, call)
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    limit = Budget.parse(budget)
    method = run.config.chosen_method(method)
    if stages.prepare(run):
        print_lines([stages.quantize(run, method, limit)], as_json=as_json)
