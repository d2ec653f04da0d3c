"""How a tiny pipeline is entered, built and called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers as d
import torch
from torch import nn

from mpqsearch.sampling.pipeline import decode_singly
from tests.support.denoisers import disturb

Built = tuple[d.DiffusionPipeline, dict[str, Any]]

TINY: dict[str, Callable[[], Built]] = {}
"""Pipelines that make their output from text, a class or noise alone."""

MISFITS: dict[str, Callable[[], Built]] = {}
"""Folders in which the pipeline class cannot run the model: the rest of the field reads them component by component."""

ALONE = {
    "AceStepPipeline": "its lyrics are those of one sample",
    "AudioLDM2Pipeline": "its language model reads on after the padding of prompts, which goes to the longest of the batch",
    "CogView4Pipeline": "pads prompts to the longest of the batch, and attends to the padding",
    "Cosmos3OmniPipeline": "makes one video a call",
    "DreamLitePipeline": "takes one prompt a call",
    "DreamLiteMobilePipeline": "takes one prompt a call",
    "GlmImagePipeline": "draws the first tokens of all samples from the first generator",
    "HeliosPyramidPipeline": "draws the noise of its later stages from the first generator",
    "Kandinsky3Pipeline": "pools over the padding of prompts, which goes to the longest of the batch",
    "Kandinsky5T2IPipeline": "pads prompts to the longest of the batch, and attends to the padding",
    "Kandinsky5T2VPipeline": "pads prompts to the longest of the batch, and attends to the padding",
    "LattePipeline": "cuts the padding of a prompt only when there is one prompt",
    "PRXPipeline": "with guidance, its timesteps are those of one sample",
    "PRXPixelPipeline": "with guidance, its timesteps are those of one sample",
}
"""Pipelines whose samples are right only when made one at a time, and why."""

NEEDS = {"OmniGenPipeline": "torchvision", "QwenImage21Pipeline": "torchvision"}
"""Libraries beside those of the extra ``pipelines`` that some ask for."""

STOPS: dict[str, tuple[str, str]] = {
    "AnyFlowFARPipeline": ("chained", "flexible attention has no backward pass on the CPU"),
    "Cosmos3OmniPipeline": ("trained", "its blocks give the tokens of one sample without a batch axis"),
    "KandinskyCombinedPipeline": ("chained", "runs two other pipelines, through which no gradient comes back"),
    "KandinskyV22CombinedPipeline": ("chained", "runs two other pipelines, through which no gradient comes back"),
    "SkyReelsV2DiffusionForcingPipeline": ("drawn", "each frame is stepped by a copy of the scheduler of its own"),
}
"""Pipelines that do not go all the way: the stage of `cover` that does not hold, and why. Any other is a failure."""

PROMPTS = ("a lighthouse", "two red cats", "a blue house by the sea", "rain on a tin roof")


def prompt_of(seed: int) -> str:
    """The prompt of the sample with this seed."""
    return PROMPTS[seed % len(PROMPTS)]


def arguments(pipe: d.DiffusionPipeline, call: Mapping[str, Any], seeds: tuple[int, ...]) -> dict[str, Any]:
    """All arguments for one batch: a generator, and a prompt or class, for each sample. Give them once: generators
    move on."""
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"output_type": "np"} | dict(call)
    given["generator"] = [torch.Generator().manual_seed(s) for s in seeds]
    if "prompt" in takes:
        prompts = [prompt_of(s) for s in seeds]
        alone = len(seeds) == 1 and type(pipe).__name__ in ALONE
        given["prompt"] = prompts[0] if alone else prompts
    if isinstance(given.get("negative_prompt"), str) and isinstance(given["prompt"], list):
        given["negative_prompt"] = [given["negative_prompt"]] * len(seeds)
    if "class_labels" in takes:
        given["class_labels"] = [s % 10 for s in seeds]
    if "batch_size" in takes:
        given["batch_size"] = len(seeds)
    return given


def tiny(name: str, *, into: dict[str, Callable[[], Built]] = TINY, **call: Any) -> Any:
    """Enters a function that makes a pipeline, with the arguments of its call."""

    def enter(make: Callable[[], d.DiffusionPipeline]) -> Callable[[], d.DiffusionPipeline]:
        @functools.wraps(make)
        def build() -> Built:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                pipe = make()
                for part in modules(pipe):
                    if type(part).__module__.startswith("diffusers.") and "autoencoder" not in type(part).__module__:
                        disturb(part)
                    part.eval().requires_grad_(False)
            decode_singly(getattr(pipe, "vae", None))
            pipe.set_progress_bar_config(disable=True)
            return pipe, dict(call)

        into[name] = build
        return make

    return enter


def modules(pipe: d.DiffusionPipeline) -> list[nn.Module]:
    """The modules among its components."""
    return [c for c in pipe.components.values() if isinstance(c, nn.Module)]


IMAGE: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16}
VIDEO: dict[str, Any] = IMAGE | {"num_frames": 9}
