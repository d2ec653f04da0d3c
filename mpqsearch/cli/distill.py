"""``mpqsearch distill``."""

from __future__ import annotations

from mpqsearch.cli.app import (
    BudgetOption,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    MethodOption,
    ModelOption,
    OverwriteOption,
    RunDirOption,
    SetOption,
    VerboseOption,
    app,
    open_run,
)
from mpqsearch.cli.printing import print_json, print_table


@app.command()
def distill(
    config: ConfigOption = None,
    budget: BudgetOption = "uniform:3",
    method: MethodOption = "ilp-channel",
    model: ModelOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Train the quantized model of one map against full precision (no data needed), and measure it before and after.

    Settings are in the section [distill] of the study. Stop it at any time: the same command continues, to the same
    result.

    Example: `mpqsearch distill --model fmnist-unet --method ilp-channel --budget uniform:2 --set distill.steps=200`
    """
    from mpqsearch import stages
    from mpqsearch.core import Budget
    from mpqsearch.stages.distilling import KEYS

    run = open_run(
        config,
        set_,
        settings={"model.source": model, "model.device": device},
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    limit = Budget.parse(budget)
    run.config.method(method)
    stages.start(run)
    table = stages.layers(run)
    run.require_sampler("training on trajectories of the sampler (distill)")
    measured = stages.profile(run, table)
    if measured is None:
        return
    data = stages.distill(run, table, measured, method, limit)
    if as_json:
        print_json(data)
    elif data:
        rows = [
            [data["after"][k]["name"], *(f"{data[when][k]['value']:.4g}" for when in ("before", "after"))]
            for k in KEYS
            if k in data["after"]
        ]
        print_table(f"{method} at {limit.label()}", ["metric", "before training", "after"], rows)
