"""Captioned colour pictures of Fashion-MNIST items: the data of the embedded text-to-image models.

A picture is 64x64 RGB: one or two items, each in a colour of its own, on a dark or a light floor. Its caption names
everything that was drawn, so a recogniser can count which of the attributes that a prompt asks for are there::

    a red sneaker on a dark floor
    a blue bag left of a green dress on a light floor

Pictures are made, not stored: picture ``i`` of a split and a seed is always the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from fashion_mnist import DEFAULT_DIR, load
from torch import Tensor

from mpqsearch.models.judge import ALONE, GROUNDS, HUES, PLACES, SIZE, WORDS, Scene

ITEM = 28
ITEMS = dict(zip((0, 1, 2, 3, 5, 7, 8, 9), WORDS, strict=True))
"""Label of Fashion-MNIST to the word for it. Coats and shirts are left out: people take them for pullovers, too."""

COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.65, 0.20, 0.85),
}
FLOORS = {"dark": 0.12, "light": 0.88}


def random_scene(generator: torch.Generator) -> Scene:
    """A scene; a third of them show a single item. Two items of a scene differ in kind and in colour."""
    alone = float(torch.rand((), generator=generator)) < 1 / 3
    items = torch.randperm(len(WORDS), generator=generator)[:2].tolist()
    hues = torch.randperm(len(HUES), generator=generator)[:2].tolist()
    floor = GROUNDS[int(torch.randint(0, len(GROUNDS), (), generator=generator))]
    place = int(torch.randint(0, len(PLACES), (), generator=generator))
    if alone:
        return Scene(WORDS[items[0]], HUES[hues[0]], floor)
    return Scene(WORDS[items[0]], HUES[hues[0]], floor, PLACES[place], WORDS[items[1]], HUES[hues[1]])


class Compositions:
    """Pictures and captions of one split; an item of a picture is a random one of its kind in that split."""

    def __init__(self, split: str = "train", data_dir: Path = DEFAULT_DIR) -> None:
        images, labels = load(split, data_dir)
        self.items = {word: images[labels == label, 0].float() / 255 for label, word in ITEMS.items()}
        grid = torch.linspace(-1, 1, SIZE)
        self.shade = 0.04 * grid.view(-1, 1).expand(SIZE, SIZE)  # floors are a little lighter below

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, list[Scene]]:
        """``n`` pictures ``[n, 3, 64, 64]`` in [-1, 1], and their scenes."""
        scenes = [random_scene(generator) for _ in range(n)]
        return torch.stack([self.draw(scene, generator) for scene in scenes]), scenes

    def draw(self, scene: Scene, generator: torch.Generator) -> Tensor:
        """One picture ``[3, 64, 64]`` in [-1, 1]."""
        canvas = (FLOORS[scene.floor] + self.shade).expand(3, SIZE, SIZE).clone()
        places = _positions(scene.place, generator)
        self._put(canvas, scene.first, scene.first_colour, places[0], generator)
        if scene.place != ALONE:
            self._put(canvas, scene.second, scene.second_colour, places[1], generator)
        return canvas.clamp(0, 1) * 2 - 1

    def _put(self, canvas: Tensor, word: str, hue: str, place: tuple[int, int], generator: torch.Generator) -> None:
        stock = self.items[word]
        grey = stock[int(torch.randint(0, len(stock), (), generator=generator))]
        cover = (grey * 6).clamp(max=1)  # opaque but for the rim
        colour = torch.tensor(COLOURS[hue]).view(3, 1, 1) * (0.45 + 0.55 * grey)
        top, left = place
        window = canvas[:, top : top + ITEM, left : left + ITEM]
        window.copy_(cover * colour + (1 - cover) * window)


def _positions(place: str, generator: torch.Generator) -> list[tuple[int, int]]:
    """Upper left corners ``(top, left)`` of the items."""
    free = SIZE - ITEM
    jitter = torch.randint(0, 5, (4,), generator=generator).tolist()
    middle = free // 2 - 2
    if place == ALONE:
        return [(middle + jitter[0], middle + jitter[1])]
    near, far = 1, free - 5
    along = [near + jitter[0], far + jitter[1]]
    if place in ("right of", "below"):
        along.reverse()
    across = [middle + jitter[2], middle + jitter[3]]
    if place in ("left of", "right of"):
        return [(across[0], along[0]), (across[1], along[1])]
    return [(along[0], across[0]), (along[1], across[1])]
