"""Train the quantized student of one map, and measure it before and after."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget
from mpqsearch.errors import ArtifactError, NumericsError
from mpqsearch.methods import MethodSpec
from mpqsearch.progress import bar_of
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run, same_model, slug
from mpqsearch.stages.preflight import check_sampling
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.quantizing import write_model_folder
from mpqsearch.stages.references import SHOWN, key_frames, reference
from mpqsearch.stages.reuse import METRICS, current, reuse_or_make
from mpqsearch.stages.statistics import activation_table, moment_inputs, statistics_for

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpqsearch.distill import Processes
    from mpqsearch.metrics import Reference
    from mpqsearch.quant import QuantizedModel

KEYS = ("fd_fp", "fd_data", "paired_psnr", "class_accuracy", "attributes_recognised", "clip_score", "paired_mse")
"""Metrics that the stage prints."""


def distill(run: Run, method_name: str, budget: Budget) -> dict[str, Any]:
    """Train the student of ``method_name`` at ``budget``, write it to ``distilled/`` and measure it before and after.

    Files: ``train.jsonl``, checkpoints, a diffusers folder of the trained model with its bit map, ``codes.safetensors``
    (integer codes, scales, zero points and biases), ``activations.json`` (learned scales, where activations are
    quantized) and
    ``metrics.json``, whose data is returned: ``before``, ``after`` and, where the student is checked, ``checks``, step
    and distance of each. The same call continues an interrupted training. Raises `SystemExit` with 128 plus the
    signal's number after a signal.
    """
    run.config.check_trainable()
    if not run.reads_only:
        check_sampling(run, "training on trajectories of the sampler (distill)")
    method = run.config.method(method_name)
    bit_map, _ = allocation(run, method, budget)
    folder = run.path("distilled", slug(method_name, budget))
    task = _Training(
        run=run,
        bit_map=bit_map,
        bias_correction=method.bias_correction,
        folder=folder,
        inputs=_inputs(run, bit_map, bias_correction=method.bias_correction),
    )
    path = folder / "metrics.json"
    if run.dry_run and not artifacts.is_current(path, METRICS.schema, task.inputs, overwrite=run.overwrite):
        steps = run.config.distill.steps
        run.say(f"distill: would train {method_name} at {budget.label()} for {steps} steps into {folder}")
        return {}
    return dict(reuse_or_make(run, METRICS, path, task.inputs, lambda: _trained(task), stage="distill"))


def trained_data(run: Run, method: MethodSpec, budget: Budget) -> dict[str, Any] | None:
    """What `distill` returned for a method and a budget in this run folder; None when nothing was trained there from
    what is there now."""
    path = run.path("distilled", slug(method.name, budget), "metrics.json")
    if not path.exists():  # the map, which may take minutes, is not made only to find nothing
        return None
    bit_map, _ = allocation(run, method, budget)
    return current(METRICS, path, _inputs(run, bit_map, bias_correction=method.bias_correction))


def trained_model(run: Run, method: MethodSpec, budget: Budget) -> QuantizedModel:
    """The student that `distill` wrote, without quantizers of inputs: its codes, and the model that they decode to.

    Raises `ArtifactError` for a file that lacks a part, as those of earlier versions do.
    """
    import copy

    from mpqsearch.quant import QuantizedModel, QuantizedRows, RowQuantizer, weight_of
    from mpqsearch.quant.apply import owners_of

    file = run.path("distilled", slug(method.name, budget), CODES)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in artifacts.read_tensors(file).items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    bit_map, _ = allocation(run, method, budget)
    module = copy.deepcopy(run.denoiser.module).requires_grad_(False)
    owners, rows = owners_of(module, run.table), {}
    for name, found in parts.items():
        owner: Any = owners[name][0]
        if not {"codes", "scale", "zero", "bits"} <= set(found) or (owner.bias is not None) != ("bias" in found):
            raise ArtifactError(f"{file} lacks a part of {name!r}: train again (mpqsearch distill --overwrite)")
        ternary = bit_map.format_of(name).ternary
        quantizer = RowQuantizer(scale=found["scale"], zero=found["zero"], bits=found["bits"], ternary=ternary)
        floats = {part: found.get(part) for part in ("factor", "full_rows")}
        rows[name] = QuantizedRows(codes=found["codes"], quantizer=quantizer, **floats)
        owner.weight.copy_(weight_of(rows[name].rows(), run.table[name]))
        if owner.bias is not None:
            owner.bias.copy_(found["bias"])
    return QuantizedModel(module=module, bit_map=bit_map, rows=rows)


CODES = "codes.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """One map whose student is trained, and where its files go."""

    run: Run
    bit_map: BitMap
    bias_correction: bool
    folder: Path
    inputs: Mapping[str, str]


def _trained(task: _Training) -> dict[str, Any]:
    """Train, write the student, and measure it; what ``metrics.json`` holds."""
    from mpqsearch.distill import processes
    from mpqsearch.quant import convert

    run = task.run
    team = processes()  # before the model is loaded: each process gets a GPU of its own
    same_model(run)
    student = _student(task)
    base = before = None
    if team.main:
        base = reference(run)
        before = _measure(run, convert(student).module, base, "before training")
    team.wait()
    with run.timed("distill"):
        _train(task, student, team)
    if base is None:  # files are written by the main process
        raise SystemExit(0)
    trained = convert(student)
    _write(run, task.folder, trained)
    after = _measure(run, trained.module, base, "after training", task.folder / "samples.npz")
    data: dict[str, Any] = {"before": before, "after": after}
    if run.config.distill.check_every:
        data["checks"] = _checks(run, task.folder / "train.jsonl")
    run.say(f"distill: {task.folder}, trained in {run.seconds['distill']:.0f} s")
    return data


def _student(task: _Training) -> nn.Module:
    from mpqsearch.quant import build_student

    run, c = task.run, task.run.config.distill
    statistics = statistics_for(run, task.bit_map)
    return build_student(
        run.denoiser.module,
        run.table,
        task.bit_map,
        statistics=statistics,
        bias_correction=task.bias_correction,
        activations=activation_table(run, task.bit_map, statistics),
        trainable=c.trainable,  # type: ignore[arg-type]
        rank=c.rank,
        seed=c.seed,
    )


def _inputs(run: Run, bit_map: BitMap, *, bias_correction: bool) -> dict[str, str]:
    """Digests of all that a trained student depends on."""
    training = run.config.to_data()["distill"]
    for key in ("checkpoint_every", "methods", "budgets"):  # what changes no number
        del training[key]
    inputs = profile_inputs(run) | {
        "bit_map": bit_map.digest,
        "bias_correction": str(bias_correction),
        "activations": "none",
        "distill": artifacts.digest_of(training),
        "evaluate": artifacts.digest_of(run.evaluation_inputs),
    }
    if bit_map.activations:
        inputs |= run.digests("activations")
    return inputs | (moment_inputs(run) if bit_map.format.rounding != "nearest" else {})


def _train(task: _Training, student: nn.Module, team: Processes) -> None:
    """Run the loop behind a progress bar; end the program when a signal ended the loop."""
    from mpqsearch.distill import Trajectories
    from mpqsearch.distill import distill as loop
    from mpqsearch.quant import param_groups

    run, c = task.run, task.run.config.distill
    source = Trajectories(run.denoiser, batch=c.batch, seed=c.seed, rank=team.rank, world=team.world)
    states = loop(
        student,
        param_groups(student, **c.rates),
        source,
        c,
        folder=task.folder,
        inputs=_checkpoint_inputs(task),
        overwrite=run.overwrite,
        processes=team,
        measure=_checking(run),
    )
    with bar_of("distill", c.steps, unit="step") as bar:
        for state in states:
            bar.update(state.step - bar.n)
            best = f", best check {state.best[1]:.3g} at {state.best[0]}" if state.best else ""
            bar.set_postfix_str(f"loss {state.loss:.4g}, rate {state.rate:.2f}{best}")
            if state.interrupted:
                run.say(
                    f"distill: interrupted after step {state.step} of {state.steps}; saved. The same command continues."
                )
                raise SystemExit(128 + state.signal)


def _checkpoint_inputs(task: _Training) -> dict[str, str]:
    """Digests of what a checkpoint depends on beside the loop's own settings."""
    c = task.run.config.distill
    names = ("model", "calibration", "quantizer", "activations", "bit_map", "bias_correction")
    inputs = {name: task.inputs[name] for name in names}
    if c.check_every:
        inputs["check"] = artifacts.digest_of([c.check_samples, c.check_seed, task.run.evaluation_inputs])
    return inputs


