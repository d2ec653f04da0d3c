"""LPIPS: how different two pictures look, by features of a classifier whose weights are in a local file."""

from __future__ import annotations

import importlib.util
import pickle
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from mpqsearch.artifacts import read_tensors
from mpqsearch.errors import ModelError, install
from mpqsearch.metrics.scorers import FULL_PRECISION, Scorer
from mpqsearch.models import weights_digest
from mpqsearch.models.runner import Label

HEADS = {"torchmetrics": "functional/image/lpips_models", "lpips": "weights/v0.1"}
"""Libraries that ship the heads of LPIPS 0.1, and the folder in each."""

VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Channels of the convolutions of VGG-16; 0: pooling."""


def alexnet() -> tuple[nn.Sequential, tuple[int, ...]]:
    """The convolutions of torchvision's AlexNet (arXiv 1404.5997), and after which of its modules LPIPS looks."""
    parts: dict[int, nn.Module] = {
        0: nn.Conv2d(3, 64, 11, stride=4, padding=2),
        3: nn.Conv2d(64, 192, 5, padding=2),
        6: nn.Conv2d(192, 384, 3, padding=1),
        8: nn.Conv2d(384, 256, 3, padding=1),
        10: nn.Conv2d(256, 256, 3, padding=1),
        **{i: nn.MaxPool2d(3, 2) for i in (2, 5)},
    }
    return nn.Sequential(*(parts.get(i, nn.ReLU()) for i in range(12))), (1, 4, 7, 9, 11)


def vgg16() -> tuple[nn.Sequential, tuple[int, ...]]:
    """As `alexnet`, of VGG-16 (arXiv 1409.1556)."""
    parts: list[nn.Module] = []
    widths = [3, *(width for width in VGG if width)]
    convolutions = (nn.Conv2d(n, m, 3, padding=1) for n, m in pairwise(widths))
    for width in VGG:
        parts += [next(convolutions), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
    return nn.Sequential(*parts), (3, 8, 15, 22, 29)


def lpips_scorer(file: str | Path, *, device: str | torch.device = "cpu") -> Scorer:
    """LPIPS 0.1 (Zhang et al., arXiv 1801.03924) to the full-precision picture, at the pictures' own size; 0: none.

    ``file``: the weights of torchvision's AlexNet or VGG-16, safetensors or pickled tensors, as ``state_dict()`` of the
    classifier or of ``lpips.LPIPS`` names them; its shapes say which of them it is. Heads come from the file where it
    has them, else from an installed torchmetrics or lpips. Raises `ModelError` when either is not there.
    """
    path = lpips_file(file)
    weights = _weights(path)
    first = weights.get("0.weight")
    kinds: dict[tuple[int, ...], tuple[str, Callable[[], tuple[nn.Sequential, tuple[int, ...]]]]] = {
        (64, 3, 11, 11): ("alex", alexnet),
        (64, 3, 3, 3): ("vgg", vgg16),
    }
    if first is None or tuple(first.shape) not in kinds:
        found = "no features.0.weight" if first is None else f"a first convolution {tuple(first.shape)}"
        raise ModelError(f"{path} has {found}: LPIPS reads the weights of torchvision's AlexNet or VGG-16")
    kind, build = kinds[tuple(first.shape)]
    layers, looks = build()
    heads = [weights.get(f"lin{i}") for i in range(len(looks))]
    if None in heads:
        heads = [_weights(head_file(kind))[f"lin{i}"] for i in range(len(looks))]
    try:
        layers.load_state_dict({k: weights[k] for k in layers.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"{path} holds other layers than {build.__name__} has: {error}") from error
    network = _Lpips(layers, looks, [head.float() for head in heads if head is not None])
    network.eval().requires_grad_(False).to(device)

    def score(images: Tensor, _labels: Sequence[Label], reference: Tensor | None) -> Tensor:
        assert reference is not None  # its ``against`` says so
        x, y = (t.to(device).float().expand(-1, 3, -1, -1) / 127.5 - 1 for t in (images, reference))
        distance: Tensor = network(x, y)
        return distance.cpu()

    return Scorer(
        key="lpips",
        name=f"LPIPS 0.1 ({kind}) vs FP, same noise",
        against=FULL_PRECISION,
        score=score,
        higher_is_better=False,
        bounds=(0.0, float("inf")),
        weights=f"{kind}@{weights_digest(network)[:8]}",
    )


class _Lpips(nn.Module):
    """Weighted squared differences of features of length 1, summed over layers, ``[N]``."""

    shift: Tensor
    scale: Tensor

    def __init__(self, layers: nn.Sequential, looks: Sequence[int], heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers, self.looks = layers, looks
        self.heads = nn.ParameterList(nn.Parameter(head.flatten(), requires_grad=False) for head in heads)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(-1, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(-1, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Of pictures ``[N, 3, H, W]`` in -1..1."""
        both = (torch.cat([x, y]) - self.shift) / self.scale
        total = torch.zeros(len(x), device=x.device)
        heads = iter(self.heads)
        for i, layer in enumerate(self.layers):
            both = layer(both)
            if i in self.looks:
                lengths = (1e-8 + both.square().sum(1, keepdim=True)).sqrt()
                a, b = (both / lengths).chunk(2)
                total += torch.einsum("nchw,c->nhw", (a - b) ** 2, next(heads)).flatten(1).mean(1)
        return total


def head_file(kind: str) -> Path:
    """Where an installed library has the heads of LPIPS for ``alex`` or ``vgg``; it is not imported."""
    for library, folder in HEADS.items():
        found = importlib.util.find_spec(library)
        file = Path(found.origin).parent / folder / f"{kind}.pth" if found and found.origin else None
        if file is not None and file.is_file():
            return file
    raise ModelError(
        f"the heads of LPIPS ({kind}) are in none of {', '.join(HEADS)}: {install('lpips')}, or give a file that "
        "holds them, such as torch.save(lpips.LPIPS(net='alex').state_dict(), 'lpips.pth')"
    )


def lpips_file(name: str | Path) -> Path:
    """A file of weights; `ModelError` when it is not there."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(
            f"the weights of LPIPS {str(path)!r} do not exist: give a file of torchvision's AlexNet "
            "(alexnet-owt-7be5be79.pth) or VGG-16 (vgg16-397923af.pth); nothing is downloaded"
        )
    return path


def _weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file: of convolutions by their place (``0.weight``), heads as ``lin0``, ``lin1``."""
    try:
        tensors = (
            read_tensors(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        named = {str(k): v for k, v in tensors.items() if isinstance(v, Tensor)}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        raise ModelError(f"{path} is no file of tensors alone: {str(error).splitlines()[0]}") from error
    pattern = re.compile(r"(?:features\.|net\.slice\d\.)?(\d+\.(?:weight|bias))|(lin\d)\.model\.\d\.weight")
    matches = {key: pattern.fullmatch(key) for key in named}
    return {match[1] or match[2]: named[key] for key, match in matches.items() if match}
