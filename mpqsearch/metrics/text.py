"""CLIP score: how well a picture fits its prompt, by a CLIP in a local folder; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpqsearch.errors import ModelError, install
from mpqsearch.metrics.scorers import Scorer
from mpqsearch.models import REFERENCE
from mpqsearch.models.runner import Label
from mpqsearch.sources import read_config

CLIP = "fmnist-clip"
"""The embedded CLIP, which knows the captions of the embedded pipelines and nothing else."""

PARTS = ("config.json", "preprocessor_config.json")
"""Files that a CLIP folder must have beside its weights and its tokenizer."""


def clip_folder(name: str | Path) -> Path:
    """The folder of a CLIP: the embedded one by name, or a folder that ``save_pretrained`` of `transformers` wrote.

    Raises `ModelError` when it is none.
    """
    folder = REFERENCE / CLIP if str(name) == CLIP else Path(name).expanduser()
    missing = next((part for part in PARTS if not (folder / part).is_file()), None)
    if missing is not None:
        raise ModelError(
            f"the CLIP {str(name)!r} has no {missing}: give a local folder of transformers (CLIPModel, its tokenizer "
            f"and its image processor, each written by save_pretrained), or {CLIP!r}, which reads captions of the "
            "embedded pipelines"
        )
    kind = read_config(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ModelError(f"{folder} holds a model of the type {kind!r}; a text score needs one of the type 'clip'")
    return folder


def clip_files(name: str | Path) -> dict[str, Path]:
    """The files that scores depend on: weights, configurations, and the words of the tokenizer."""
    files = (p for p in clip_folder(name).iterdir() if p.suffix in (".json", ".txt", ".safetensors"))
    return {p.name: p for p in sorted(files)}


@torch.no_grad()
def clip_scorer(name: str | Path, *, device: str | torch.device = "cpu") -> Scorer:
    """``100 max(cos(picture, prompt), 0)`` of a CLIP (Hessel et al., arXiv 2104.08718, in the scale of the field).

    Prompts are cut at the length that the tokenizer allows. Pictures without a prompt have no score. Raises
    `ModelError` when the folder is no CLIP, or `transformers` is not installed.
    """
    folder = clip_folder(name)
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise ModelError(f"a CLIP score needs transformers: {install('pipelines')} ({error})") from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval().requires_grad_(False)
    model.to(device)
    prepare = image_processor(read_config(folder / "preprocessor_config.json"))

    @torch.no_grad()
    def score(images: Tensor, labels: Sequence[Label], _reference: Tensor | None) -> Tensor:
        scores = torch.full((len(images),), torch.nan)
        asked = [i for i, label in enumerate(labels) if isinstance(label, str)]
        if asked:
            text = tokenizer([labels[i] for i in asked], padding=True, truncation=True, return_tensors="pt")
            found = model(pixel_values=prepare(images[asked].to(device)), **text.to(device))
            cosines = F.cosine_similarity(found.image_embeds, found.text_embeds)
            scores[asked] = 100 * cosines.clamp_min(0).cpu()
        return scores

    name = f"CLIP score of {folder.name}: 100 cos(picture, prompt)"
    return Scorer(key="clip_score", name=name, against="prompts", score=score, bounds=(0.0, 100.0))


def image_processor(config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """What CLIP's image processor makes of pictures ``uint8 [N, C, H, W]`` by its ``preprocessor_config.json``: the
    shorter side resized (bicubic), the middle cut out, channels normalised. Grey pictures are given three channels."""
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("image_mean", "image_std"))
    side, crop = _side(config.get("size")), _side(config.get("crop_size"))

    def prepare(images: Tensor) -> Tensor:
        pixels = images.float() / 255
        if side and config.get("do_resize", True) and min(pixels.shape[-2:]) != side:
            scale = side / min(pixels.shape[-2:])
            shape = [round(s * scale) for s in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)
        if crop and config.get("do_center_crop", True):
            top, left = ((s - crop) // 2 for s in pixels.shape[-2:])
            pixels = pixels[..., top : top + crop, left : left + crop]
        return (pixels.expand(-1, 3, -1, -1) - mean.to(pixels)) / std.to(pixels)

    return prepare


def _side(size: Any) -> int:
    """The length that a ``size`` or ``crop_size`` names, a number or a dictionary; 0 without one."""
    if isinstance(size, dict):
        return int(size.get("shortest_edge") or size.get("height") or 0)
    return int(size or 0)
