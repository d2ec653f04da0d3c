"""``mpqsearch profile``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_json, print_profile

if TYPE_CHECKING:
    from mpqsearch.stages import Run


def _settings(options: Mapping[str, Any]) -> list[str]:
    made = [f"calibration.{key}=true" for key in ("weights_only", "prediction_only") if options[key]]
    made += [f"calibration.at={json.dumps(str(options['at']))}"] if options["at"] else []
    if options["target_error"] is not None:
        made.append(f"calibration.target_error={options['target_error']!r}")
    return made + ([f"model.memory_limit={json.dumps(options['memory_limit'])}"] if options["memory_limit"] else [])


@study_verb(settings=_settings)
def profile(
    run: Run,
    *,
    as_json: bool,
    weights_only: Annotated[  # noqa: ARG001  (read by `_settings`)
        bool,
        typer.Option(
            "--weights-only", help="Read the weights from disk, layer by layer; the model is never loaded or run."
        ),
    ] = False,
    prediction_only: Annotated[  # noqa: ARG001
        bool,
        typer.Option(
            "--prediction-only",
            help="Only what predicts the loss of given maps at 2-4 bits: slopes at three maps that mix these widths.",
        ),
    ] = False,
    at: Annotated[  # noqa: ARG001
        Path | None,
        typer.Option(
            "--at", help="A bit map (bitmap.json) of this model at which gains are measured again, beside the profile."
        ),
    ] = None,
    memory_limit: Annotated[  # noqa: ARG001
        str | None, typer.Option("--memory-limit", help="What measuring may take beside the model, such as 6GB.")
    ] = None,
    target_error: Annotated[  # noqa: ARG001
        float | None,
        typer.Option(
            "--target-error", help="Probe until the relative standard error of the layer totals is this, such as 0.1."
        ),
    ] = None,
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

    stages.start(run)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is None:
        return
    if as_json:
        print_json(measured.header())
    else:
        print_profile(table, measured)
