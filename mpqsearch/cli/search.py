"""``mpqsearch search``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mpqsearch.cli import completion, options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_fields, print_json, print_table
from mpqsearch.specs.search import SAMPLERS

TrialsOption = Annotated[
    int | None, typer.Option("--trials", help="Trials in all, over all workers and runs (search.trials).")
]
SamplerOption = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        help="tpe, gp, nsga2, cmaes or random (search.sampler).",
        autocompletion=completion.among(lambda: SAMPLERS),
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="postgresql://..., mysql://..., redis://... or a journal file. Better in the variable MPQSEARCH_STORAGE, "
        "which shows in no list of processes.",
    ),
]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Local processes that share the study.")]
WorkerOption = Annotated[
    int | None,
    typer.Option(
        "--worker",
        help="Be worker number N of a study on a shared storage: measure until it is finished, write no results.",
    ),
]


@app.command()
def search(
    config: options.Config = None,
    trials: TrialsOption = None,
    sampler: SamplerOption = None,
    storage: StorageOption = None,
    workers: WorkersOption = 1,
    worker: WorkerOption = None,
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
    """Search over how the integer program is built, scored by measured samples. Run it again to continue.

    Example: `mpqsearch search --model fmnist-unet --trials 40 --workers 2`
    """
    from mpqsearch import stages

    settings = {
        "model.source": model,
        "model.device": device,
        **options.drawing(prompts, steps, guidance, batch, call),
        "search.trials": trials,
        "search.sampler": sampler,
    }
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    stages.check_search(run, storage=storage, workers=workers)
    if worker is None:
        stages.start(run)
    if not stages.prepare(run, "a search that is scored by samples (search)"):
        return
    data = stages.search(run, storage=storage, workers=workers, worker=worker)
    if as_json:
        print_json(data)
    elif data:
        print_search(data)


def print_search(data: dict[str, Any]) -> None:
    """The chosen maps beside their control arms."""
    from mpqsearch.report.search import arms_table

    title = f"search: {data['trials']} trials, {data['distinct_maps']} maps, {data['forwards']} forward passes"
    print_table(title, [{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in r.items()} for r in arms_table(data)])
    if data["importances"]:
        print_fields("which parameters matter", {name: f"{share:.2f}" for name, share in data["importances"].items()})
