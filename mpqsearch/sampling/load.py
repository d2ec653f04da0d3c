"""A denoiser from its source, with the runner that fits it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mpqsearch.errors import ConfigError, ModelError
from mpqsearch.models.calls import Calls
from mpqsearch.models.denoiser import Denoiser, check_finite, weights_digest
from mpqsearch.models.devices import resolve_device
from mpqsearch.models.loader import (
    LoadedPipeline,
    hints_of,
    load_part,
    load_pipeline,
    sample_shape_of,
    scheduler_config,
)
from mpqsearch.models.runner import Denoises, Runner
from mpqsearch.models.unwrap import plain_copy
from mpqsearch.prompts import Prompts, read_prompts
from mpqsearch.sampling.pipeline import PipelineRunner
from mpqsearch.sampling.plain import PlainRunner
from mpqsearch.sampling.recorded import RecordedRunner
from mpqsearch.sources import local_folder, model_name, read_config
from mpqsearch.specs import PromptsSpec, SamplerSpec


def load_model(
    source: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    dtype: str = "float32",
    component: str = "",
    sampler: SamplerSpec | None = None,
    prompts: Prompts | None = None,
    calls: Calls | None = None,
    encoded: Path | None = None,
) -> Denoiser:
    """Load a denoiser on ``device`` (``auto``, ``cpu``, ``cuda``, ``mps``; see `resolve_device`).

    source
        An embedded name (``fmnist-unet``, ``fmnist-dit``); a diffusers pipeline folder (with ``model_index.json``), of
        which the rest is loaded when something is first run; a diffusers model folder (with ``config.json`` and
        safetensors; a ``scheduler_config.json`` in it or in a sibling folder ``scheduler`` is used); ``owner/name`` of
        a hub pipeline; or ``package.module:function``, which returns a `Denoiser` (`adapt`) or a module with
        ``denoise(x, t, cond)`` and ``sample_shape``.
    dtype
        ``float32``, ``bfloat16``, ``float16``, or ``stored`` for that of the file.
    component
        Part of a pipeline, such as ``controlnet``; empty: its denoisers.
    sampler, prompts
        How samples are drawn, and what they show. What is left open comes from the files `sampler.json` and
        `prompts.txt` of a pipeline folder, where it has them: how its pictures are meant to be drawn.
    calls
        Recorded calls of the pipeline, which are then measured in the place of its run.
    encoded
        Folder for encoded prompts.

    Raises `ModelError` when the source does not exist, is damaged or incomplete, is a pickle, is quantized already, or
    is no denoiser, and `ConfigError` when the device is not there.
    """
    if (function := _function(source)) is not None:
        return _from_function(function, source, sampler=sampler, calls=calls)
    where = resolve_device(device)
    folder = local_folder(source)
    if folder is not None and not (folder / "model_index.json").is_file():
        module = load_part(folder, source, dtype=dtype, device=where, component=component)
        config = dict(getattr(module, "config", {}))
        return adapt(
            module,
            sample_shape=sample_shape_of(config),
            name=model_name(source),
            scheduler=scheduler_config(folder),
            source=source,
            sampler=sampler,
            calls=calls,
            **hints_of(folder, config),
        )
    if folder is not None:
        sampler, prompts = _as_meant(folder, sampler), prompts or _own_prompts(folder)
    pipeline = load_pipeline(source, dtype=dtype, device=where, component=component, revision=revision)
    runner = RecordedRunner(calls) if calls is not None else runner_of(pipeline, sampler, prompts, encoded)
    return _denoiser(pipeline.module, runner, name=model_name(source), source=source)


def _as_meant(folder: Path, spec: SamplerSpec | None) -> SamplerSpec | None:
    """A sampler with what it leaves open filled in from ``sampler.json``: steps, guidance, arguments of the call."""
    file = folder / "sampler.json"
    if not file.is_file():
        return spec
    meant, spec = read_config(file), spec or SamplerSpec()
    unknown = set(meant) - {"steps", "guidance", "call"}
    if unknown:
        raise ModelError(f"{file}: unknown key {min(unknown)!r}; it may hold steps, guidance and call")
    return replace(
        spec,
        steps=meant.get("steps") if spec.steps is None else spec.steps,
        guidance=meant.get("guidance") if spec.guidance is None else spec.guidance,
        call={**meant.get("call", {}), **spec.call},
    )


def _own_prompts(folder: Path) -> Prompts | None:
    """The prompts that came with a pipeline."""
    file = folder / "prompts.txt"
    return read_prompts(PromptsSpec(file=str(file))) if file.is_file() else None


def runner_of(
    pipeline: LoadedPipeline, sampler: SamplerSpec | None, prompts: Prompts | None, encoded: Path | None
) -> PipelineRunner:
    """The runner of a loaded pipeline."""
    return PipelineRunner(
        pipeline.open,
        pipeline.components,
        spec=sampler,
        prompts=prompts,
        n_classes=pipeline.n_classes,
        encoded=encoded,
        identity=pipeline.identity,
    )


def adapt(
    module: nn.Module,
    *,
    sample_shape: tuple[int, ...] = (),
    name: str = "custom",
    scheduler: Mapping[str, Any] | None = None,
    n_classes: int = 0,
    null_class: int | None = None,
    source: str = "",
    sampler: SamplerSpec | None = None,
    calls: Calls | None = None,
) -> Denoiser:
    """Wrap a module as a `Denoiser`.

    Any ``torch.nn.Module`` with a ``denoise(x, t, cond)`` method, a diffusers denoiser that takes a sample, a timestep
    and class labels (both need ``sample_shape``), or any module whatever with recorded ``calls``.

    The denoiser gets a copy of the structure (`plain_copy`) over the same memory of the weights: the module of the
    caller keeps its mode and its gradients. Raises `NumericsError` when a weight is not finite, `ModelError` when the
    module can be called in none of these ways, or when its weights are no plain numbers (LoRA, quantized, offloaded).
    """
    module = plain_copy(module)
    if calls is not None:
        return _denoiser(module, RecordedRunner(calls), name=name, source=source)
    _require_plain_call(module, sample_shape)
    runner = PlainRunner(sample_shape, spec=sampler, scheduler=scheduler, n_classes=n_classes, null_class=null_class)
    return _denoiser(module, runner, name=name, source=source)


def _denoiser(module: nn.Module, runner: Runner, *, name: str, source: str) -> Denoiser:
    check_finite(module, name)
    return Denoiser(name=name, module=module, runner=runner, digest=weights_digest(module), source=source)


def _require_plain_call(module: nn.Module, sample_shape: tuple[int, ...]) -> None:
    """Raise `ModelError` when the plain sampler cannot call a module, or does not know the shape of its samples."""
    kind = type(module).__name__
    if not isinstance(module, Denoises) and "timestep" not in inspect.signature(module.forward).parameters:
        raise ModelError(
            f"{kind} is no diffusers denoiser and has no method denoise(x, t, cond). Give it one, load the pipeline "
            "folder that it belongs to, or record calls of its pipeline with mpqsearch.models.capture."
        )
    if not sample_shape:
        raise ModelError(
            f"{kind}: its config has no sample_size or in_channels. Give sample_shape, load the pipeline folder that it "
            "belongs to, or record calls of its pipeline (mpqsearch record) and name the file in calibration.captured"
        )
    out = getattr(module, "config", {}).get("out_channels")
    if not isinstance(module, Denoises) and isinstance(out, int) and out not in (sample_shape[0], 2 * sample_shape[0]):
        raise ModelError(
            f"{kind} takes {sample_shape[0]} channels and predicts {out}: it takes more than the sample (a picture, a "
            "mask), which only its pipeline has. Record calls of the pipeline with mpqsearch.models.capture, or give it "
            "a method denoise(x, t, cond) that adds what is missing."
        )


def _function(source: str) -> Callable[[], Any] | None:
    """The function that ``package.module:function`` names; None when the source has another form."""
    package, sign, name = source.partition(":")
    if not sign or not all(part.isidentifier() for part in (*package.split("."), name)):
        return None
    try:
        found = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{source}: {error}. Give package.module:function of something that can be imported"
        ) from error
    if not callable(found):
        raise ModelError(f"{source} is a {type(found).__name__} and no function that returns the model")
    return found  # type: ignore[no-any-return]


def _from_function(
    function: Callable[[], Any], source: str, *, sampler: SamplerSpec | None, calls: Calls | None
) -> Denoiser:
    """What a function of the user's returns: a `Denoiser` as it is, or a module with ``denoise`` and ``sample_shape``."""
    made = function()
    if isinstance(made, Denoiser):
        if sampler not in (None, SamplerSpec()):
            raise ConfigError(f"{source} returned a Denoiser, which has a sampler of its own: leave [sampler] out")
        return made
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"{source} returned a {type(made).__name__}; a Denoiser (mpqsearch.adapt) or a module is needed"
        )
    return adapt(
        made,
        sample_shape=tuple(getattr(made, "sample_shape", ())),
        name=source.partition(":")[2],
        scheduler=getattr(made, "scheduler", None),
        n_classes=int(getattr(made, "n_classes", 0)),
        null_class=getattr(made, "null_class", None),
        source=source,
        sampler=sampler,
        calls=calls,
    )
