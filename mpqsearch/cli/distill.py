"""``mpqsearch distill``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from mpqsearch.stages import Run


@study_verb()
def distill(
    run: Run,
    *,
    as_json: bool,
    budget: Annotated[str, typer.Option("--budget", "-b", help="Budget of the map.")] = "uniform:3",
    method: Annotated[str, typer.Option("--method", help="Method of the study.")] = "ilp-channel",
) -> None:
    """Train the quantized model of one map against full precision (no data needed), and measure it before and after.

    Settings are in the section [distill] of the study. Stop it at any time: the same command continues, to the same
    result.

    Example: `mpqsearch distill --model fmnist-unet --method ilp-channel --budget uniform:2 --set distill.steps=200`
    """
    from mpqsearch import stages
    from mpqsearch.core import Budget
    from mpqsearch.stages.distilling import KEYS

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
