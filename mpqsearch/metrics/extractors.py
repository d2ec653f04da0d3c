"""Feature extractors: uint8 images in, float32 features out, each with a name and a digest that its values carry."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mpqsearch.artifacts import read_tensors
from mpqsearch.errors import ConfigError, ModelError, UnknownNameError, install
from mpqsearch.metrics.frechet import CMMD, CUBIC, Kernel
from mpqsearch.metrics.scorers import Scorer
from mpqsearch.metrics.text import Clip, image_processor, model_folder, pretrained
from mpqsearch.models import REFERENCE, weights_digest
from mpqsearch.models.classifier import FEATURE_DIM, FashionClassifier
from mpqsearch.models.judge import FEATURE_DIM as JUDGE_DIM
from mpqsearch.models.judge import SIZE, Judge, recognised
from mpqsearch.models.runner import Label
from mpqsearch.sources import read_config

Network = TypeVar("Network", bound=nn.Module)

AUTO = "auto"
"""Stands for the extractor that `extractor_for` chooses."""

CAPTIONED = ("fmnist-t2i", "fmnist-flow")
"""Models whose pictures and prompts `fmnist-judge` reads."""

INCEPTION_SHA256 = "6726825d"
"""First digits of the SHA-256 of the Inception weights of 2015 as ported for PyTorch: what the word FID is reserved
for."""

FOLDERS = {
    "clip": "a folder of transformers with a CLIP, such as openai/clip-vit-large-patch14-336 (CMMD)",
    "dinov2": "a folder of transformers, such as facebook/dinov2-large (FD-DINOv2)",
}
"""Extractors whose weights are a folder, and which one."""

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """``features``: ``uint8 [N, C, H, W]`` to ``float32 [N, dim]``, computed on ``device``; what it is called with and
    what comes back may be elsewhere. ``shape``: the pictures ``(C, H, W)`` that it reads (None: of one or three
    channels and any size). ``scorers``: what it can say of single pictures. ``kernel``: of its kernel distances."""

    name: str
    dim: int
    digest: str
    features: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int] | None = None
    scorers: tuple[Scorer, ...] = ()
    official_fid: bool = False
    device: torch.device = CPU
    kernel: Kernel = CUBIC

    @property
    def label(self) -> str:
        """Name with the first digits of the weights' digest."""
        return f"{self.name}@{self.digest[:8]}"

    def check(self, shape: Sequence[int]) -> None:
        """Raise `ConfigError` when pictures of the shape ``(C, H, W)`` cannot be read."""
        found = tuple(shape)
        fits = found == self.shape if self.shape else len(found) == 3 and found[0] in (1, 3)
        if not fits:
            reads = f"pictures {self.shape}" if self.shape else "pictures of 1 or 3 channels"
            raise ConfigError(
                f"the extractor {self.name} reads {reads} (channels, height, width), these are {found}. Use the "
                "extractor auto, random-conv, inception or your own module."
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features ``[N, dim]`` of pictures ``uint8 [N, C, H, W]``, or ``[N * F, dim]`` of videos
        ``uint8 [N, F, C, H, W]`` frame by frame; on the CPU, in batches."""
        if images.dtype != torch.uint8 or images.dim() not in (4, 5):
            raise ConfigError(f"{self.name} takes uint8 images [N, C, H, W], got {images.dtype} {tuple(images.shape)}")
        frames = images.flatten(0, 1) if images.dim() == 5 else images
        self.check(frames.shape[1:])
        parts = [self.features(part.to(self.device)).cpu() for part in torch.split(frames, batch)]
        return torch.cat(parts).float()


def extractor_for(shape: Sequence[int], model: str) -> str:
    """The extractor that ``auto`` stands for: by the pictures ``(C, H, W)`` and the name of the model."""
    if tuple(shape) == (1, 28, 28):
        return "fmnist-cnn"
    return "fmnist-judge" if model in CAPTIONED and tuple(shape) == (3, SIZE, SIZE) else "random-conv"


def load_extractor(name: str, *, weights: Path | None = None, device: str | torch.device = CPU) -> FeatureExtractor:
    """An extractor by name: ``fmnist-cnn``, ``fmnist-judge``, ``random-conv``, ``inception`` (extra ``mpqsearch[fid]``;
    ``weights`` is its file), ``clip`` or ``dinov2`` (``weights`` is a folder of transformers). ``device``: where it
    computes."""
    if name not in EXTRACTORS:
        raise UnknownNameError("feature extractor", name, (AUTO, *EXTRACTORS))
    return EXTRACTORS[name](weights, torch.device(device))


def module_extractor(module: nn.Module, name: str, *, scale: float = 127.5, shift: float = -1.0) -> FeatureExtractor:
    """Wrap any module that maps ``pixels / scale + shift`` to features ``[N, dim]``; it computes where it is."""
    module.eval().requires_grad_(False)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), CPU)

    def features(images: Tensor) -> Tensor:
        out: Tensor = module(images.float() / scale + shift)
        return out.flatten(1)

    try:
        dim = features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device)).shape[1]
    except RuntimeError:
        dim = features(torch.zeros(1, 1, 28, 28, dtype=torch.uint8, device=device)).shape[1]
    return FeatureExtractor(name=name, dim=dim, digest=weights_digest(module), features=features, device=device)


def _fashion(_weights: Path | None, device: torch.device) -> FeatureExtractor:
    network = _embedded(FashionClassifier(), "fmnist-cnn").to(device)

    @torch.no_grad()
    def right(images: Tensor, labels: Sequence[Label], _reference: Tensor | None) -> Tensor:
        asked = torch.tensor([label if isinstance(label, int) else -1 for label in labels])
        hit: Tensor = (network(_unit(images, device)).argmax(1).cpu() == asked).double()
        return hit.masked_fill(asked < 0, math.nan)

    return FeatureExtractor(
        name="fmnist-cnn",
        dim=FEATURE_DIM,
        digest=weights_digest(network),
        features=lambda images: network.features(_unit(images, device)),
        shape=(1, 28, 28),
        scorers=(
            Scorer(
                key="class_accuracy",
                name="asked class recognised",
                against="labels",
                score=right,
                bounds=(0.0, 1.0),
            ),
        ),
        device=device,
    )


def _judge(_weights: Path | None, device: torch.device) -> FeatureExtractor:
    network = _embedded(Judge(), "fmnist-judge").to(device)

    def share(images: Tensor, prompts: Sequence[Label], _reference: Tensor | None) -> Tensor:
        return recognised(network, _unit(images, device), prompts)

    return FeatureExtractor(
        name="fmnist-judge",
        dim=JUDGE_DIM,
        digest=weights_digest(network),
        features=lambda images: network.features(_unit(images, device)),
        shape=(3, SIZE, SIZE),
        scorers=(
            Scorer(
                key="attributes_recognised",
                name="share of the attributes asked for that are recognised",
                against="prompts",
                score=share,
                bounds=(0.0, 1.0),
            ),
        ),
        device=device,
    )


def _unit(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).float() / 127.5 - 1.0


def _embedded(network: Network, name: str) -> Network:
    """A network with the weights of that name that ship with the package, in half precision."""

    file = REFERENCE / name / "model.safetensors"
    if not file.is_file():
        raise ModelError(f"this installation lacks the weights of the extractor {name} ({file}): install it again")
    weights = {k: v.float() if v.is_floating_point() else v for k, v in read_tensors(file).items()}
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


class _RandomConv(nn.Module):
    """Three strided convolutions with weights from a fixed seed: a training-free extractor for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(20150612)
        sizes = ((3, 32, 5), (32, 64, 3), (64, 64, 3))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(o, i, k, k, generator=generator) / (i * k * k) ** 0.5, requires_grad=False)
            for i, o, k in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 128]``: spatial mean and standard deviation of the last map."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
        for weight in self.weights:
            x = nn.functional.leaky_relu(nn.functional.conv2d(x, weight, stride=2, padding=weight.shape[-1] // 2), 0.2)
        flat = x.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2, unbiased=False)], 1)


