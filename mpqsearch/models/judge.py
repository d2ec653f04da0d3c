"""The embedded recogniser of captioned compositions: what a caption of `fmnist-t2i` asks for, and the network that
counts how much of it a picture shows.

Captions name everything: ``a red sneaker on a dark floor``, ``a blue bag left of a green dress on a light floor``. What
is right of or below something else is read the other way round, so one picture has one reading.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIZE = 64
WORDS = ("t-shirt", "trousers", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
HUES = ("red", "green", "blue", "yellow", "purple")
GROUNDS = ("dark", "light")
PLACES = ("left of", "right of", "above", "below")
ALONE = "on"
READINGS = (ALONE, "left of", "above")
HEADS = (len(READINGS), len(GROUNDS), len(WORDS), len(HUES), len(WORDS), len(HUES))
FEATURE_DIM = 192

_ITEM = rf"a ({'|'.join(HUES)}) ({'|'.join(WORDS)})"
_CAPTION = re.compile(rf"{_ITEM}(?: ({'|'.join(PLACES)}) {_ITEM})? on a ({'|'.join(GROUNDS)}) floor")


@dataclass(frozen=True, slots=True)
class Scene:
    """What one picture shows. ``second`` and ``second_colour`` are empty when ``place`` is ``on`` (a single item)."""

    first: str
    first_colour: str
    floor: str
    place: str = ALONE
    second: str = ""
    second_colour: str = ""

    @classmethod
    def parse(cls, caption: str) -> Scene | None:
        """The scene of a `caption`; None for a text that is none."""
        found = _CAPTION.fullmatch(caption)
        if found is None:
            return None
        hue, word, place, second_hue, second, floor = found.groups(default="")
        return cls(word, hue, floor, place or ALONE, second, second_hue)

    @property
    def caption(self) -> str:
        """The prompt for this picture."""
        head = f"a {self.first_colour} {self.first}"
        if self.place != ALONE:
            head += f" {self.place} a {self.second_colour} {self.second}"
        return f"{head} on a {self.floor} floor"

    @property
    def targets(self) -> tuple[int, int, int, int, int, int]:
        """Indices of place (`READINGS`), floor, and kind and colour of the left or upper item and of the other one; -1
        where there is none."""
        first = (WORDS.index(self.first), HUES.index(self.first_colour))
        place, floor = self.place, GROUNDS.index(self.floor)
        if place == ALONE:
            return (0, floor, *first, -1, -1)
        second = (WORDS.index(self.second), HUES.index(self.second_colour))
        if place in READINGS:
            return (READINGS.index(place), floor, *first, *second)
        return (1 if place == "right of" else 2, floor, *second, *first)


class Judge(nn.Module):
    """Reads a picture ``[N, 3, 64, 64]`` in [-1, 1]: place, floor, and kind and colour of the left or upper item and of
    the other one."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(), nn.MaxPool2d(2))
            for a, b in itertools.pairwise(widths)
        ]
        self.trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, FEATURE_DIM), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(FEATURE_DIM, n) for n in HEADS)

    def features(self, images: Tensor) -> Tensor:
        """``[N, 192]``: what Fréchet distances are taken of."""
        features: Tensor = self.trunk(images)
        return features

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of the six attributes, in the order of `Scene.targets`."""
        features = self.features(images)
        return [head(features) for head in self.heads]


@torch.no_grad()
def recognised(judge: Judge, images: Tensor, prompts: Sequence[object]) -> Tensor:
    """Share ``[N]`` of the attributes asked for that the judge sees in images ``[N, 3, 64, 64]`` in [-1, 1].

    A caption asks for four of a single item and for six of two; the share is NaN for a prompt that is no caption.
    """
    scenes = [Scene.parse(prompt) if isinstance(prompt, str) else None for prompt in prompts]
    targets = torch.tensor([(-1,) * len(HEADS) if scene is None else scene.targets for scene in scenes])
    seen = torch.stack([logits.argmax(1) for logits in judge(images)], 1).cpu()
    asked = targets >= 0
    return ((seen == targets) & asked).sum(1) / asked.sum(1)
