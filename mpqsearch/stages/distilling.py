"""Train the quantized student of one map, and measure it before and after."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.progress import bar_of
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run, same_model, slug
from mpqsearch.stages.exporting import write_model_folder
from mpqsearch.stages.gptq import moment_inputs
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.references import activation_table, correction_of, reference

if TYPE_CHECKING:
    from torch import nn

    from mpqsearch.distill import Processes, TeacherSource
    from mpqsearch.metrics import FeatureExtractor, Reference
    from mpqsearch.quant import ActivationTable

KEYS = ("fd_fp", "fd_data", "paired_psnr", "class_accuracy")
"""Metrics that the stage prints."""


def distill(
    run: Run, table: LayerTable, measured: SensitivityProfile, method_name: str, budget: Budget
) -> dict[str, Any]:
    """Train the student of ``method_name`` at ``budget``, write it to ``distilled/`` and measure it before and after.

    Files: ``train.jsonl``, checkpoints, a diffusers folder of the trained model with its bit map, ``codes.safetensors``
    (integer codes, scales and zero points), ``activations.json`` (learned scales, where activations are quantized) and
    ``metrics.json``, whose data is returned: ``before``, ``after`` and, where the student is checked, ``checks``, step
    and distance of each. The same call continues an interrupted training. Raises `SystemExit` with 128 plus the
    signal's number after a signal.
    """
    run.require_sampler("training on trajectories of the sampler (distill)")
    method = run.config.method(method_name)
    bit_map, _ = allocation(run, table, measured, method, budget)
    folder = run.path("distilled", slug(method_name, budget))
    inputs = _inputs(run, table, bit_map) | {"bias_correction": str(method.bias_correction)}
    if bit_map.format.rounding != "nearest":
        inputs |= moment_inputs(run, table)
    path = folder / "metrics.json"
    if artifacts.is_current(path, "mpqsearch/metrics", inputs, overwrite=run.overwrite):
        run.say(f"distill: reused {folder}")
        return dict(artifacts.read_json(path, "mpqsearch/metrics").data)
    if run.dry_run:
        run.say(
            f"distill: would train {method_name} at {budget.label()} for {run.config.distill.steps} steps into {folder}"
        )
        return {}
    from mpqsearch.distill import processes
    from mpqsearch.quant import build_student, convert

    team = processes()  # before the model is loaded: each process gets a GPU of its own
    same_model(run, table)

    input_max = _tensors(measured.input_max)
    activations = activation_table(run, table, bit_map, input_max)
    student = build_student(
        run.denoiser.module,
        table,
        bit_map,
        input_max=input_max,
        activations=activations,
        trainable=run.config.distill.trainable,  # type: ignore[arg-type]
        rank=run.config.distill.rank,
        seed=run.config.distill.seed,
        **correction_of(run, table, measured, bit_map, bias_correction=method.bias_correction),
    )
    extractor = run.extractor
    base = before = None
    if team.main:
        base, _ = reference(run, table)
        before = _measure(run, convert(student).module, base, extractor, "before training")
    team.wait()
    with run.timed("distill"):
        _train(run, student, activations, folder, inputs, team, _checking(run, extractor))
    if base is None:  # files are written by the main process
        raise SystemExit(0)
    trained = convert(student)
    _write(run, folder, trained, table)
    data: dict[str, Any] = {"before": before, "after": _measure(run, trained.module, base, extractor, "after training")}
    if run.config.distill.check_every:
        checks = _checks(folder / "train.jsonl")
        data["checks"] = [[step, value if math.isfinite(value) else None] for step, value in checks]
        best, last = min(checks, key=lambda c: (c[1], c[0])), checks[-1]
        run.say(
            f"distill: kept the student of step {best[0]} of {run.config.distill.steps}, "
            f"FD[{extractor.label}]-{run.config.distill.check_samples} "
            f"vs FP on development seeds {best[1]:.4g} (last step: {last[1]:.4g})"
        )
    artifacts.write_json(path, "mpqsearch/metrics", data, inputs)
    run.say(f"distill: {folder}, trained in {run.seconds['distill']:.0f} s")
    return data


def _inputs(run: Run, table: LayerTable, bit_map: BitMap) -> dict[str, str]:
    """Digests of all that a trained student depends on."""
    c = run.config.to_data()
    logs = ("checkpoint_every", "keep_last", "tensorboard", "methods", "budgets")  # what changes no number
    training = {k: v for k, v in c["distill"].items() if k not in logs}
    return profile_inputs(run, table) | {
        "bit_map": bit_map.digest,
        "activations": artifacts.digest_of(c["activations"]) if bit_map.activations else "none",
        "distill": artifacts.digest_of(training),
        "evaluate": artifacts.digest_of(run.evaluation_inputs),
    }


def _train(
    run: Run,
    student: nn.Module,
    activations: ActivationTable | None,
    folder: Path,
    inputs: Mapping[str, str],
    team: Processes,
    checking: Callable[[nn.Module], float],
) -> None:
    """Run the loop behind a progress bar; end the program when a signal ended the loop."""
    from mpqsearch.distill import distill as loop
    from mpqsearch.quant import param_groups

    c = run.config.distill
    source = _teacher(run, student, team.rank, team.world)
    if activations is not None and activations.timesteps and set(activations.timesteps) != set(source.timesteps):
        raise ConfigError(
            f"the activation scales are for the timesteps {list(activations.timesteps)}, the training's sampler has "
            f"{sorted(source.timesteps)}: use the same number of sampler steps for both, or static scales"
        )
    groups = param_groups(
        student,
        lora_lr=c.lora_lr,
        weight_lr=c.weight_lr,
        weight_scale_lr=c.weight_scale_lr,
        activation_scale_lr=c.activation_scale_lr,
        lr_factor=c.lr_factor,
    )
    digests = {k: inputs[k] for k in ("model", "calibration", "quantizer", "activations", "bit_map", "bias_correction")}
    if c.check_every:
        digests["check"] = artifacts.digest_of([c.check_samples, c.check_seed, run.evaluation_inputs])
    with bar_of("distill", c.steps, unit="step") as bar:
        for state in loop(
            run.denoiser,
            student,
            groups,
            source,
            c,
            folder=folder,
            inputs=digests,
            overwrite=run.overwrite,
            processes=team,
            measure=checking,
        ):
            bar.update(state.step - bar.n)
            best = f", best check {state.best[1]:.3g} at {state.best[0]}" if state.best else ""
            bar.set_postfix_str(f"loss {state.loss:.4g}, rate {state.rate:.2f}{best}")
            if state.interrupted:
                run.say(
                    f"distill: interrupted after step {state.step} of {state.steps}; saved. The same command continues."
                )
                raise SystemExit(128 + state.signal)


def _checking(run: Run, extractor: FeatureExtractor) -> Callable[[nn.Module], float]:
    """Fréchet distance of a student to full precision on the development seeds of ``[distill]``, whose full-precision
    samples are made once."""
    from mpqsearch.metrics import Reference, distance_to_full_precision
    from mpqsearch.quant import convert
    from mpqsearch.sampling import sample, to_uint8

    seeds = tuple(run.config.distill.check_seeds)

    @functools.cache
    def full_precision() -> Reference:
        samples = sample(run.denoiser, seeds, run.config.sampler)
        return Reference(samples=samples, features=extractor(to_uint8(samples)), seeds=seeds, labels=None)

    def measure(student: nn.Module) -> float:
        samples = sample(run.denoiser.with_module(convert(student).module), seeds, run.config.sampler)
        return distance_to_full_precision(samples, full_precision(), extractor)

    return measure


def _checks(log: Path) -> list[tuple[int, float]]:
    """Step and distance of every check of a training, in order."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(int(d["step"]), float(d["check"])) for d in lines if "check" in d]