def _checking(run: Run) -> Callable[[nn.Module], float]:
    """What a student is checked by on the development seeds of ``[distill]``: its Fréchet distance to full precision,
    or the squared error of its latents where samples are no pictures. Full precision is run once."""
    import torch

    from mpqsearch.metrics import FeatureStatistics, features_of, frechet_distance
    from mpqsearch.quant import convert
    from mpqsearch.sampling import samples

    seeds, pictures = tuple(run.config.distill.check_seeds), run.picture is not None

    def drawn(module: nn.Module) -> torch.Tensor:
        batches = samples(run.denoiser.with_module(module), seeds, decode=pictures)
        return features_of(batches, run.extractor) if pictures else torch.cat([b.latents for b in batches])

    @functools.cache
    def full_precision() -> torch.Tensor:
        return drawn(run.denoiser.module)

    def measure(student: nn.Module) -> float:
        expected = full_precision()
        try:
            made = drawn(convert(student).module)
        except NumericsError:  # a student that has diverged
            return math.inf
        if not pictures:
            return float((made - expected).square().mean())
        return frechet_distance(FeatureStatistics.of(expected), FeatureStatistics.of(made))

    return measure


def _checks(run: Run, log: Path) -> list[list[float | None]]:
    """Step and distance of every check of a training, in order; says which student was kept."""
    from mpqsearch.distill.loop import read_log

    found = [(line["step"], line["check"]) for line in read_log(log) if "check" in line]
    checks = [(step, math.inf if value is None else value) for step, value in found]
    best, last, c = min(checks, key=lambda check: (check[1], check[0])), checks[-1], run.config.distill
    what = "squared error" if run.picture is None else f"FD[{run.extractor.label}]-{c.check_samples}"
    run.say(
        f"distill: kept the student of step {best[0]} of {c.steps}, {what} vs FP on development seeds {best[1]:.4g} "
        f"(last step: {last[1]:.4g})"
    )
    return [[step, value if math.isfinite(value) else None] for step, value in checks]


