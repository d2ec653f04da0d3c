"""``mpqsearch profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from mpqsearch.cli.printing import print_json, print_profile


@app.command()
def profile(
    config: ConfigOption = None,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only", help="Read the weights from disk, layer by layer; the model is never loaded or run."
        ),
    ] = False,
    prediction_only: Annotated[
        bool,
        typer.Option(
            "--prediction-only",
            help="Only what predicts the loss of given maps at 2-4 bits: slopes at three maps that mix these widths.",
        ),
    ] = False,
    at: Annotated[
        Path | None,
        typer.Option(
            "--at", help="A bit map (bitmap.json) of this model at which gains are measured again, beside the profile."
        ),
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option("--memory-limit", help="What measuring may take beside the model, such as 6GB.")
    ] = None,
    target_error: Annotated[
        float | None,
        typer.Option(
            "--target-error", help="Probe until the relative standard error of the layer totals is this, such as 0.1."
        ),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure kurtosis, exact output errors and gains of every channel at every width.

    With `--weights-only` kurtosis and weight errors alone, of models larger than memory too; then
    `--set calibration.weights_only=true` makes `allocate` use them, with methods whose loss is `weight`.

    With `--prediction-only` what `slope` needs alone: it predicts the loss of maps that are there, at 2-4 bits, for
    about a tenth of what one layer at a time costs. Above 4.5 bits the whole profile predicts better (`context`,
    `sampler`), and only it can choose widths.

    With `--at bitmap.json` also what each width of each layer would change at that map, all other layers being
    quantized as it says (rounded to nearest): written to `profile-at-<digest>.json`; `--set calibration.at=bitmap.json`
    lets `allocate` use it, in methods whose loss is `operating`.

    Example: `mpqsearch profile --model fmnist-unet --set calibration.samples=16`

    Example: `mpqsearch profile -c studies/quickstart.toml --at
    runs/quickstart/allocations/ilp-channel@uniform-3/bitmap.json`
    """
    from mpqsearch import stages

    run = open_run(
        config,
        set_,
        settings={
            "model.source": model,
            "model.device": device,
            "model.memory_limit": memory_limit,
            "calibration.weights_only": weights_only or None,
            "calibration.prediction_only": prediction_only or None,
            "calibration.at": None if at is None else str(at),
            "calibration.target_error": target_error,
        },
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    stages.start(run)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is None:
        return
    if as_json:
        print_json(measured.header())
    else:
        print_profile(table, measured)