def _teacher(run: Run, student: nn.Module, rank: int, world: int) -> TeacherSource:
    from mpqsearch.distill import CachedTrajectories, Trajectories, find_feature_module

    c = run.config.distill
    feature = (c.relation.feature or find_feature_module(student)) if c.relation.weight > 0 else ""
    source = Trajectories(
        run.denoiser,
        run.config.sampler,
        batch=c.batch,
        seed=c.seed,
        feature=feature,
        pooled_size=c.relation.pooled_size,
        rank=rank,
        world=world,
    )
    return CachedTrajectories(source, run.path("teacher"), c.cached) if c.cached else source


def _measure(run: Run, module: nn.Module, base: Reference, extractor: FeatureExtractor, label: str) -> dict[str, Any]:
    from mpqsearch.metrics import evaluate
    from mpqsearch.sampling import sample

    with bar_of(label, len(base.seeds)) as bar:
        samples = sample(run.denoiser.with_module(module), base.seeds, run.config.sampler, progress=bar.update)
    return {k: v.to_data() for k, v in evaluate(samples, base, extractor).metrics.items()}


def _write(run: Run, folder: Path, trained: Any, table: LayerTable) -> None:
    """The trained student: a diffusers folder where the model is of diffusers, and always the integer codes."""
    from safetensors.torch import save

    from mpqsearch.quant import activation_table_of

    if hasattr(run.denoiser.module, "save_pretrained"):
        write_model_folder(run, folder, trained.module, trained.bit_map)
    else:
        artifacts.save_bit_map(folder / "bitmap.json", trained.bit_map, {"model": table.digest})
    tensors: dict[str, Any] = {}
    for name, rows in trained.rows.items():
        parts = {
            "codes": rows.codes,
            "scale": rows.quantizer.scale,
            "zero": rows.quantizer.zero,
            "bits": rows.quantizer.bits,
            "factor": rows.factor,
            "full_rows": rows.full_rows,
        }
        tensors |= {f"{name}/{key}": value.cpu().contiguous() for key, value in parts.items() if value is not None}
    with artifacts.atomic_write(folder / "codes.safetensors") as handle:
        handle.write(save(tensors))
    learned = activation_table_of(trained.module, table)
    if learned is not None:
        artifacts.write_json(
            folder / "activations.json", "mpqsearch/activations", learned.to_data(), {"model": table.digest}
        )


def _tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    return {k: torch.from_numpy(np.array(v)) for k, v in values.items()}
