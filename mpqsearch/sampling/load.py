"""A denoiser from its source, with the runner that fits it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpqsearch.errors import ConfigError, ModelError
from mpqsearch.models.calls import Calls
from mpqsearch.models.denoiser import Denoiser, check_finite, weights_digest
from mpqsearch.models.devices import resolve_device
from mpqsearch.models.loader import (
    downloaded,
    hints_of,
    load_part,
    load_pipeline,
    sample_shape_of,
    scheduler_config,
)
from mpqsearch.models.runner import Denoises, Runner, parts_of
from mpqsearch.models.unwrap import plain_copy
from mpqsearch.prompts import Prompts, read_prompts
from mpqsearch.sampling.pipeline import PipelineRunner
from mpqsearch.sampling.plain import PlainRunner
from mpqsearch.sampling.recorded import RecordedRunner
from mpqsearch.sources import denoiser_folders, is_function, kind_of, local_folder, model_name, read_config
from mpqsearch.specs import PromptsSpec, SamplerSpec
from mpqsearch.untrusted import build


def load_model(
    source: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    dtype: str = "float32",
    component: str | Sequence[str] = "",
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
        a hub pipeline; or ``package.module:function``, which returns a `Denoiser`, or a module with
        ``denoise(x, t, cond)`` and, as attributes, what `adapt` takes: ``sample_shape``, ``scheduler``, ``data_range``,
        ``n_classes``, ``null_class``.
    dtype
        ``float32``, ``bfloat16``, ``float16``, or ``stored`` for that of the file.
    component
        Part of a pipeline, such as ``controlnet``; empty: its denoisers. Several, denoisers, text encoders and
        autoencoder, are one model with several parts, such as ``("unet", "text_encoder")``.
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
    where, folder = resolve_device(device), local_folder(source)
    if is_function(source):
        return _from_function(source, where, sampler=sampler, prompts=prompts, calls=calls)
    if folder is not None and not (folder / "model_index.json").is_file():
        folder = denoiser_folders(source, folder, component)[""]
        module = load_part(folder, dtype=dtype, device=where)
        config = dict(getattr(module, "config", {}))
        return adapt(
            module,
            sample_shape=sample_shape_of(config),
            name=model_name(source),
            scheduler=scheduler_config(folder),
            source=source,
            sampler=sampler,
            prompts=prompts,
            calls=calls,
            **hints_of(folder, config),
        )
    folder = folder or downloaded(source, revision)
    sampler, prompts = _as_meant(folder, sampler), prompts or _own_prompts(folder)
    pipeline = load_pipeline(source, folder, dtype=dtype, device=where, component=component, whole=calls is None)
    if calls is not None and any(map(kind_of, pipeline.components)):
        raise ConfigError(
            f"recorded calls do not show what an error of text encoders and autoencoder of {source} does to a sample: "
            "leave them out, or let the pipeline run"
        )
    drawn = PipelineRunner(
        pipeline.open,
        pipeline.components,
        spec=sampler,
        prompts=prompts,
        n_classes=pipeline.n_classes,
        encoded=encoded,
        identity=pipeline.identity,
    )
    runner = drawn if calls is None else _recorded(calls, pipeline.module)
    return _denoiser(pipeline.module, runner, name=model_name(source), source=source)


def _as_meant(folder: Path, spec: SamplerSpec | None) -> SamplerSpec | None:
    """A sampler with what it leaves open filled in from ``sampler.json``: steps, guidance, arguments of the call."""
    file = folder / "sampler.json"
    if not file.is_file():
        return spec
    meant, spec = build(_Meant, read_config(file), str(file), ModelError), spec or SamplerSpec()
    return replace(
        spec,
        steps=meant.steps if spec.steps is None else spec.steps,
        guidance=meant.guidance if spec.guidance is None else spec.guidance,
        call={**meant.call, **spec.call},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meant:
    """What ``sampler.json`` may say."""

    steps: int | None = None
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


def _own_prompts(folder: Path) -> Prompts | None:
    """The prompts that came with a pipeline."""
    file = folder / "prompts.txt"
    return read_prompts(PromptsSpec(file=str(file))) if file.is_file() else None


def adapt(
    module: nn.Module,
    *,
    sample_shape: tuple[int, ...] = (),
    name: str = "custom",
    scheduler: Mapping[str, Any] | None = None,
    data_range: tuple[float, float] | None = None,
    n_classes: int = 0,
    null_class: int | None = None,
    source: str = "",
    sampler: SamplerSpec | None = None,
    prompts: Prompts | None = None,
    calls: Calls | None = None,
) -> Denoiser:
    """Wrap a module as a `Denoiser`.

    Any ``torch.nn.Module`` with a ``denoise(x, t, cond)`` method, a diffusers denoiser that takes a sample, a timestep
    and class labels (both need ``sample_shape``, and to be sampled ``scheduler``), or any module whatever with recorded
    ``calls``. The other arguments are those of `PlainRunner`. A module with a sampler of its own comes as
    ``Denoiser(name=..., module=..., runner=...)``, whose runner does what `mpqsearch.models.Runner` says.

    The denoiser gets a copy of the structure (`plain_copy`) over the same memory of the weights: the module of the
    caller keeps its mode and its gradients. Raises `NumericsError` when a weight is not finite, `ModelError` when the
    module can be called in none of these ways, or when its weights are no plain numbers (LoRA, quantized, offloaded).
    """
    module = plain_copy(module)
    if calls is not None:
        return _denoiser(module, _recorded(calls, module), name=name, source=source)
    _require_plain_call(module, sample_shape)
    runner = PlainRunner(
        sample_shape,
        spec=sampler,
        prompts=prompts,
        scheduler=scheduler,
        data_range=data_range,
        n_classes=n_classes,
        null_class=null_class,
    )
    return _denoiser(module, runner, name=name, source=source)


def _recorded(calls: Calls, module: nn.Module) -> RecordedRunner:
    """Raises `ModelError` when calls of one denoiser are to stand for several, or the other way round."""
    recorded, needed = {call.part for call in calls}, set(parts_of(module))
    if recorded and recorded != needed:
        shown = [", ".join(sorted(names)) if any(names) else "a single denoiser" for names in (needed, recorded)]
        raise ModelError(
            f"calls of {shown[0]} are needed, and those of {shown[1]} were recorded. `mpqsearch record` records all "
            "denoisers of a pipeline; model.component names one of them."
        )
    return RecordedRunner(calls)


def _denoiser(module: nn.Module, runner: Runner, *, name: str, source: str) -> Denoiser:
    check_finite(module, name)
    return Denoiser(name=name, module=module, runner=runner, digest=weights_digest(module), source=source)


def _require_plain_call(module: nn.Module, sample_shape: tuple[int, ...]) -> None:
    """Raise `ModelError` when the plain sampler cannot call a module, or does not know the shape of its samples."""
    kind = type(module).__name__
    way_out = "load the pipeline folder that it belongs to, or record calls of its pipeline"
    if not isinstance(module, Denoises) and "timestep" not in inspect.signature(module.forward).parameters:
        raise ModelError(
            f"{kind} is no diffusers denoiser and has no method denoise(x, t, cond). Give it one, {way_out} "
            "(mpqsearch.models.capture)"
        )
    if not sample_shape:
        raise ModelError(
            f"{kind}: its config has no sample_size or in_channels. Give sample_shape, {way_out} (mpqsearch record) "
            "and name the file in calibration.captured"
        )
    out = getattr(module, "config", {}).get("out_channels")
    if not isinstance(module, Denoises) and isinstance(out, int) and out not in (sample_shape[0], 2 * sample_shape[0]):
        raise ModelError(
            f"{kind} takes {sample_shape[0]} channels and predicts {out}: it takes more than the sample (a picture, a "
            f"mask), which only its pipeline has. Record calls of the pipeline (mpqsearch.models.capture), or give it "
            "a method denoise(x, t, cond) that adds what is missing."
        )


def _from_function(
    source: str,
    device: torch.device,
    *,
    sampler: SamplerSpec | None,
    prompts: Prompts | None,
    calls: Calls | None,
) -> Denoiser:
    """What ``package.module:function`` returns: a `Denoiser` with the runner that it has, or a module with ``denoise``,
    whose attributes say the rest."""
    made = _called(source)
    if isinstance(made, nn.Module):
        names = ("sample_shape", "scheduler", "data_range", "n_classes", "null_class")
        given = {name: getattr(made, name) for name in names if hasattr(made, name)}
        return adapt(
            made.to(device),
            name=model_name(source),
            source=source,
            sampler=sampler,
            prompts=prompts,
            calls=calls,
            **given,
        )
    if not isinstance(made, Denoiser):
        raise ModelError(
            f"{source} returned a {type(made).__name__}; a Denoiser (mpqsearch.sampling.adapt) or a module is needed"
        )
    if sampler not in (None, SamplerSpec()) or prompts is not None:
        raise ConfigError(
            f"{source} returned a Denoiser, which has a sampler of its own: leave [sampler] and [prompts] out, or "
            "return the module"
        )
    module = plain_copy(made.module).to(device)
    runner = made.runner if calls is None else _recorded(calls, module)
    return _denoiser(module, runner, name=model_name(source), source=source)


def imported(source: str) -> Any:
    """What ``package.module:function`` names. Modules are looked for in the folder of work, too."""
    package, _, name = source.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{source}: {error}. It must be package.module:function of something that can be imported here"
        ) from error
    return found


def _called(source: str) -> Any:
    """What the function of a source returns."""
    function = imported(source)
    if not callable(function):
        raise ModelError(f"{source} is a {type(function).__name__} and no function that returns the model")
    return function()
