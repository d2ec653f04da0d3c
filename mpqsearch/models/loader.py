"""Load denoisers and the pipelines around them: folders of diffusers, or hub identifiers. Safetensors only."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from mpqsearch.artifacts import digest_of
from mpqsearch.errors import ModelError, UnknownNameError, install
from mpqsearch.models.devices import float_dtype
from mpqsearch.models.files import Stored, check_keys, check_shapes, keys_in, refuse_quantized, weight_files
from mpqsearch.models.runner import Parts
from mpqsearch.models.unwrap import plain_copy
from mpqsearch.sources import components_of, denoisers_of, is_encoder, read_config
from mpqsearch.untrusted import build, quoted, read_bytes

log = logging.getLogger("mpqsearch")

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


def _how(dtype: str, device: torch.device) -> _How:
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    return _How(device=device, dtype=DTYPES[dtype])


def load_part(folder: Path, *, dtype: str, device: torch.device) -> nn.Module:
    """The module of a model folder with ``config.json``."""
    return _load(folder, _how(dtype, device)).to(device)


def load_pipeline(
    source: str,
    folder: Path,
    *,
    dtype: str,
    device: torch.device,
    component: str | Sequence[str] = "",
    whole: bool = True,
) -> LoadedPipeline:
    """The denoisers of a pipeline folder, and the text encoders that ``component`` names with them. With ``whole`` it
    must be possible to open the rest, which is found out before weights are read.

    Raises `ModelError` for a pipeline or a component that the installed libraries do not have, and what loading a
    denoiser raises.
    """
    settings, index = _how(dtype, device), read_config(folder / "model_index.json")
    components = denoisers_of(index, component, source)
    if whole:
        with _quiet():
            _check_components(index, source, folder)
    with _quiet():
        encoders = _modules(folder, {n: kind for n, kind in components.items() if is_encoder(n)}, settings)
    loaded = {n: _load(folder / n, settings, kind) for n, kind in components.items() if n not in encoders} | encoders
    parts = {name: plain_copy(part.to(device)) for name, part in loaded.items()}
    single = next(iter(parts.values()))
    return LoadedPipeline(
        module=Parts(parts) if len(parts) > 1 else single,
        components=tuple(components),
        open=_opener(source, folder, index, float_dtype(single)),
        n_classes=classes_of(dict(getattr(single, "config", {})))[0],
        identity=_identity(folder, index),
    )


def downloaded(source: str, revision: str | None) -> Path:
    """The folder into which diffusers puts a pipeline of a hub, as far as it has safetensors weights."""
    import diffusers

    here = not _answers(source, revision)
    try:
        with _quiet():
            return Path(
                diffusers.DiffusionPipeline.download(
                    source, revision=revision, use_safetensors=True, local_files_only=here
                )
            )
    except Exception as error:  # huggingface_hub, requests and diffusers raise many kinds
        raise ModelError(
            f"cannot load the pipeline {source!r}: {_reason(error)}. It must be a folder or a hub identifier with "
            "safetensors weights; without a network only folders work."
        ) from error


ANSWERS_S = 10
"""Seconds in which a hub must answer; each of the many requests of a download would wait for it by itself."""


def _answers(source: str, revision: str | None) -> bool:
    """Whether the hub answers, with whatever: if not, only what was downloaded before can be loaded."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(source, revision=revision, timeout=ANSWERS_S)
    except HfHubHTTPError:
        return True
    except Exception as error:  # noqa: BLE001 - of the library that makes requests, which differs by version
        log.warning("the hub does not answer (%s): looking for %s on this disk", _reason(error), source)
        return False
    return True