def _measure(run: Run, module: nn.Module, base: Reference, label: str, kept: Path | None = None) -> dict[str, Any]:
    """The metrics of a module; ``kept`` is the file of its first pictures, for the report."""
    from mpqsearch.metrics import evaluate
    from mpqsearch.sampling import samples

    with bar_of(label, len(base.seeds)) as bar:
        made = samples(run.denoiser.with_module(module), base.seeds, progress=bar.update)
        result = evaluate(made, base, keep=0 if kept is None else SHOWN)
    if kept is not None and result.images is not None:
        artifacts.write_arrays(kept, {"images": key_frames(result.images).numpy()})
    return {k: v.to_data() for k, v in result.metrics.items()}


def _write(run: Run, folder: Path, trained: Any) -> None:
    """The trained student: a diffusers folder where the model is of diffusers, and always the integer codes."""
    from safetensors.torch import save

    from mpqsearch.models.runner import parts_of
    from mpqsearch.quant import activation_table_of
    from mpqsearch.quant.apply import owners_of

    if all(hasattr(part, "save_pretrained") for part in parts_of(run.denoiser.module).values()):
        write_model_folder(run, folder, trained.module, trained.bit_map)
    else:
        artifacts.save_bit_map(folder / "bitmap.json", trained.bit_map, {"model": run.table.digest})
    tensors: dict[str, Any] = {}
    owners = owners_of(trained.module, run.table)
    for name, rows in trained.rows.items():
        parts = {
            "codes": rows.codes,
            "scale": rows.quantizer.scale,
            "zero": rows.quantizer.zero,
            "bits": rows.quantizer.bits,
            "factor": rows.factor,
            "full_rows": rows.full_rows,
            "bias": owners[name][0].bias,
        }
        tensors |= {
            f"{name}/{key}": value.detach().cpu().contiguous() for key, value in parts.items() if value is not None
        }
    with artifacts.atomic_write(folder / CODES) as handle:
        handle.write(save(tensors))
    learned = activation_table_of(trained.module, run.table)
    if learned is not None:
        artifacts.write_json(
            folder / "activations.json", "mpqsearch/activations", learned.to_data(), {"model": run.table.digest}
        )
