"""Maps for other quantizers, and the fake-quantized model as a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile, StudyRecord, size_bits
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run, json_text, same_model, slug
from mpqsearch.stages.evaluating import quantized_module
from mpqsearch.stages.gptq import input_moments
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.reporting import SIZE_COLUMNS, chosen_method, export_budget, size_rows
from mpqsearch.stages.targeting import resolved_for, target_allocation

if TYPE_CHECKING:
    from mpqsearch.export import Exporter, ExportJob


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One target's export: its files, what ``export/<target>.json`` says of it, and what the consumer said, when it was
    asked."""

    target: str
    paths: tuple[Path, ...]
    data: Mapping[str, Any]

    @property
    def differs(self) -> bool:
        """True when the consumer was asked and did not find what was planned."""
        found = self.data["verification"]
        return found is not None and not found["ok"]


def export(
    run: Run,
    table: LayerTable,
    measured: SensitivityProfile,
    records: list[StudyRecord],
    *,
    verify: bool = True,
    again: bool = False,
) -> list[Exported]:
    """Write a map for every configured target, and with ``verify`` let the consumer read it back in a process of its
    own.

    A target that is in ``[allocate] targets`` gets its own map, any other that of the chosen method. What was written
    and verified from the same inputs is reused; with ``verify`` an export that is only written is read back now, and
    with ``again`` one that was read back before, too. ``export/<target>.json`` holds what was promised and found,
    ``export/sizes.csv`` the sizes of all targets. A difference does not raise: see `Exported.differs`.
    """
    c = run.config.export
    budget = export_budget(run)
    exports = []
    for target in c.targets:
        done = _export_one(run, table, measured, records, target, budget, verify=verify, again=again)
        if done is not None:
            exports.append(done)
    rows, sizes = size_rows(run), run.path("export", "sizes.csv")
    text = _csv(rows)
    if rows and not run.dry_run and not (sizes.is_file() and sizes.read_text() == text):
        artifacts.write_text(sizes, text)
    return exports


def require_verified(exports: Sequence[Exported]) -> None:
    """Raise `ArtifactError` when a consumer found another thing than was planned."""
    for one in exports:
        if one.differs:
            raise ArtifactError(f"the export for {one.target} was not read back as planned: see the lines above")


def _export_one(
    run: Run,
    table: LayerTable,
    measured: SensitivityProfile,
    records: list[StudyRecord],
    target: str,
    budget: Budget,
    *,
    verify: bool,
    again: bool,
) -> Exported | None:
    from mpqsearch.export import get_exporter

    own = target in run.config.allocate.targets
    choices: Mapping[str, str] = {}
    if own:
        bit_map, solved = target_allocation(run, table, measured, target, budget)
        label, choices = f"allocated for {target} at {budget.label()}", solved["choices"]
    else:
        method = chosen_method(run, records)
        bit_map, solved = allocation(run, table, measured, method, budget)
        label = f"{method.name} at {budget.label()}"
    rounding = run.config.export.rounding
    folder, stamp = run.path("export", target), run.path("export", f"{target}.json")
    inputs = {"bit_map": bit_map.digest, "model": table.digest, "rounding": rounding, "target": target}
    inputs |= {
        "choices": artifacts.digest_of(dict(choices)),
        "profile": artifacts.digest_of(profile_inputs(run, table)),
    }
    inputs["probes"] = artifacts.digest_of(run.config.allocate.target_probes)
    written = artifacts.is_current(stamp, "mpqsearch/export", inputs, overwrite=True)
    data = dict(artifacts.read_json(stamp, "mpqsearch/export").data) if written else {}
    found = data.get("verification")
    if found is not None and not found["ok"] and not again:
        written = False  # it was found wanting: make it anew
    if written and (not verify or (found is not None and not again)):
        run.say(f"export: reused {folder}")
        return Exported(target=target, paths=tuple(folder / name for name in data["files"]), data=data)
    if run.dry_run:
        run.say(f"export: would write {label} for {target}")
        return None
    exporter = get_exporter(target)
    needs = exporter.capabilities()
    if other := needs.untested():
        run.say(
            f"export: WARNING: {needs.requires} {other} was never tried with {target}, only {needs.tested}; go by "
            "what --verify finds"
        )
    if not written:
        provenance = {"map": label, "budget": budget.label(), "predicted_loss": solved["predicted_loss"]}
        job = _job(run, table, measured, exporter, bit_map, choices, provenance)
        stamp.unlink(missing_ok=True)
        with run.timed("export"):
            paths = exporter.write(folder, job)
        data = _written(table, exporter, job, label) | {"files": [p.relative_to(folder).as_posix() for p in paths]}
        artifacts.write_json(stamp, "mpqsearch/export", data, inputs)
        if data["lost_inputs"]:
            run.say(
                f"export: {target} says nothing of inputs: the map quantizes those of {data['lost_inputs']} layers, "
                "what is written none"
            )
        run.say(
            f"export: {folder} is written; not read back by its consumer"
            if not verify
            else f"export: {folder} is written"
        )
    if verify:
        data["verification"] = _verified(run, exporter, folder)
        artifacts.write_json(stamp, "mpqsearch/export", data, inputs)
    return Exported(target=target, paths=tuple(folder / name for name in data["files"]), data=data)