def _check_components(index: Mapping[str, Any], source: str, folder: Path) -> None:
    """Raise `ModelError` when a pipeline is made of what is not installed, of code of its own, or of components that
    are not there or whose configurations are no such files."""
    import diffusers

    parts = components_of(index)
    needing = next((name for name, (library, _) in parts.items() if library == "transformers"), None)
    if needing is not None and importlib.util.find_spec("transformers") is None:
        # First of all: without it diffusers has no such pipeline either.
        raise ModelError(f"{source}: its {needing} needs transformers, which is not installed: {install('pipelines')}")
    unused = _left_out(index, diffusers_class(str(index.get("_class_name")), source, "DiffusionPipeline"))
    for name, (library, kind) in parts.items():
        if name not in unused:
            _check_files(folder / name, source, needed=library == "transformers")
        if library == "diffusers":
            diffusers_class(kind, source, "Part")
        elif library != "transformers" and not hasattr(diffusers.pipelines, library):
            raise ModelError(
                f"{source}: its {name} is a {kind} of {library!r}, which is neither diffusers nor transformers but "
                "code that comes with the model; it is not run here. Run the pipeline where you trust it, record "
                "its calls (mpqsearch.models.capture) and name the file in calibration.captured."
            )


def _check_files(folder: Path, source: str, *, needed: bool) -> None:
    """Look at the folder of one component without its weights; some pipelines make their scheduler themselves."""
    if needed and not folder.is_dir():
        raise ModelError(f"cannot load the pipeline {source}: {folder.name} is no folder in it. {_EVERY_COMPONENT}")
    for file in folder.glob("*config.json"):
        read_bytes(file, ModelError)
        if file.name == "config.json":
            read_config(file)
        if file.name == "scheduler_config.json":
            check_scheduler(read_config(file), file)


_EVERY_COMPONENT = "Its folder must hold every component that model_index.json names, with safetensors weights."


def _left_out(index: Mapping[str, Any], pipeline: Any) -> list[str]:
    """The safety checker of a pipeline, where its authors let it go, and what only that needs."""
    may_go = "requires_safety_checker" in inspect.signature(pipeline.__init__).parameters
    names = ("safety_checker", "feature_extractor") if may_go and "safety_checker" in components_of(index) else ()
    return [name for name in names if name in index]


def _opener(
    source: str, folder: Path, index: Mapping[str, Any], dtype: torch.dtype
) -> Callable[[Mapping[str, nn.Module]], Any]:
    variants = [v for name in components_of(index) for v in _only_variants(folder / name)]

    def open_pipeline(parts: Mapping[str, nn.Module]) -> Any:
        pipeline = diffusers_class(str(index.get("_class_name")), source, "DiffusionPipeline")
        left_out = dict.fromkeys(_left_out(index, pipeline))
        if left_out:
            log.warning("%s: its safety checker is switched off: it blacks out pictures", source)
        # Saved as none, such as the T5 of a Stable Diffusion 3: diffusers wants to hear it again.
        left_out |= {n: None for n, pair in index.items() if pair == [None, None]}
        beside = {n: kind for n, (_, kind) in components_of(index).items() if n not in {*parts, *left_out}}
        try:
            with _quiet():
                return pipeline.from_pretrained(
                    str(folder),
                    torch_dtype=dtype,
                    use_safetensors=True,
                    variant=next(iter(variants), None),  # where a component has it
                    local_files_only=True,
                    **left_out,
                    **_modules(folder, beside, _How(device=torch.device("cpu"), dtype=dtype)),
                    **parts,
                )
        except Exception as error:  # diffusers, transformers and safetensors raise many kinds
            reason = str(error).rstrip(".") if isinstance(error, ModelError) else _reason(error)
            raise ModelError(f"cannot load the pipeline {source}: {reason}. {_EVERY_COMPONENT}") from error

    return open_pipeline


def _modules(folder: Path, kinds: Mapping[str, str], settings: _How) -> dict[str, nn.Module]:
    """Components with weights, by name, read as a denoiser is: diffusers would give random or no values to what is
    missing, and build whatever a configuration asks for. Others are left to it."""
    import diffusers

    transformers: Any = importlib.import_module("transformers") if importlib.util.find_spec("transformers") else None
    found = {}
    for name, kind in kinds.items():
        own, theirs = getattr(diffusers, kind, None), getattr(transformers, kind, None)
        if isinstance(own, type) and issubclass(own, diffusers.ModelMixin):
            found[name] = _load(folder / name, settings, kind)
        elif isinstance(theirs, type) and issubclass(theirs, transformers.PreTrainedModel):
            found[name] = _load_encoder(folder / name, theirs, settings)
    return found


