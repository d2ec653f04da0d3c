"""Maps for other quantizers, and the fake-quantized model as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile, StudyRecord
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run, json_text, same_model, slug
from mpqsearch.stages.evaluating import quantized_module
from mpqsearch.stages.reporting import chosen_method, export_budget


def export(run: Run, table: LayerTable, measured: SensitivityProfile, records: list[StudyRecord]) -> list[Path]:
    """Write the chosen map for every configured target and let the consumer read it back."""
    from mpqsearch.export import ExportJob, get_exporter

    c = run.config.export
    budget = export_budget(run)
    method = chosen_method(run, records)
    bit_map, solved = allocation(run, table, measured, method, budget)
    written: list[Path] = []
    for target in c.targets:
        exporter = get_exporter(target)
        folder = run.path("export", target)
        inputs = {"bit_map": bit_map.digest, "model": table.digest, "rounding": c.rounding, "target": target}
        stamp = run.path("export", f"{target}.json")
        if artifacts.is_current(stamp, "mpqsearch/export", inputs, overwrite=True):
            run.say(f"export: reused {folder}")
            continue
        if run.dry_run:
            run.say(f"export: would write {method.name} at {budget.label()} for {target}")
            continue
        job = ExportJob(
            table=table,
            bit_map=bit_map,
            denoiser=run.denoiser,
            rounding=c.rounding,
            input_max=measured.input_max,
            inputs={"model": table.digest},
            provenance={"method": method.name, "budget": budget.label(), "predicted_loss": solved["predicted_loss"]},
        )
        with run.timed("export"):
            written += exporter.write(folder, job)
            verification = exporter.verify(folder)
        run.say(f"export: {verification.summary()}")
        if not verification.ok:
            raise ArtifactError(f"the export for {target} in {folder} was not read back as planned: see the lines above")
        artifacts.write_json(stamp, "mpqsearch/export", verification.to_data(), inputs)
    return written


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
    """A diffusers folder with decoded weights, and the bit map beside it. Raises `ConfigError` for modules that are not of diffusers."""
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
