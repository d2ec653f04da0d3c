"""``mpqsearch profile``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_json, print_profile

if TYPE_CHECKING:
    from mpqsearch.stages import Run


def _settings(options: Mapping[str, Any]) -> list[str]:
    made = ["calibration.weights_only=true"] if options["weights_only"] else []
    if options["target_error"] is not None:
        made.append(f"calibration.target_error={options['target_error']!r}")
    return made + ([f"model.memory_limit={json.dumps(options['memory_limit'])}"] if options["memory_limit"] else [])


@study_verb(settings=_settings)
def profile(
    run: Run,
    *,
    as_json: bool,
    weights_only: Annotated[  # noqa: ARG001  (read by `_settings`)
        bool, typer.Option("--weights-only", help="Read the weights from disk, layer by layer; the model is never loaded or run.")
    ] = False,
    memory_limit: Annotated[  # noqa: ARG001
        str | None, typer.Option("--memory-limit", help="What measuring may take beside the model, such as 6GB.")
    ] = None,
    target_error: Annotated[  # noqa: ARG001
        float | None,
        typer.Option("--target-error", help="Probe until the relative standard error of the layer totals is this, such as 0.1."),
    ] = None,
) -> None:
    """Measure kurtosis, exact output errors and gains of every channel at every width.

    With `--weights-only` kurtosis and weight errors alone, of models larger than memory too; then
    `--set calibration.weights_only=true` makes `allocate` use them, with methods whose loss is `weight`.

    Example: `mpqsearch profile --model fmnist-unet --set calibration.samples=16`
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
