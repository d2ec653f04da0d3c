"""Load a denoiser: an embedded reference model, a diffusers model or pipeline folder, or a hub identifier. Safetensors
only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpqsearch.errors import ModelError, UnknownNameError
from mpqsearch.models.calls import Call
from mpqsearch.models.denoiser import DEFAULT_SCHEDULER, Denoiser, adapt
from mpqsearch.models.devices import resolve_device
from mpqsearch.models.files import Stored, check_keys, refuse_quantized, weight_files
from mpqsearch.sources import component_of, denoiser_folder, local_folder, model_name, read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "stored": None}


def load_model(
    source: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    dtype: str = "float32",
    component: str = "",
    calls: Sequence[Call] = (),
) -> Denoiser:
    """Load a denoiser on ``device`` (``auto``, ``cpu``, ``cuda``, ``mps``; see `resolve_device`).

    source
        An embedded name (``fmnist-unet``, ``fmnist-dit``); a folder with ``model_index.json`` (a diffusers pipeline, of
        which only the denoiser and the scheduler are read) or with ``config.json`` and safetensors (a diffusers model;
        a ``scheduler_config.json`` in it or in a sibling folder ``scheduler`` is used); or ``owner/name`` of a hub
        pipeline.
    dtype
        ``float32``, ``bfloat16``, ``float16``, or ``stored`` for that of the file.
    component
        Part of a pipeline, such as ``controlnet`` or ``transformer_2``; empty: the first of `COMPONENTS` that it has.
    calls
        Recorded calls of the pipeline (`capture`), for denoisers that need more than a sample, a time and class labels.

    Raises `ModelError` when the source does not exist, is damaged or incomplete, is a pickle, is quantized already, or
    is no denoiser, and `ConfigError` when the device is not there.
    """
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    how = _How(device=resolve_device(device), dtype=DTYPES[dtype], revision=revision, component=component, calls=calls)
    folder = local_folder(source)
    if folder is None:
        return _from_hub(source, how)
    if (folder / "model_index.json").is_file():
        return _from_pipeline(folder, source, how)
    return _from_model(folder, source, how)


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How a model is loaded: see `load_model`; ``dtype`` None keeps that of the file."""

    device: torch.device
    dtype: torch.dtype | None
    revision: str | None
    component: str
    calls: Sequence[Call]


def _from_model(folder: Path, source: str, how: _How) -> Denoiser:
    """A folder with ``config.json``."""
    folder = denoiser_folder(source, folder, how.component)
    module = _load(folder, how)
    schedulers = (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json")
    scheduler = next((read_config(p) for p in schedulers if p.is_file()), dict(DEFAULT_SCHEDULER))
    hints = read_config(folder / "denoiser.json") if (folder / "denoiser.json").is_file() else {}
    return _wrap(module, scheduler, hints, source, how)


def _from_pipeline(folder: Path, source: str, how: _How) -> Denoiser:
    """The denoiser and the scheduler of a pipeline folder; text encoders and autoencoders are not looked at."""
    index = read_config(folder / "model_index.json")
    part, class_name = component_of(index, how.component, source)
    module = _load(folder / part, how, class_name)
    has_scheduler = isinstance(index.get("scheduler"), list) and index["scheduler"][1]
    scheduler = _scheduler(str(folder), index["scheduler"][1], {}) if has_scheduler else dict(DEFAULT_SCHEDULER)
    return _wrap(module, scheduler, {}, source, how)


def _from_hub(source: str, how: _How) -> Denoiser:
    """The denoiser and the scheduler of ``owner/name``."""
    import diffusers

    try:
        index = dict(diffusers.DiffusionPipeline.load_config(source, revision=how.revision))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"cannot load the pipeline {source!r}: {type(error).__name__}: {reason}. It must be a folder or a hub "
            "identifier with safetensors weights; without a network only folders work."
        ) from error
    part, class_name = component_of(index, how.component, source)
    module = _pretrained(class_name, source, how.dtype or torch.float32, subfolder=part, revision=how.revision)
    has_scheduler = isinstance(index.get("scheduler"), (list, tuple)) and index["scheduler"][1]
    scheduler = (
        _scheduler(source, index["scheduler"][1], {"revision": how.revision})
        if has_scheduler
        else dict(DEFAULT_SCHEDULER)
    )
    return _wrap(module, scheduler, {}, source, how)


