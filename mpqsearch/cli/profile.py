"""``mpqsearch profile``."""

from __future__ import annotations

from typing import Annotated

import typer

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_json, print_profile

WeightsOnlyOption = Annotated[
    bool,
    typer.Option(
        "--weights-only", help="Read the weights from disk, layer by layer; the model is never loaded or run."
    ),
]
GranularityOption = Annotated[
    str | None,
    typer.Option(
        "--granularity", help="channel (default), or layer: totals of whole layers alone, in a fraction of the time."
    ),
]
ReuseOption = Annotated[
    str | None,
    typer.Option("--reuse", help="Run folder of the model that this one was fine-tuned from: use its sensitivities."),
]
MemoryLimitOption = Annotated[
    str | None, typer.Option("--memory-limit", help="Memory for measuring, in addition to the model: 6GB.")
]


@app.command()
def profile(
    config: options.Config = None,
    weights_only: WeightsOnlyOption = False,
    granularity: GranularityOption = None,
    reuse: ReuseOption = None,
    memory_limit: MemoryLimitOption = None,
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
    """Measure kurtosis, exact output errors and sensitivities of every channel at every width.

    With `--weights-only` kurtosis and weight errors alone, of models larger than memory too; then
    `--set calibration.weights_only=true` makes `allocate` use them, with methods whose loss is `weight`.

    With `--granularity layer` one forward and one backward pass a calibration batch give the loss of every layer at
    every width; then `--set calibration.granularity=layer` makes `allocate` use them, with `ilp-layer`.

    With `--reuse runs/base` only forward passes run: inputs and errors are this model's, sensitivities those of a model
    of the same structure; then `--set calibration.reuse=runs/base` makes `allocate` use them.

    Example: `mpqsearch profile --model fmnist-unet --set calibration.samples=16`

    Example: `mpqsearch profile --model fmnist-unet --granularity layer`

    Example: `mpqsearch profile --model ./my-pipeline --prompts prompts.txt --steps 20 --call height=512`
    """
    from mpqsearch import stages

    settings = {
        "model.source": model,
        "model.device": device,
        **options.drawing(prompts, steps, guidance, batch, call),
        "model.memory_limit": memory_limit,
        "calibration.weights_only": weights_only or None,
        "calibration.granularity": granularity,
        "calibration.reuse": reuse,
    }
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    stages.start(run)
    stages.layers(run)
    measured = stages.profile(run)
    if measured is None:
        return
    if as_json:
        print_json(measured.header())
    else:
        print_profile(run.table, measured)
