"""``mpqsearch search``."""

from __future__ import annotations

from typing import Annotated, Any

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
from mpqsearch.cli.printing import print_json, print_table

TrialsOption = Annotated[
    int | None, typer.Option("--trials", help="Trials in all, over all workers and runs (search.trials).")
]
SamplerOption = Annotated[
    str | None, typer.Option("--sampler", help="tpe, gp, nsga2, cmaes or random (search.sampler).")
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
    config: ConfigOption = None,
    trials: TrialsOption = None,
    sampler: SamplerOption = None,
    storage: StorageOption = None,
    workers: WorkersOption = 1,
    worker: WorkerOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Search over how the integer program is built, scored by measured samples. Run it again to continue.

    Example: `mpqsearch search --model fmnist-unet --trials 40 --workers 2`
    """
    from mpqsearch import stages

    run = open_run(
        config,
        set_,
        settings={
            "model.source": model,
            "model.device": device,
            "search.trials": trials,
            "search.sampler": sampler,
        },
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    stages.check_search(run, storage=storage, workers=workers)
    if worker is None:
        stages.start(run)
    table = stages.layers(run)
    run.require_sampler("a search that is scored by samples (search)")
    measured = stages.profile(run, table)
    if measured is None:
        return
    data = stages.search(run, table, measured, storage=storage, workers=workers, worker=worker)
    if as_json:
        print_json(data)
    elif data:
        print_search(data)


def print_search(data: dict[str, Any]) -> None:
    """The chosen maps beside their control arms."""
    rows = []
    for entry in data["budgets"]:
        uniform = next(r["error"] for r in entry["rows"] if r["arm"] == "uniform")
        for r in entry["rows"]:
            verdict = "worse than uniform" if r["arm"] == "search" and entry["worse_than_uniform"] else ""
            rows.append(
                [
                    entry["budget"],
                    r["arm"],
                    f"{r['average_bits']:.3f}",
                    f"{r['size_bytes'] / 1000:.1f}",
                    f"{r['error']:.4g}",
                    f"{r['error'] / uniform:.3f}",
                    f"{r['fd_fp']:.3f}" if "fd_fp" in r else "",
                    f"{r['fd_data']:.3f}" if "fd_data" in r else "",
                    f"{r['paired_psnr']:.2f}" if "paired_psnr" in r else "",
                    verdict,
                ]
            )
    print_table(
        f"search: {data['trials']} trials, {data['distinct_maps']} maps, {data['forwards']} forward passes; FD and "
        "PSNR on fresh seeds",
        ["budget", "arm", "bits", "kB", "error", "to uniform", "fd_fp", "fd_data", "PSNR", ""],
        rows,
    )
    volumes = sorted(data["hypervolume"].items(), key=lambda kv: -kv[1])
    print_table("hypervolume of the measured fronts", ["arm", "share"], [[k, f"{v:.4f}"] for k, v in volumes])
    if data["importances"]:
        print_table(
            "which parameters matter", ["parameter", "share"], [[k, f"{v:.2f}"] for k, v in data["importances"].items()]
        )
