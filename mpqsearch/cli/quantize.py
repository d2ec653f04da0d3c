"""``mpqsearch quantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_lines

if TYPE_CHECKING:
    from mpqsearch.stages import Run


@study_verb()
def quantize(
    run: Run,
    *,
    as_json: bool,
    budget: Annotated[str, typer.Option("--budget", "-b", help="Budget of the map.")] = "uniform:3",
    method: Annotated[str, typer.Option("--method", help="Method of the study.")] = "ilp-channel",
) -> None:
    """Write the fake-quantized model of one map as a diffusers folder (safetensors) with its bit map.

    Example: `mpqsearch quantize --model fmnist-unet --method ilp-channel --budget uniform:3`
    """
    from mpqsearch import stages
    from mpqsearch.core import Budget

    limit = Budget.parse(budget)
    run.config.method(method)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is not None:
        print_lines([stages.quantize(run, table, measured, method, limit)], as_json=as_json)