def _load(folder: Path, how: _How, class_name: str = "") -> nn.Module:
    """The module of a folder, after its files were looked at: all there, and not quantized."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it holds no diffusers model")
    config = read_config(folder / "config.json")
    refuse_quantized(folder, config)
    _denoiser_class(config.get("_class_name") or class_name, str(folder))
    files = weight_files(folder)
    stored = files.tensors()
    return _pretrained(
        config.get("_class_name") or class_name,
        str(folder),
        how.dtype or _stored_dtype(stored),
        stored=stored,
        variant=files.variant,
        local_files_only=True,
    )


def _denoiser_class(name: str, source: str) -> Any:
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ModelError(
            f"{source}: its config names the class {name!r}, which diffusers {diffusers.__version__} does not have"
        )
    return cls


def _pretrained(
    class_name: str, source: str, dtype: torch.dtype, *, stored: Mapping[str, Stored] | None = None, **where: Any
) -> nn.Module:
    """A module by diffusers' own loader, every value of which comes from the checkpoint.

    Raises `ModelError` when a key is missing: diffusers would leave it as it found the memory.
    """
    cls = _denoiser_class(class_name, source)
    try:
        with _quiet():
            module, info = cls.from_pretrained(
                source, use_safetensors=True, torch_dtype=dtype, output_loading_info=True, **where
            )
    except Exception as error:  # safetensors, diffusers and json raise many kinds; all of them mean a damaged folder
        raise ModelError(f"cannot load {source} as {class_name}: {error}") from error
    missing = {*info["missing_keys"], *(k for k, t in module.state_dict().items() if t.is_meta)}
    check_keys(source, missing, info["unexpected_keys"], stored or info["unexpected_keys"])
    return module  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of diffusers about keys: they are errors here, and named in one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _stored_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    """The type of most stored tensors; float32 when most are no floats."""
    ((dtype, _),) = Counter(place.dtype for place in stored.values()).most_common(1) or [(torch.float32, 0)]
    return dtype if dtype.is_floating_point else torch.float32


def _scheduler(source: str, class_name: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a pipeline's scheduler."""
    import diffusers

    try:
        cls = getattr(diffusers, class_name)
        return dict(cls.from_pretrained(source, subfolder="scheduler", **where).config)
    except Exception as error:
        raise ModelError(f"cannot load the scheduler of {source!r}: {error}") from error


def _wrap(
    module: nn.Module, scheduler: Mapping[str, Any], hints: Mapping[str, Any], source: str, how: _How
) -> Denoiser:
    config = dict(getattr(module, "config", {}))
    shape = sample_shape_of(config)
    if not shape and not len(how.calls):
        raise ModelError(
            f"{source}: its config has no sample_size or in_channels. Record calls of its pipeline "
            "(mpqsearch.models.capture, save_calls) and name the file in calibration.captured, or wrap the module with "
            "mpqsearch.models.adapt"
        )
    n_classes, null_class = classes_of(config)
    return adapt(
        module.to(how.device),
        sample_shape=shape,
        name=model_name(source),
        scheduler={k: v for k, v in scheduler.items() if not k.startswith("_diffusers")},
        n_classes=hints.get("n_classes", n_classes),
        null_class=hints.get("null_class", null_class),
        source=source,
        calls=how.calls,
    )


def sample_shape_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels and sizes of one sample, from a model's configuration; empty when it does not tell."""
    size, channels = config.get("sample_size"), config.get("in_channels")
    if not isinstance(channels, int) or not isinstance(size, (int, list, tuple)):
        return ()
    return (channels, *(map(int, size) if isinstance(size, (list, tuple)) else (size, size)))


def classes_of(config: Mapping[str, Any]) -> tuple[int, int | None]:
    """Number of classes and the null label, as far as the configuration tells."""
    if config.get("_class_name") == "DiTTransformer2DModel" or (
        "num_embeds_ada_norm" in config and config.get("norm_type") == "ada_norm_zero"
    ):
        n = int(config.get("num_embeds_ada_norm") or 0)
        return n, n  # the embedding table of DiT has one more row for the null class
    return int(config.get("num_class_embeds") or 0), None