def _load_encoder(folder: Path, kind: Any, settings: _How) -> nn.Module:
    """A model of transformers, within the bounds that its files set. Raises `ModelError` when a key is missing."""
    stored = keys_in(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with _bounded(SPARE_MODULES + 20 * len(stored), SPARE_BYTES + 8 * size):
        module, info = kind.from_pretrained(
            str(folder),
            dtype=settings.dtype or "auto",
            use_safetensors=True,
            variant=next(iter(_only_variants(folder)), None),
            local_files_only=True,
            output_loading_info=True,
        )
    check_keys(str(folder), info["missing_keys"], (), stored)
    return module  # type: ignore[no-any-return]


_VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$")


def _only_variants(folder: Path) -> list[str]:
    """The variants of a component's weights, such as ``fp16``, where there are none without."""
    found = [_VARIANT.search(p.name) for p in sorted(folder.glob("*.safetensors"))]
    return [match[1] for match in found if match] if all(found) else []


def _reason(error: Exception) -> str:
    """An error of another library in one line, with its kind."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}".rstrip(".")


def scheduler_config(folder: Path) -> dict[str, Any] | None:
    """The scheduler beside a model folder, or None."""
    files = (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json")
    file = next((p for p in files if p.is_file()), None)
    if file is None:
        return None
    found = read_config(file)
    check_scheduler(found, file)
    return {k: v for k, v in found.items() if not k.startswith("_diffusers")}


MAX_TIMES = 1_000_000
"""Training timesteps of a scheduler, which holds several values for each."""


def check_scheduler(config: Mapping[str, Any], file: Path) -> None:
    """Raise `ModelError` for a scheduler of no or too many timesteps."""
    times = config.get("num_train_timesteps", 1)
    if type(times) is not int or not 1 <= times <= MAX_TIMES:
        raise ModelError(f"{file}: num_train_timesteps should be 1..{MAX_TIMES:,}, got {quoted(times)}")


def hints_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Number of classes, the null label and the range of the data: from ``denoiser.json`` beside a model, else from its
    configuration and the range of diffusers."""
    n_classes, null_class = classes_of(config)
    file = folder / "denoiser.json"
    hints = build(_Hints, read_config(file), str(file), ModelError) if file.is_file() else _Hints()
    return {
        "n_classes": hints.get("n_classes", n_classes),
        "null_class": hints.get("null_class", null_class),
        "data_range": hints.get("data_range", (-1.0, 1.0)),
    }


class _Hints(TypedDict, total=False):
    """What ``denoiser.json`` may say."""

    n_classes: int
    null_class: int | None
    data_range: tuple[float, float] | None


def _load(folder: Path, settings: _How, class_name: str = "") -> nn.Module:
    """The module of a folder by diffusers' own loader, after its files were looked at: all there, and not quantized.

    Raises `ModelError` when a key is missing: diffusers would leave it as it found the memory.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it holds no diffusers model")
    config = read_config(folder / "config.json")
    refuse_quantized(folder, config)
    name = str(config.get("_class_name") or class_name)
    cls, files = diffusers_class(name, str(folder)), weight_files(folder)
    stored = files.tensors()
    check_shapes(str(folder), structure(folder, config, len(stored), class_name).state_dict(), stored)
    try:
        with _quiet():
            module, info = cls.from_pretrained(
                str(folder),
                use_safetensors=True,
                torch_dtype=settings.dtype or _stored_dtype(stored),
                output_loading_info=True,
                variant=files.variant,
                local_files_only=True,
            )
    except Exception as error:  # safetensors, diffusers and json raise many kinds; all of them mean a damaged folder
        raise ModelError(f"cannot load {folder} as {name}: {_reason(error)}") from error
    missing = {*info["missing_keys"], *(k for k, t in module.state_dict().items() if t.is_meta)}
    check_keys(str(folder), missing, info["unexpected_keys"], stored)
    return module  # type: ignore[no-any-return]


def diffusers_class(name: str, source: str, kind: str = "ModelMixin") -> Any:
    """A class of the installed diffusers that is a ``kind``: ``ModelMixin``, ``DiffusionPipeline``, or a ``Part`` that
    pipelines are made of. Raises `ModelError` for any other name: a folder may name what runs code of its own."""
    import diffusers

    with _quiet():  # the first class that is read imports torchao
        cls: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    kinds = (diffusers.ModelMixin, diffusers.SchedulerMixin, diffusers.ConfigMixin)
    bases = kinds if kind == "Part" else (getattr(diffusers, kind),)
    known = isinstance(cls, type) and issubclass(cls, bases) and cls not in (*kinds, diffusers.DiffusionPipeline)
    if not known or (kind != "DiffusionPipeline" and issubclass(cls, diffusers.DiffusionPipeline)):
        what = {"ModelMixin": "model", "DiffusionPipeline": "pipeline"}.get(kind, "model or scheduler")
        raise ModelError(f"{source}: its class {quoted(name)} is no {what} of diffusers {diffusers.__version__}")
    return cls


SPARE_MODULES = 2_000
"""Modules that a model may have beyond those that its stored tensors account for."""

SPARE_BYTES = 1 << 30
"""Memory that building the structure of a model may take, beside its weights."""


def structure(folder: Path, config: Mapping[str, Any], n_tensors: int, class_name: str = "") -> nn.Module:
    """The module of a folder on the device ``meta``, within bounds: a configuration that asks for many more modules
    than there are ``n_tensors`` stored, or for much memory, raises `ModelError` in seconds."""
    name = str(config.get("_class_name") or class_name)
    cls = diffusers_class(name, str(folder))
    try:
        with (
            _quiet(),
            torch.device("meta"),
            _bounded(SPARE_MODULES + 20 * n_tensors),
            bounded_memory(SPARE_BYTES),
        ):
            module: nn.Module = cls.from_config(dict(config))
    except Exception as error:
        raise ModelError(f"cannot build {name} from {folder}/config.json: {_reason(error)}") from error
    return module


@contextmanager
def _bounded(modules: int, values: float = math.inf) -> Iterator[None]:
    """At most so many modules, and so many values of parameters, are put into others while the block runs; those that
    are put there again count again."""
    left = {"modules": float(modules), "values of parameters": values}

    def take(what: str, n: int) -> None:
        left[what] -= n
        if left[what] < 0:
            raise ModelError(f"its configuration asks for far more {what} than its weights are for")

    handles = (
        register_module_module_registration_hook(lambda _module, _name, _child: take("modules", 1)),
        register_module_parameter_registration_hook(
            lambda _module, _name, weight: take("values of parameters", 0 if weight is None else weight.numel())
        ),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """At most ``more`` bytes beyond those that the process has now; a request for others raises `MemoryError`. Where
    the system has no such limit, nothing is limited."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more
    bounds = [limit] + [b for b in (soft, hard) if b != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of diffusers and transformers and without their warnings: what is wrong with keys is an
    error here, named in one line. Without those of torchao, too, which diffusers imports where it is installed: they
    are about kernels of other machines."""
    names = ("diffusers", "transformers") if importlib.util.find_spec("transformers") else ("diffusers",)
    loggers = [importlib.import_module(f"{name}.utils.logging") for name in names]
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    torchaos = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in torchaos]
    for torchao in torchaos:
        torchao.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        for logger, (verbosity, shown) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if shown:
                logger.enable_progress_bar()
        for torchao, level in zip(torchaos, levels, strict=True):
            torchao.setLevel(level)


def _stored_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    """The type of most stored tensors; float32 when most are no floats."""
    ((dtype, _),) = Counter(place.dtype for place in stored.values()).most_common(1) or [(torch.float32, 0)]
    return dtype if dtype.is_floating_point else torch.float32


def _identity(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The pipeline's class, and a digest of its scheduler's class and configuration."""
    file, (_, kind) = folder / "scheduler" / "scheduler_config.json", components_of(index).get("scheduler", ("", ""))
    config = read_config(file) if file.is_file() else {}
    known = digest_of([kind, {k: v for k, v in config.items() if not k.startswith("_")}])
    return {"pipeline": str(index.get("_class_name")), "scheduler": known if kind else "none"}


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
        n = _count(config, "num_embeds_ada_norm")
        return n, n  # the embedding table of DiT has one more row for the null class
    return _count(config, "num_class_embeds"), None


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0
