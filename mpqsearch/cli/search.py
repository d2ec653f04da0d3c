"""``mpqsearch search``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from mpqsearch.stages import Run

TrialsOption = Annotated[
    int | None, typer.Option("--trials", help="Trials in all, over all workers and runs (search.trials).")
]
SamplerOption = Annotated[
    str | None, typer.Option("--sampler", help="tpe, gp, nsga2, cmaes, random or qmc (search.sampler).")
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="postgresql://..., mysql://..., journal+postgresql://..., journal+mysql://..., redis://..., grpc://host:port or a journal file. "
        "Better in the variable MPQSEARCH_STORAGE, which shows in no list of processes.",
    ),
]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Local processes, one thread each.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Only follow the study that others work on.")]
WorkerOption = Annotated[
    int | None,
    typer.Option(
        "--worker",
        help="Be worker number N of a study on a shared storage: measure until it is finished, write no results.",
    ),
]


StartOption = Annotated[
    str | None,
    typer.Option(
        "--start-from",
        help="A map from elsewhere: its nearest point is tried first, and it is measured beside the winners.",
    ),
]


def _settings(own: Any) -> list[str]:
    given = [f"search.start_from={json.dumps(own['start_from'])}"] if own["start_from"] else []
    if own["trials"] is not None:
        given.append(f"search.trials={own['trials']}")
    if own["sampler"] is not None:
        given.append(f"search.sampler={own['sampler']}")
    return given


@study_verb(settings=_settings)
def search(
    run: Run,
    *,
    as_json: bool,
    trials: TrialsOption = None,  # noqa: ARG001  (read through the settings)
    sampler: SamplerOption = None,  # noqa: ARG001
    storage: StorageOption = None,
    workers: WorkersOption = 1,
    watch: WatchOption = False,
    worker: WorkerOption = None,
    start_from: StartOption = None,  # noqa: ARG001
) -> None:
    """Search over how the integer program is built, scored by measured samples. Run it again to continue.

    Example: `mpqsearch search --model fmnist-unet --trials 40 --workers 2`
    """
    from mpqsearch import stages

    stages.check_search(run, storage=storage, workers=workers)
    if worker is None and not watch:
        stages.start(run)
    table = stages.layers(run)
    run.require_sampler("a search that is scored by samples (search)")
    measured = stages.profile(run, table)
    if measured is None:
        return
    if watch:
        stages.watch(run, table, measured, storage=storage)
        return
    data = stages.search(run, table, measured, storage=storage, workers=workers, worker=worker)
    if as_json:
        print_json(data)
    elif data:
        print_search(data)


def print_search(data: dict[str, Any]) -> None:
    """Winners beside their control arms."""
    rows = []
    for entry in data["budgets"]:
        uniform = next(r["paired"] for r in entry["rows"] if r["arm"] == "uniform")
        for r in entry["rows"]:
            verdict = "worse than uniform" if r["arm"] == "search" and entry["worse_than_uniform"] else ""
            rows.append(
                [
                    entry["budget"],
                    r["arm"],
                    f"{r['average_bits']:.3f}",
                    f"{r['size_bytes'] / 1000:.1f}",
                    f"{r['paired']:.4g}",
                    f"{r['paired'] / uniform:.3f}",
                    f"{r['fd_fp']:.3f}" if "fd_fp" in r else "",
                    f"{r['fd_data']:.3f}" if "fd_data" in r else "",
                    f"{r['paired_psnr']:.2f}" if "paired_psnr" in r else "",
                    verdict,
                ]
            )
    print_table(
        f"search: {data['trials']} trials, {data['distinct_maps']} maps, {data['new_forwards']} forward passes; FD "
        "and PSNR on fresh seeds",
        ["budget", "arm", "bits", "kB", "error", "to uniform", "fd_fp", "fd_data", "PSNR", ""],
        rows,
    )
    volumes = sorted(data["hypervolume"].items(), key=lambda kv: -kv[1])
    print_table("hypervolume of the measured fronts", ["arm", "share"], [[k, f"{v:.4f}"] for k, v in volumes])
    if data["importances"]:
        print_table(
            "which parameters matter", ["parameter", "share"], [[k, f"{v:.2f}"] for k, v in data["importances"].items()]
        )
