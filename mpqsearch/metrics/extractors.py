"""Feature extractors: uint8 images in, float32 features out, each with a name and a digest that its values carry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.errors import ConfigError, ModelError, UnknownNameError
from mpqsearch.models import REFERENCE, weights_digest

INCEPTION_SHA256 = "6726825d"
"""First digits of the SHA-256 of the Inception weights of 2015 as ported for PyTorch: what the word FID is reserved
for."""

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """``features``: ``uint8 [N, C, H, W]`` to ``float32 [N, dim]``. ``classify``, where there is one: to labels
    ``[N]``. Both compute on ``device``; what they are called with and what comes back may be elsewhere: see
    `__call__` and `classes`."""

    name: str
    dim: int
    digest: str
    features: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    official_fid: bool = False
    device: torch.device = CPU

    @property
    def label(self) -> str:
        """Name with the first digits of the weights' digest."""
        return f"{self.name}@{self.digest[:8]}"

    def __call__(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features ``[N, dim]`` of images ``uint8 [N, C, H, W]`` on any device, in batches; they come on the CPU."""
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ConfigError(f"{self.name} takes uint8 images [N, C, H, W], got {images.dtype} {tuple(images.shape)}")
        return self._in_batches(self.features, images, batch).float()

    def classes(self, images: Tensor, batch: int = 256) -> Tensor | None:
        """Labels ``[N]``, on the CPU, of images on any device; None where the extractor does not classify."""
        return None if self.classify is None else self._in_batches(self.classify, images, batch)

    @torch.no_grad()
    def _in_batches(self, function: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
        return torch.cat([function(part.to(self.device)).cpu() for part in torch.split(images, batch)])


def load_extractor(name: str, *, weights: Path | None = None, device: str | torch.device = CPU) -> FeatureExtractor:
    """An extractor by name: ``fmnist-cnn``, ``random-conv`` or ``inception`` (extra ``mpqsearch[fid]``; ``weights`` is
    its file). ``device``: where it computes."""
    if name not in EXTRACTORS:
        raise UnknownNameError("feature extractor", name, EXTRACTORS)
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
    from safetensors.torch import load_file

    from mpqsearch.models.classifier import FEATURE_DIM, FashionClassifier

    model = FashionClassifier()
    model.load_state_dict(
        {
            k: v.float() if v.is_floating_point() else v
            for k, v in load_file(REFERENCE / "fmnist-cnn/model.safetensors").items()
        }
    )
    model.eval().requires_grad_(False).to(device)

    def unit(images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 28, 28):
            raise ConfigError(
                f"fmnist-cnn reads grey 28x28 images, got {tuple(images.shape[1:])}. Use the extractor random-conv, "
                "inception or your own module."
            )
        return images.float() / 127.5 - 1.0

    return FeatureExtractor(
        name="fmnist-cnn",
        dim=FEATURE_DIM,
        digest=weights_digest(model),
        features=lambda images: model.features(unit(images)),
        classify=lambda images: model(unit(images)).argmax(1),
        device=device,
    )


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
            "Install them: pip install 'mpqsearch[fid]'"
        ) from error
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=None if weights is None else str(weights)
    )


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise ModelError(f"the extractor weights {path} do not exist")
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


EXTRACTORS: dict[str, Callable[[Path | None, torch.device], FeatureExtractor]] = {
    "fmnist-cnn": _fashion,
    "random-conv": _random,
    "inception": _inception,
}
