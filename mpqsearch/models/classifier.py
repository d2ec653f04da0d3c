"""The embedded Fashion-MNIST classifier: judge of class fidelity and source of the features behind
``FD[fmnist-cnn]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURE_DIM = 64


class FashionClassifier(nn.Module):
    """A small convolutional classifier for 28x28 grey images.

    Input is ``[N, 1, 28, 28]`` in ``[-1, 1]``; `features` returns the penultimate ``[N, 64]`` activations (global
    average of the last convolution, before the linear head), `forward` the ``[N, 10]`` logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(1, 24),
            *_block(24, 48, stride=2),
            *_block(48, 48),
            *_block(48, 96, stride=2),
            *_block(96, FEATURE_DIM),
        )
        self.head = nn.Linear(FEATURE_DIM, 10)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features ``[N, 64]`` of images ``[N, 1, 28, 28]`` in ``[-1, 1]``."""
        return torch.flatten(nn.functional.adaptive_avg_pool2d(self.body(images), 1), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]``."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _block(c_in: int, c_out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )
