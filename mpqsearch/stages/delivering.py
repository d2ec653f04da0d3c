"""What a delivered file is worth: the weights that its consumer decodes, measured as every map is, beside its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import FULL_PRECISION, Budget, MetricValue, StudyRecord, size_bits
from mpqsearch.errors import ConfigError
from mpqsearch.progress import bar_of
from mpqsearch.sources import denoiser_folders, local_folder
from mpqsearch.specs.targets import FULL
from mpqsearch.stages.base import Run
from mpqsearch.stages.references import delivered_module, file_key, measure, metrics_file, scratch_file
from mpqsearch.stages.reuse import METRICS, reuse_or_make

if TYPE_CHECKING:
    from mpqsearch.export import ExportJob, Target

OVER = 0.01
"""A file may be larger than its budget by this share."""

SAME_SIZE = 0.001
"""Share by which a uniform file may be larger than the one that it is compared with, if the budget allows no more."""

ERROR = "paired_mse"
"""What files of one size are compared by: the error of samples from the same noise."""


def deliver(
    run: Run, target: Target, job: ExportJob, folder: Path, budget: Budget, limit: int | None, *, whole: bool
) -> dict[str, Any]:
    """Measure the export in ``folder``, and the target's largest uniform file that is no larger or fits the budget; the
    rest of ``export/<target>@<budget>.json``.

    ``limit``: the stored bits that the budget allows the map, with its activations; None for no size. They hold the
    ``whole`` file, as for a map of the target's own, or its tensors, as for any other, which knew no names.
    ``metrics`` is empty where ``not_measured`` says why. ``faults`` are sentences on what a user must know before
    taking the file: others do not load it, it is worse than that uniform file, or larger than the budget or the source.
    """
    found = sized(target, job, folder, limit, source_bytes(run), whole=whole) | {
        "budget": budget.label(),
        "measured_with": file_key(run, {}),
        "not_measured": _obstacle(run),
    }
    if not found["not_measured"]:
        try:
            found |= _measured(run, target, folder)
            room = 0 if limit is None else limit // 8 - (found["header_bytes"] if whole else 0)
            found["uniform"] = _uniform(run, target, job, max(room, int((1 + SAME_SIZE) * found["stored_bytes"])))
        except ConfigError as error:
            found["not_measured"] = str(error)
    return found | {"faults": list(faults(target.name, found))}


def sized(
    target: Target, job: ExportJob, folder: Path, limit: int | None, source: int, *, whole: bool
) -> dict[str, Any]:
    """What is known of an export before it is measured, see `deliver`; ``source``: bytes of the model that it was made
    from."""
    sizes = target.sizes(folder)
    return {
        **sizes,
        "counted_bytes": sum(sizes.values()) if whole else sizes["stored_bytes"],
        "budget_bytes": None if limit is None else -(-limit // 8),
        "source_bytes": source,
        "unread": target.unread(job.model.module),
        "metrics": {},
        "uniform": None,
    }


def delivered_records(run: Run) -> list[StudyRecord]:
    """The files of a run that were measured as its maps are now, as points of their own, ``<target> file``."""
    records = []
    for path in sorted(run.path("export").glob("*.json")):
        data = artifacts.read_json(path, "mpqsearch/export").data
        found = data.get("delivered") or {}
        if found.get("metrics") and found["measured_with"] == file_key(run, {}):
            records.append(_record(run, data, found))
    return records


def _record(run: Run, data: Mapping[str, Any], found: Mapping[str, Any]) -> StudyRecord:
    size, seeds = found["stored_bytes"] + found["header_bytes"], run.config.evaluate
    over = found["budget_bytes"] is not None and found["counted_bytes"] > (1 + OVER) * found["budget_bytes"]
    return StudyRecord(
        model=run.table.model,
        method=f"{data['target']} file",
        granularity=data["granularity"],
        budget=f"over {found['budget']}" if over else found["budget"],
        quantity=Budget.parse(found["budget"]).quantity,
        average_bits=8 * size / run.table.n_parameters,
        size_bytes=size,
        act_bits=float(FULL_PRECISION),
        bit_map_digest=data["file_digest"],
        n_samples=seeds.samples,
        seeds=f"{seeds.first_seed}..{seeds.first_seed + seeds.samples - 1}",
        seconds=found["seconds"],
        predicted_loss=float("nan"),
        metrics={k: MetricValue(**m) for k, m in found["metrics"].items()},
    )


def faults(target: str, found: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a measured file, worst first; see `deliver`.

    It is worse than a uniform one whose error is below the interval of its own.
    """
    uniform, stored = found["uniform"], found["stored_bytes"]
    if found["unread"]:
        yield found["unread"]
    if uniform is not None:
        ours, theirs = found["metrics"][ERROR], uniform["error"]
        if theirs["value"] < ours["low"]:
            yield (
                f"the file of {target} is WORSE than {target} with every layer in {uniform['choice']}: error "
                f"{ours['value']:.4g} ({ours['low']:.4g} to {ours['high']:.4g}) at {stored} bytes, "
                f"{theirs['value']:.4g} ({theirs['low']:.4g} to {theirs['high']:.4g}) at {uniform['stored_bytes']}"
            )
    if found["budget_bytes"] is not None and found["counted_bytes"] > (1 + OVER) * found["budget_bytes"]:
        yield (
            f"the file of {target} is LARGER than the budget {found['budget']}: {found['counted_bytes']} bytes, "
            f"{found['budget_bytes']} are allowed"
        )
    whole = stored + found["header_bytes"]
    if whole > found["source_bytes"]:
        yield (
            f"the file of {target} is LARGER than the model that it was made from: {whole} bytes, that has "
            f"{found['source_bytes']}"
        )


def source_bytes(run: Run) -> int:
    """Bytes of the denoiser as it was loaded: of its files of weights, or in memory where it has none."""
    c, loaded = run.config.model, run.denoiser.size_bytes
    folder = None if run.given is not None else local_folder(c.source)
    if folder is None:
        return loaded
    parts = denoiser_folders(c.source, folder, run.config.component).values()
    stored = sum(file.stat().st_size for part in parts for file in part.glob("*.safetensors"))
    return min(stored, loaded) or loaded


def _obstacle(run: Run) -> str:
    """Why nothing can be measured in this study; empty when it can."""
    from mpqsearch.sampling import can_sample

    if not run.config.export.measure:
        return "it was not asked for (export.measure)"
    if run.config.calibration.weights_only or not can_sample(run.denoiser):
        return "the study has no sampler that could run here"
    return ""


def _measured(run: Run, target: Target, folder: Path) -> dict[str, Any]:
    """Metrics of the export in a folder, by the content of its files."""
    manifest = artifacts.read_json(folder / "export.json", "mpqsearch/export").data
    key = file_key(run, manifest["files"])
    return _metrics(run, key, target, folder)


def _metrics(run: Run, key: str, target: Target, folder: Path) -> dict[str, Any]:
    path = metrics_file(run, key)
    return dict(reuse_or_make(run, METRICS, path, {"evaluation": key}, lambda: _draw(run, key, target, folder)))


def _draw(run: Run, key: str, target: Target, folder: Path) -> dict[str, Any]:
    with run.timed("evaluate"), bar_of(f"the file of {target.name}", run.config.evaluate.samples) as bar:
        return measure(run, key, partial(delivered_module, run, target, folder), bar.update)


def _uniform(run: Run, target: Target, job: ExportJob, most: int) -> dict[str, Any] | None:
    """The target's largest uniform file whose tensors take at most these bytes, of several the one of most bits, with
    its error: written, measured and dropped. None when all are larger."""
    candidates = [(name, own) for name, own in _uniform_jobs(run, target, job)]
    sized = [(target.promise(own, target.plan(own)).total, name, own) for name, own in candidates]
    fitting = [(bits, name, own) for bits, name, own in sized if bits / 8 <= most]
    if not fitting:
        return None
    _, name, own = max(fitting, key=lambda entry: (entry[0], size_bits(run.table, entry[2].bit_map)))
    with scratch_file(run, target, own) as folder:
        data, sizes = _measured(run, target, folder), target.sizes(folder)
    return {"choice": name, **sizes, "error": data["metrics"][ERROR]}


def _uniform_jobs(run: Run, target: Target, job: ExportJob) -> Iterator[tuple[str, ExportJob]]:
    """A job for each format of the target: every layer that can take it does, whatever the policy says."""
    from mpqsearch.export.allocation import uniform_maps

    for name, made in uniform_maps(target, run.table, fmt=job.bit_map.format).items():
        choices = {} if target.holds_any_map else {la.name: made.choices.get(la.name, FULL) for la in run.table}
        yield name, replace(job, bit_map=made.bit_map, choices=choices, trained=None, evaluated=None)
