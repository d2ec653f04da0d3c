"""Load a denoiser: an embedded reference model, a diffusers model or pipeline folder, or a hub identifier. Safetensors only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpqsearch.errors import ModelError, UnknownNameError
from mpqsearch.models.denoiser import DEFAULT_SCHEDULER, Denoiser, adapt

REFERENCE = Path(__file__).parent / "reference"
EMBEDDED = ("fmnist-unet", "fmnist-dit")
"""Denoisers that ship with the package; see the model cards beside their weights."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_model(source: str, *, device: str = "cpu", revision: str | None = None) -> Denoiser:
    """Load a denoiser in float32 on ``device``.

    source
        An embedded name (``fmnist-unet``, ``fmnist-dit``); a folder with ``model_index.json`` (a diffusers pipeline; its
        ``unet`` or ``transformer`` is taken) or with ``config.json`` and safetensors (a diffusers model; a
        ``scheduler_config.json`` in it or in a sibling folder ``scheduler`` is used); or ``owner/name`` of a hub pipeline.

    Raises `ModelError` when the source does not exist, is damaged, is a pickle, or is no denoiser.
    """
    if source in EMBEDDED:
        return _load_folder(REFERENCE / source, source, device)
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, path.resolve().name, device)
    if path.exists() or path.suffix in (*_PICKLES, ".safetensors"):
        raise ModelError(
            f"{source} is {'a pickle checkpoint, which may run code when loaded' if path.suffix in _PICKLES else 'a single file'}. "
            "Give a diffusers folder with config.json and *.safetensors; "
            "model.save_pretrained(folder, safe_serialization=True) writes one."
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _from_pipeline(source, source.rsplit("/", 1)[-1], device, revision)
    raise UnknownNameError("model", source, EMBEDDED, "It is no folder here and no owner/name of a hub either.")


def _load_folder(folder: Path, name: str, device: str) -> Denoiser:
    if (folder / "model_index.json").is_file():
        return _from_pipeline(str(folder), name, device, None)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has neither config.json nor model_index.json: it is no diffusers model or pipeline folder")
    _refuse_pickles(folder)
    config = _read_config(folder / "config.json")
    module = _build(config.get("_class_name", ""), folder)
    scheduler = next(
        (
            _read_config(p)
            for p in (folder / "scheduler_config.json", folder.parent / "scheduler/scheduler_config.json")
            if p.is_file()
        ),
        dict(DEFAULT_SCHEDULER),
    )
    hints = _read_config(folder / "denoiser.json") if (folder / "denoiser.json").is_file() else {}
    return _wrap(module, name, scheduler, hints, str(folder) if name not in EMBEDDED else name, device)


def _build(class_name: str, folder: Path) -> nn.Module:
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ModelError(
            f"{folder}/config.json names the class {class_name!r}, which diffusers {diffusers.__version__} does not have"
        )
    try:
        model: nn.Module = cls.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    except Exception as error:  # safetensors, diffusers and json raise many kinds; all of them mean a damaged folder
        raise ModelError(f"cannot load {folder} as {class_name}: {error}") from error
    return model


def _from_pipeline(source: str, name: str, device: str, revision: str | None) -> Denoiser:
    import diffusers

    if Path(source).is_dir():
        for part in ("unet", "transformer"):
            _refuse_pickles(Path(source) / part)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            source, use_safetensors=True, torch_dtype=torch.float32, revision=revision
        )
    except Exception as error:
        raise ModelError(
            f"cannot load the pipeline {source!r}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
            "It must be a folder or a hub identifier with safetensors weights; without a network only folders work."
        ) from error
    module = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(module, nn.Module):
        raise ModelError(f"the pipeline {source!r} ({type(pipe).__name__}) has neither a unet nor a transformer")
    return _wrap(module, name, dict(pipe.scheduler.config), {}, source, device)


def _wrap(module: nn.Module, name: str, scheduler: dict[str, Any], hints: dict[str, Any], source: str, device: str) -> Denoiser:
    config = dict(getattr(module, "config", {}))
    size = config.get("sample_size")
    channels = config.get("in_channels")
    if size is None or channels is None:
        raise ModelError(
            f"{source}: its config has no sample_size or in_channels; wrap the module with mpqsearch.models.adapt instead"
        )
    spatial = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    n_classes, null_class = _classes(config)
    return adapt(
        module.float().to(device),
        sample_shape=(int(channels), *map(int, spatial)),
        name=name,
        scheduler={k: v for k, v in scheduler.items() if not k.startswith("_diffusers")},
        n_classes=hints.get("n_classes", n_classes),
        null_class=hints.get("null_class", null_class),
        source=source,
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
            f"{folder} holds only pickle checkpoints ({', '.join(pickles[:3])}), which may run code when loaded. Convert them: "
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
