"""Scores by a CLIP in a local folder: how well a picture fits its prompt, and how good it looks; nothing is
downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpqsearch.errors import ModelError, install
from mpqsearch.metrics.scorers import Scorer
from mpqsearch.models import REFERENCE, weights_digest
from mpqsearch.models.runner import Label
from mpqsearch.sources import read_config

CLIP = "fmnist-clip"
"""The embedded CLIP, which knows the captions of the embedded pipelines and nothing else."""

PARTS = ("config.json", "preprocessor_config.json")
"""Files that a folder of `transformers` must have beside its weights and its tokenizer."""

QUALITIES = ("Good photo.", "Bad photo.")
"""The prompts of CLIP-IQA: its score is the probability of the first."""


def model_folder(name: str | Path, kind: str = "clip") -> Path:
    """A folder that ``save_pretrained`` of `transformers` wrote with a model of that type (``clip``, ``dinov2``); the
    embedded CLIP by name.

    Raises `ModelError` when it is none.
    """
    folder = REFERENCE / CLIP if str(name) == CLIP else Path(name).expanduser()
    missing = next((part for part in PARTS if not (folder / part).is_file()), None)
    if missing is not None:
        raise ModelError(
            f"the {kind} model {str(name)!r} has no {missing}: give a local folder of transformers (the model, its "
            "image processor and, of a CLIP, its tokenizer, each written by save_pretrained)"
            + (f", or {CLIP!r}, which reads captions of the embedded pipelines" if kind == "clip" else "")
        )
    found = read_config(folder / "config.json").get("model_type")
    if found != kind:
        raise ModelError(f"{folder} holds a model of the type {found!r}; one of the type {kind!r} is needed")
    return folder


def model_files(name: str | Path, kind: str = "clip") -> dict[str, Path]:
    """The files that scores and features depend on: weights, configurations, and the words of the tokenizer."""
    files = (p for p in model_folder(name, kind).iterdir() if p.suffix in (".json", ".txt", ".safetensors"))
    return {p.name: p for p in sorted(files)}


def pretrained(class_name: str, folder: Path, device: str | torch.device) -> Any:
    """A model of `transformers` in float32 with the weights of a folder; raises `ModelError` when some are not there,
    which would else be drawn at random."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{folder} needs transformers: {install('pipelines')} ({error})") from error
    loader = getattr(transformers, class_name)
    try:
        model, told = loader.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder} cannot be loaded as a {class_name}: {error}") from error
    if lacking := sorted(told["missing_keys"]):
        raise ModelError(f"{folder} lacks {len(lacking)} of the weights of a {class_name}, such as {lacking[0]}")
    return model.eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class Clip:
    """A CLIP on a device, with its tokenizer and its image processor."""

    model: Any
    tokenizer: Any
    prepare: Callable[[Tensor], Tensor]

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device) -> Clip:
        """Of a local folder, or the embedded one; `ModelError` when it is none."""
        folder = model_folder(name)
        model = pretrained("CLIPModel", folder, device)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model, tokenizer, image_processor(folder))

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Embeddings ``[N, d]`` of length 1 of pictures ``uint8 [N, C, H, W]``."""
        seen = self.model.vision_model(pixel_values=self.prepare(images.to(self.model.device)))
        return F.normalize(self.model.visual_projection(seen.pooler_output), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[N, d]`` of length 1 of texts, which are cut at the length that the tokenizer allows."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        read = self.model.text_model(**tokens.to(self.model.device))
        return F.normalize(self.model.text_projection(read.pooler_output), dim=1)

    def cosines(self, images: Tensor, labels: Sequence[Label]) -> Tensor:
        """Of each picture and its prompt, ``[N]``; NaN for pictures without one."""
        cosines = torch.full((len(images),), torch.nan)
        asked = {i: label for i, label in enumerate(labels) if isinstance(label, str)}
        if asked:
            meant = self.texts(list(asked.values()))
            cosines[list(asked)] = (self.pictures(images[list(asked)]) * meant).sum(1).cpu()
        return cosines

    @property
    def label(self) -> str:
        """What its values carry."""
        return f"clip@{weights_digest(self.model)[:8]}"


def clip_scorer(name: str | Path, *, device: str | torch.device = "cpu") -> Scorer:
    """``100 max(cos(picture, prompt), 0)`` of a CLIP (Hessel et al., arXiv 2104.08718, in the scale of the field).

    Prompts are cut at the length that the tokenizer allows. Pictures without a prompt have no score. Raises
    `ModelError` when the folder is no CLIP, or `transformers` is not installed.
    """
    clip = Clip.load(name, device)
    return Scorer(
        key="clip_score",
        name=f"CLIP score of {model_folder(name).name}: 100 cos(picture, prompt)",
        against="prompts",
        score=lambda images, labels, _: 100 * clip.cosines(images, labels).clamp_min(0),
        bounds=(0.0, 100.0),
        weights=clip.label,
    )


def pick_scorer(name: str | Path, *, device: str | torch.device = "cpu") -> Scorer:
    """PickScore: the cosine of picture and prompt in the scale of a CLIP that was trained on people's choices (Kirstain
    et al., arXiv 2305.01569). Errors as in `clip_scorer`."""
    clip = Clip.load(name, device)
    scale = float(clip.model.logit_scale.exp())
    return Scorer(
        key="pick_score",
        name=f"PickScore of {model_folder(name).name}",
        against="prompts",
        score=lambda images, labels, _: scale * clip.cosines(images, labels),
        bounds=(-scale, scale),
        weights=clip.label,
    )


def clip_iqa_scorer(name: str | Path, *, device: str | torch.device = "cpu") -> Scorer:
    """CLIP-IQA: the probability, 0 to 1, of the first of `QUALITIES` by ``softmax(100 cos)`` (Wang et al., arXiv
    2207.12396), with the CLIP as it is, position embeddings included. Errors as in `clip_scorer`."""
    clip = Clip.load(name, device)
    anchors = clip.texts(QUALITIES)

    def score(images: Tensor, _labels: Sequence[Label], _reference: Tensor | None) -> Tensor:
        return (100 * clip.pictures(images) @ anchors.T).softmax(1)[:, 0].cpu()

    title = f"CLIP-IQA of {model_folder(name).name}: {QUALITIES[0]!r} against {QUALITIES[1]!r}"
    return Scorer(
        key="clip_iqa", name=title, against="pictures alone", score=score, bounds=(0.0, 1.0), weights=clip.label
    )


def image_processor(folder: Path, **changes: Any) -> Callable[[Tensor], Tensor]:
    """What the image processor of a folder makes of pictures ``uint8 [N, C, H, W]``, with some of its settings changed;
    grey pictures are given three channels. Raises `ModelError` when `transformers` cannot read it."""
    from transformers import AutoImageProcessor

    read_config(folder / PARTS[1])
    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **changes
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / PARTS[1]} is of no image processor: {error}") from error

    def prepare(images: Tensor) -> Tensor:
        pictures = [picture.numpy() for picture in images.expand(-1, 3, -1, -1).cpu()]
        made = processor(pictures, input_data_format="channels_first", return_tensors="pt")
        return torch.as_tensor(made["pixel_values"]).to(images.device)

    return prepare