def _job(
    run: Run,
    table: LayerTable,
    measured: SensitivityProfile,
    exporter: Exporter,
    bit_map: BitMap,
    choices: Mapping[str, str],
    provenance: Mapping[str, Any],
) -> ExportJob:
    """What is exported: the map as it is where the target holds it, else rounded as ``export.rounding`` says."""
    from mpqsearch.export import ExportJob
    from mpqsearch.export.target import ConsumerTarget

    job = ExportJob(
        table=table,
        bit_map=bit_map,
        denoiser=run.denoiser,
        rounding=run.config.export.rounding,
        choices=choices,
        input_max=measured.input_max,
        moments=None if (stats := input_moments(run, table, bit_map)) is None else stats.moments(),
        inputs={"model": table.digest},
        provenance=provenance,
    )
    if choices or job.rounding != "resolve" or not isinstance(exporter, ConsumerTarget):
        return job
    if exporter.capabilities().granularity == "channel":
        return job  # it holds every width; what it cannot quantize stays at full precision
    if all(e.reason in ("exact", "kept_full_precision") for e in exporter.plan(replace(job, rounding="up"))):
        return job
    made = resolved_for(run, table, measured, exporter, bit_map)
    return replace(job, choices=made.asked())


def _written(table: LayerTable, exporter: Exporter, job: ExportJob, label: str) -> dict[str, Any]:
    """What ``export/<target>.json`` says before any consumer has looked."""
    from mpqsearch.export import lost_inputs, plan_table
    from mpqsearch.export.target import ConsumerTarget

    plan, lost = exporter.plan(job), lost_inputs(exporter, job.bit_map)
    promised = exporter.promise(job, plan) if isinstance(exporter, ConsumerTarget) else None
    return {
        "target": exporter.name,
        "map": label,
        "rounding": job.rounding,
        "rounded_layers": sum(e.reason not in ("exact", "kept_full_precision") for e in plan),
        "payload": exporter.capabilities().payload,
        "n_parameters": table.n_parameters,
        "ideal_bits": size_bits(table, job.bit_map),
        "accounted_bits": None if promised is None else promised.total,
        "lost_inputs": len(lost),
        "plan": plan_table(plan, lost),
        "verification": None,
    }


def _verified(run: Run, exporter: Exporter, folder: Path) -> dict[str, Any]:
    from mpqsearch.export.target import ConsumerTarget

    if isinstance(exporter, ConsumerTarget):
        exporter.require()  # an absent consumer can say nothing: that is an error, not a difference
    with run.timed("verify"):
        found = exporter.verify(folder)
    run.say(f"export: {found.summary()}")
    return found.to_data()


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, SIZE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def quantize(run: Run, table: LayerTable, measured: SensitivityProfile, method_name: str, budget: Budget) -> Path:
    """Write the fake-quantized model as a diffusers folder with its bit map."""
    method = run.config.method(method_name)
    bit_map, _ = allocation(run, table, measured, method, budget)
    folder = run.path("quantized", slug(method_name, budget))
    if run.dry_run:
        run.say(f"quantize: would write {folder}")
        return folder
    same_model(run, table)
    module = quantized_module(run, table, measured, bit_map, bias_correction=method.bias_correction)
    write_model_folder(run, folder, module, bit_map)
    run.say(f"quantize: {folder}")
    return folder


def write_model_folder(run: Run, folder: Path, module: Any, bit_map: BitMap) -> None:
    """A diffusers folder with decoded weights, and the bit map beside it. Raises `ConfigError` for modules that are not
    of diffusers."""
    if not hasattr(module, "save_pretrained"):
        raise ConfigError(f"{type(module).__name__} has no save_pretrained; use mpqsearch.quant from Python instead")
    from safetensors.torch import save

    names = run.denoiser.module.state_dict().keys()  # quantizers of activations are no part of a diffusers folder
    weights = {k: v.contiguous().clone() for k, v in module.state_dict().items() if k in names}
    with artifacts.atomic_write(folder / "diffusion_pytorch_model.safetensors") as handle:
        handle.write(save(weights, metadata={"format": "pt"}))
    artifacts.write_text(folder / "config.json", module.to_json_string())
    artifacts.write_text(folder / "scheduler_config.json", json_text(dict(run.denoiser.scheduler)))
    hints = {"n_classes": run.denoiser.n_classes, "null_class": run.denoiser.null_class}
    artifacts.write_text(folder / "denoiser.json", json_text(hints))
    artifacts.save_bit_map(folder / "bitmap.json", bit_map, {"model": bit_map.model_digest})
