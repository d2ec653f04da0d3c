"""Which pipeline classes of the installed diffusers make their output from text, a class or noise alone."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import re

import diffusers

from tests.support.denoisers import subclasses

_CHANGES = re.compile(
    r"Img2Img|Inpaint|Control|Edit|LEdits|(?<!Text)ToVideo|ToAudio|Image2Video|I2I|(?<!T)I2V|Refine|Upsample|Upscale|SR|SuperRes|Adapter"
    r"|Pix2Pix|Layered|HDR|InContext|Emb2Emb|2ImgPipe|Kontext|Condition|Transfer|Fill|Cloze|ToWorld(?<!TextToWorld)|VACE|Variation"
)
"""Words of names of classes that begin from a picture, a video or a sound."""
_OWN = {"prompt", "class_labels"}


def pipeline_classes() -> dict[str, type[diffusers.DiffusionPipeline]]:
    """All pipelines of the installed diffusers that its authors still keep up, by name."""
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        with contextlib.suppress(Exception):  # helpers of some ask for libraries that are not here
            importlib.import_module(module.name)
    found = {c.__name__: c for c in subclasses(diffusers.DiffusionPipeline)}
    return {
        name: found[name]
        for name in sorted(found)
        if found[name].__module__.startswith("diffusers.pipelines.")
        and ".deprecated." not in found[name].__module__
        and not getattr(found[name], "_last_supported_version", None)
    }


def reason_against(cls: type[diffusers.DiffusionPipeline]) -> str:
    """Why a pipeline makes nothing from text, a class or noise alone; empty when it does."""
    takes = dict(list(inspect.signature(cls.__call__).parameters.items())[1:])
    needed = [n for n, p in takes.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    other = [n for n in needed if n not in _OWN]
    if other:
        return f"needs {', '.join(other)}"
    if found := _CHANGES.search(cls.__name__):
        return f"its name says that it begins from something given: {found.group()}"
    if cls.__name__.endswith("PriorPipeline"):
        return "makes embeddings for another pipeline"
    kind = takes.get("output_type")
    if kind is not None and kind.default == "text":
        return "makes text"
    return ""


def generators() -> dict[str, type[diffusers.DiffusionPipeline]]:
    """The pipelines that make their output from text, a class or noise alone, by name."""
    return {name: cls for name, cls in pipeline_classes().items() if not reason_against(cls)}


def kind_of(cls: type[diffusers.DiffusionPipeline]) -> str:
    """What it makes and from what: class, noise, audio, video, 3d or image."""
    takes = inspect.signature(cls.__call__).parameters
    if "prompt" not in takes:
        return "class" if "class_labels" in takes else "noise"
    if any("audio" in n or n == "num_waveforms_per_prompt" for n in takes) and "num_frames" not in takes:
        return "audio"
    if "frame_size" in takes:
        return "3d"
    return "video" if {"num_frames", "frames", "video_length"} & set(takes) else "image"
