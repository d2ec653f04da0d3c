"""``mpqsearch quantize``."""

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
from mpqsearch.cli.printing import print_lines


@app.command()
def quantize(
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
    """Write the fake-quantized model of one map as a diffusers folder (safetensors) with its bit map.

    Example: `mpqsearch quantize --model fmnist-unet --method ilp-channel --budget uniform:3`
    """
    from mpqsearch import stages
    from mpqsearch.core import Budget

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
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is not None:
        print_lines([stages.quantize(run, table, measured, method, limit)], as_json=as_json)
