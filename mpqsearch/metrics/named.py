"""Scorers by name, as a study lists them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.metrics.lpips import lpips_file, lpips_scorer
from mpqsearch.metrics.scorers import SSIM, Scorer
from mpqsearch.metrics.text import clip_iqa_scorer, clip_scorer, model_files, pick_scorer
from mpqsearch.sampling import imported
from mpqsearch.sources import is_function

SCORERS: dict[str, tuple[str, Callable[..., Scorer]]] = {
    "ssim": ("", lambda *_, **__: SSIM),
    "lpips": ("a file of torchvision: alexnet-owt-7be5be79.pth or vgg16-397923af.pth", lpips_scorer),
    "clip": ("a folder of transformers, such as openai/clip-vit-large-patch14; or fmnist-clip", clip_scorer),
    "clip-iqa": ("a folder of transformers, such as openai/clip-vit-large-patch14", clip_iqa_scorer),
    "pickscore": ("a folder of transformers: yuvalkirstain/PickScore_v1", pick_scorer),
}
"""What each needs after the colon of ``name:path``, empty for nothing, and what makes it of that."""


def load_scorer(text: str, *, device: str | torch.device = "cpu") -> Scorer:
    """The scorer that ``ssim``, ``name:path`` with a name of `SCORERS`, or ``package.module:function`` names.

    A function of one's own is a `Scorer`, or maps ``(images, labels, reference)`` to ``[N]`` as `Scorer.score` does, is
    given no reference, and is better when it is higher: what an ImageReward or an HPS takes. Raises `UnknownNameError`,
    `ConfigError` or `ModelError`.
    """
    name, path = _parsed(text)
    if name in SCORERS:
        return SCORERS[name][1](path, device=device)
    found = imported(text)
    if isinstance(found, Scorer):
        return found
    key = path.lower()
    return Scorer(key=key, name=f"{key} ({text})", against="prompts", score=found)


def scorer_inputs(text: str) -> tuple[str, dict[str, Path]]:
    """What a scorer is, and the files that it depends on as far as they can be seen: of a function, the one that it is
    written in."""
    name, path = _parsed(text)
    if name in SCORERS:
        if name == "lpips":
            return name, {"weights": lpips_file(path)}
        return name, model_files(path) if path else {}
    _ = imported(text)
    file = sys.modules[name].__file__
    return text, {name: Path(file)} if file else {}


def _parsed(text: str) -> tuple[str, str]:
    name, _, path = text.partition(":")
    if name not in SCORERS and not is_function(text):
        raise UnknownNameError("scorer", text, SCORERS, "Give name:path, or package.module:function of your own.")
    if name in SCORERS and bool(path) != bool(SCORERS[name][0]):
        needs = SCORERS[name][0]
        wrong = f"needs {needs}: write {name}:PATH" if needs else f"takes no path, got {path!r}"
        raise ConfigError(f"the scorer {name} {wrong}")
    return name, path