def _random(_weights: Path | None, device: torch.device) -> FeatureExtractor:
    return module_extractor(_RandomConv().to(device), "random-conv")


def _inception(weights: Path | None, device: torch.device) -> FeatureExtractor:
    network = _inception_network(weights).to(device)
    digest = _file_digest(weights) if weights is not None else INCEPTION_SHA256
    return FeatureExtractor(
        name="inception-2015",
        dim=2048,
        digest=digest,
        features=lambda images: network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)[0],
        official_fid=digest.startswith(INCEPTION_SHA256),
        device=device,
    )


def _inception_network(weights: Path | None) -> Any:
    """torch-fidelity's port, which resizes as TensorFlow 1 did. Imported here: it needs torchvision, and nothing else
    may."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError, not ImportError
        raise ModelError(
            f"the Inception FID needs torch-fidelity and a torchvision that fits your torch ({type(error).__name__}: "
            f"{error}). "
            f"Install them: {install('fid')}"
        ) from error
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=None if weights is None else str(weights)
    )


def _clip(weights: Path | None, device: torch.device) -> FeatureExtractor:
    """Image embeddings of length 1, as CMMD compares them (arXiv 2401.09603)."""
    clip = Clip.load(_required("clip", weights), device)
    return FeatureExtractor(
        name="clip",
        dim=clip.model.config.projection_dim,
        digest=weights_digest(clip.model),
        features=clip.pictures,
        device=device,
        kernel=CMMD,
    )


def _dinov2(weights: Path | None, device: torch.device) -> FeatureExtractor:
    """The normalised class token, as FD-DINOv2 compares it (arXiv 2306.04675): of pictures that are scaled to the
    network's size, and cut to a square where they are none."""
    folder = model_folder(_required("dinov2", weights), "dinov2")
    network = pretrained("Dinov2Model", folder, device)
    config = read_config(folder / "preprocessor_config.json")
    prepare = image_processor(folder, size=config.get("crop_size") or config.get("size"))
    return FeatureExtractor(
        name="dinov2",
        dim=network.config.hidden_size,
        digest=weights_digest(network),
        features=lambda images: network(pixel_values=prepare(images)).pooler_output,
        device=device,
    )


def _required(kind: str, weights: Path | None) -> Path:
    if weights is None:
        raise ModelError(f"the extractor {kind} needs {FOLDERS[kind]}: name it in evaluate.extractor_weights")
    return weights


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise ModelError(f"the extractor weights {path} do not exist")
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


EXTRACTORS: dict[str, Callable[[Path | None, torch.device], FeatureExtractor]] = {
    "fmnist-cnn": _fashion,
    "fmnist-judge": _judge,
    "random-conv": _random,
    "inception": _inception,
    "clip": _clip,
    "dinov2": _dinov2,
}
