"""Load denoisers and the pipelines around them: folders of diffusers, or hub identifiers. Safetensors only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpqsearch.artifacts import digest_of
from mpqsearch.errors import ModelError, UnknownNameError
from mpqsearch.models.files import Stored, check_keys, refuse_quantized, weight_files
from mpqsearch.models.runner import Parts
from mpqsearch.models.unwrap import plain_copy
from mpqsearch.sources import denoiser_folder, denoisers_of, local_folder, read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "stored": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPipeline:
    """The denoisers of a pipeline, loaded, and how to open the rest.

    ``module`` is the denoiser, or the `Parts`; ``components`` its names in the pipeline. ``open`` loads text encoders,
    autoencoder and scheduler around denoisers by component name.
    """

    module: nn.Module
    components: tuple[str, ...]
    open: Callable[[Mapping[str, nn.Module]], Any]
    n_classes: int
    identity: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How a model is loaded; ``dtype`` None keeps that of the file."""

    device: torch.device
    dtype: torch.dtype | None
    revision: str | None = None


def how(dtype: str, device: torch.device, revision: str | None = None) -> _How:
    """Settings of a loader by their names. Raises `UnknownNameError` for an unknown type."""
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    return _How(device=device, dtype=DTYPES[dtype], revision=revision)


def load_part(folder: Path, source: str, *, dtype: str, device: torch.device, component: str = "") -> nn.Module:
    """The module of a model folder with ``config.json``, or of one component of a pipeline folder."""
    settings = how(dtype, device)
    return _load(denoiser_folder(source, folder, component), settings).to(device)


def load_pipeline(
    source: str, *, dtype: str, device: torch.device, component: str = "", revision: str | None = None
) -> LoadedPipeline:
    """The denoisers of a pipeline folder or of ``owner/name`` of a hub.

    Raises `ModelError` for a class that the installed diffusers does not have, and what loading a denoiser raises.
    """
    settings, folder = how(dtype, device, revision), local_folder(source)
    index = read_config(folder / "model_index.json") if folder is not None else _hub_index(source, settings)
    components = denoisers_of(index, component, source)
    loaded = {name: _component(source, folder, name, kind, settings) for name, kind in components.items()}
    parts = {name: plain_copy(part.to(device)) for name, part in loaded.items()}
    single = next(iter(parts.values()))
    module = Parts(parts) if len(parts) > 1 else single
    return LoadedPipeline(
        module=module,
        components=tuple(components),
        open=_opener(source, folder, index, next(iter(loaded.values())).dtype, settings),
        n_classes=classes_of(dict(getattr(single, "config", {})))[0],
        identity={
            "pipeline": str(index.get("_class_name")),
            "scheduler": _scheduler_digest(source, folder, index, settings),
        },
    )


def _opener(
    source: str, folder: Path | None, index: Mapping[str, Any], dtype: torch.dtype, settings: _How
) -> Callable[[Mapping[str, nn.Module]], Any]:
    cls = _diffusers_class(str(index.get("_class_name")), source)
    left_out = {n: None for n in ("safety_checker", "feature_extractor") if n in index and "safety_checker" in index}
    variant = _variant(folder)

    def open_pipeline(parts: Mapping[str, nn.Module]) -> Any:
        try:
            with _quiet():
                return cls.from_pretrained(
                    str(folder or source),
                    torch_dtype=dtype,
                    use_safetensors=True,
                    variant=variant,
                    local_files_only=folder is not None,
                    **({"revision": settings.revision} if folder is None else {}),
                    **left_out,
                    **parts,
                )
        except Exception as error:  # diffusers, transformers and safetensors raise many kinds
            raise ModelError(
                f"cannot load the pipeline {source}: {type(error).__name__}: {error}. {_advice()}"
            ) from error

    return open_pipeline


def _advice() -> str:
    """What is missing where a pipeline with a text encoder cannot be loaded."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "Its text encoders need transformers, which is not installed: pip install 'mpqsearch[pipelines]'."
    return "Folders must hold every component with safetensors weights; without a network only folders work."


def _variant(folder: Path | None) -> str | None:
    """The variant (``fp16``) of a pipeline folder's files, where they all have one."""
    if folder is None:
        return None
    names = {p.name for p in folder.glob("*/*.safetensors")}
    variants = {n.split(".")[-2] for n in names if n.count(".") > 1 and not n.split(".")[-2].isdigit()}
    return variants.pop() if len(variants) == 1 and all(n.count(".") > 1 for n in names) else None


def _component(source: str, folder: Path | None, name: str, kind: str, settings: _How) -> nn.Module:
    if folder is not None:
        return _load(folder / name, settings, kind)
    return _pretrained(kind, source, settings.dtype or torch.float32, subfolder=name, revision=settings.revision)


def _hub_index(source: str, settings: _How) -> dict[str, Any]:
    import diffusers

    try:
        return dict(diffusers.DiffusionPipeline.load_config(source, revision=settings.revision))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"cannot load the pipeline {source!r}: {type(error).__name__}: {reason}. It must be a folder or a hub "
            "identifier with safetensors weights; without a network only folders work."
        ) from error


def scheduler_config(folder: Path) -> dict[str, Any] | None:
    """The scheduler beside a model folder, or None."""
    files = (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json")
    found = next((read_config(p) for p in files if p.is_file()), None)
    return None if found is None else {k: v for k, v in found.items() if not k.startswith("_diffusers")}


def hints_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Number of classes and the null label: from ``denoiser.json`` beside a model, else from its configuration."""
    n_classes, null_class = classes_of(config)
    hints = read_config(folder / "denoiser.json") if (folder / "denoiser.json").is_file() else {}
    return {"n_classes": hints.get("n_classes", n_classes), "null_class": hints.get("null_class", null_class)}


def _load(folder: Path, settings: _How, class_name: str = "") -> nn.Module:
    """The module of a folder, after its files were looked at: all there, and not quantized."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it holds no diffusers model")
    config = read_config(folder / "config.json")
    refuse_quantized(folder, config)
    _diffusers_class(config.get("_class_name") or class_name, str(folder))
    files = weight_files(folder)
    stored = files.tensors()
    return _pretrained(
        config.get("_class_name") or class_name,
        str(folder),
        settings.dtype or _stored_dtype(stored),
        stored=stored,
        variant=files.variant,
        local_files_only=True,
    )


def _diffusers_class(name: str, source: str) -> Any:
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
    cls = _diffusers_class(class_name, source)
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


def _scheduler_digest(source: str, folder: Path | None, index: Mapping[str, Any], settings: _How) -> str:
    """Digest of the class and the configuration of a pipeline's scheduler."""
    import diffusers

    entry = index.get("scheduler")
    if not isinstance(entry, (list, tuple)) or not entry[1]:
        return "none"
    cls = getattr(diffusers, str(entry[1]), None)
    if cls is None:
        raise ModelError(
            f"{source}: its scheduler is a {entry[1]}, which diffusers {diffusers.__version__} does not have"
        )
    try:
        where = {} if folder is not None else {"revision": settings.revision}
        config = dict(cls.load_config(str(folder or source), subfolder="scheduler", **where))
    except Exception as error:
        raise ModelError(f"cannot load the scheduler of {source!r}: {error}") from error
    return digest_of([entry[1], {k: v for k, v in config.items() if not k.startswith("_")}])


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
