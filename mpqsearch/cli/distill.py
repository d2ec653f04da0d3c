"""``mpqsearch distill``."""

from __future__ import annotations

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_json, print_table


@app.command()
def distill(
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
    """Train the quantized model of one map against full precision (no data needed), and measure it before and after.

    Settings are in the section [distill] of the study. Stop it at any time: the same command continues, to the same
    result.

    Example: `mpqsearch distill --model fmnist-unet --budget uniform:2 --set distill.steps=200`
    """
    from mpqsearch import stages
    from mpqsearch.core import Budget
    from mpqsearch.stages.distilling import KEYS

    settings = {"model.source": model, "model.device": device} | options.drawing(prompts, steps, guidance, batch, call)
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    limit = Budget.parse(budget)
    method = run.config.chosen_method(method)
    run.config.check_trainable()
    stages.start(run)
    if not stages.prepare(run, "training on trajectories of the sampler (distill)"):
        return
    data = stages.distill(run, method, limit)
    if as_json:
        print_json(data)
    elif data:
        before, after = data["before"], data["after"]
        rows = [
            {
                "metric": after[key]["name"],
                "before training": f"{before[key]['value']:.4g}",
                "after": f"{after[key]['value']:.4g}",
            }
            for key in KEYS
            if key in after
        ]
        print_table(f"{method} at {limit.label()}", rows)
