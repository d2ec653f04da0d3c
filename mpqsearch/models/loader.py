"""Load a denoiser: an embedded reference model, a diffusers model or pipeline folder, or a hub identifier. Safetensors
only."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpqsearch.errors import ModelError, UnknownNameError
from mpqsearch.models.calls import Call
from mpqsearch.models.denoiser import DEFAULT_SCHEDULER, Denoiser, adapt
from mpqsearch.models.devices import resolve_device

REFERENCE = Path(__file__).parent / "reference"
EMBEDDED = ("fmnist-unet", "fmnist-dit")
"""Denoisers that ship with the package; see the model cards beside their weights."""

COMPONENTS = ("unet", "transformer", "prior", "decoder")
"""Parts of a pipeline that may be its denoiser, in the order in which they are looked for."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "stored": None}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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

    Raises `ModelError` when the source does not exist, is damaged, is a pickle, or is no denoiser.
    """
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    how = _How(device=resolve_device(device), dtype=DTYPES[dtype], revision=revision, component=component, calls=calls)
    if source in EMBEDDED:
        return _load_folder(REFERENCE / source, source, how)
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, path.resolve().name, how)
    if path.exists() or path.suffix in (*_PICKLES, ".safetensors"):
        raise ModelError(
            f"{source} is "
            f"{'a pickle checkpoint, which may run code when loaded' if path.suffix in _PICKLES else 'a single file'}. "
            "Give a diffusers folder with config.json and *.safetensors; "
            "model.save_pretrained(folder, safe_serialization=True) writes one."
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _from_pipeline(source, source.rsplit("/", 1)[-1], how)
    raise UnknownNameError("model", source, EMBEDDED, "It is no folder here and no owner/name of a hub either.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How a model is loaded: see `load_model`; ``dtype`` None keeps that of the file."""

    device: torch.device
    dtype: torch.dtype | None
    revision: str | None
    component: str
    calls: Sequence[Call]


def _load_folder(folder: Path, name: str, how: _How) -> Denoiser:
    if (folder / "model_index.json").is_file():
        return _from_pipeline(str(folder), name, how)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has neither config.json nor model_index.json: it is no diffusers model or pipeline folder"
        )
    _refuse_pickles(folder)
    config = _read_config(folder / "config.json")
    module = _build(config.get("_class_name", ""), str(folder), how)
    scheduler = next(
        (
            _read_config(p)
            for p in (folder / "scheduler_config.json", folder.parent / "scheduler/scheduler_config.json")
            if p.is_file()
        ),
        dict(DEFAULT_SCHEDULER),
    )
    hints = _read_config(folder / "denoiser.json") if (folder / "denoiser.json").is_file() else {}
    return _wrap(module, name, scheduler, hints, str(folder) if name not in EMBEDDED else name, how)


def _build(class_name: str, source: str, how: _How, **where: Any) -> nn.Module:
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ModelError(
            f"{source}: its config names the class {class_name!r}, which diffusers {diffusers.__version__} does not "
            "have"
        )
    where.setdefault("local_files_only", Path(source).is_dir())
    wanted = how.dtype or _stored_dtype(Path(source) / where.get("subfolder", ""))
    try:
        model: nn.Module = cls.from_pretrained(
            source, use_safetensors=True, torch_dtype=wanted, low_cpu_mem_usage=False, **where
        )
    except Exception as error:  # safetensors, diffusers and json raise many kinds; all of them mean a damaged folder
        raise ModelError(f"cannot load {source} as {class_name}: {error}") from error
    return model


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most tensors of the safetensors files in ``folder``; float32 when there are none to look at."""
    from safetensors import safe_open

    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118  (no mapping)
    most = found.most_common(1)
    return names.get(most[0][0], torch.float32) if most else torch.float32


def _from_pipeline(source: str, name: str, how: _How) -> Denoiser:
    """Only the denoiser and the scheduler of a pipeline: text encoders and autoencoders take memory and are not looked
    at."""
    local = Path(source).is_dir()
    index = _read_config(Path(source) / "model_index.json") if local else _hub_index(source, how.revision)
    parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    part = how.component or next((p for p in COMPONENTS if p in parts), "")
    if part not in parts:
        raise UnknownNameError(
            f"component of the pipeline {source!r} ({index.get('_class_name')})",
            part or "/".join(COMPONENTS),
            parts,
            "Name its denoiser.",
        )
    if local:
        _refuse_pickles(Path(source) / part)
    where = {"subfolder": part} if local else {"subfolder": part, "revision": how.revision, "local_files_only": False}
    module = _build(parts[part][1], source, how, **where)
    scheduler = dict(DEFAULT_SCHEDULER)
    if "scheduler" in parts:
        import diffusers

        try:
            scheduler = dict(
                getattr(diffusers, parts["scheduler"][1])
                .from_pretrained(source, **{**where, "subfolder": "scheduler"})
                .config
            )
        except Exception as error:
            raise ModelError(f"cannot load the scheduler of {source!r}: {error}") from error
    return _wrap(module, name, scheduler, {}, source, how)


def _hub_index(source: str, revision: str | None) -> dict[str, Any]:
    import diffusers

    try:
        return dict(diffusers.DiffusionPipeline.load_config(source, revision=revision))
    except Exception as error:
        raise ModelError(
            f"cannot load the pipeline {source!r}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. "
            "It must be a folder or a hub identifier with safetensors weights; without a network only folders work."
        ) from error


def _wrap(
    module: nn.Module, name: str, scheduler: dict[str, Any], hints: dict[str, Any], source: str, how: _How
) -> Denoiser:
    config = dict(getattr(module, "config", {}))
    size, channels = config.get("sample_size"), config.get("in_channels")
    shape: tuple[int, ...] = ()
    if size is not None and channels is not None:
        shape = (int(channels), *map(int, size if isinstance(size, (list, tuple)) else (size, size)))
    elif not len(how.calls):
        raise ModelError(
            f"{source}: its config has no sample_size or in_channels. Record calls of its pipeline "
            "(mpqsearch.models.capture, save_calls) and "
            "name the file in calibration.captured, or wrap the module with mpqsearch.models.adapt"
        )
    n_classes, null_class = _classes(config)
    return adapt(
        module.to(how.device),
        sample_shape=shape,
        name=name,
        scheduler={k: v for k, v in scheduler.items() if not k.startswith("_diffusers")},
        n_classes=hints.get("n_classes", n_classes),
        null_class=hints.get("null_class", null_class),
        source=source,
        calls=how.calls,
    )


def _classes(config: dict[str, Any]) -> tuple[int, int | None]:
    """Number of classes and the null label, as far as the configuration tells."""
    if config.get("_class_name") == "DiTTransformer2DModel" or (
        "num_embeds_ada_norm" in config and config.get("norm_type") == "ada_norm_zero"
    ):
        n = int(config.get("num_embeds_ada_norm") or 0)
        return n, n  # the embedding table of DiT has one more row for the null class
    return int(config.get("num_class_embeds") or 0), None


def _refuse_pickles(folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{folder} holds only pickle checkpoints ({', '.join(pickles[:3])}), which may run code when loaded. "
            "Convert them: "
            "load once where you trust them and call model.save_pretrained(folder, safe_serialization=True)."
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} should hold a JSON object")
    return data
