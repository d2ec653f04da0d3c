from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpqsearch.errors import ModelError
from mpqsearch.metrics import PSNR, Scorer, evaluate, extractor_for, extractors, load_extractor, load_reference
from mpqsearch.models.classifier import FashionClassifier
from mpqsearch.models.judge import GROUNDS, HEADS, HUES, PLACES, WORDS, Judge, Scene, recognised
from mpqsearch.models.runner import Label
from tests.support.drawn import batches_of, reference_of


def test_psnr_equals_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    generator = torch.Generator().manual_seed(0)
    full = torch.randint(0, 250, (4, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images = full + torch.randint(0, 6, full.shape, dtype=torch.uint8, generator=generator)
    ours = PSNR.score(images, [None] * 4, full)
    for i in range(4):
        expected = peak_signal_noise_ratio(images[i].double(), full[i].double(), data_range=255.0)
        assert float(ours[i]) == pytest.approx(float(expected), rel=1e-6)
    assert PSNR.score(full, [None] * 4, full).tolist() == [100.0] * 4


def test_a_scorer_of_ones_own_is_averaged_with_an_interval(tmp_path: Path) -> None:
    seen: list[tuple[Sequence[Label], bool]] = []

    def brightness(images: Tensor, labels: Sequence[Label], reference: Tensor | None) -> Tensor:
        seen.append((labels, reference is None))
        return images.double().flatten(1).mean(1).masked_fill(torch.tensor([x == "skip" for x in labels]), torch.nan)

    scorer = Scorer(key="bright", name="brightness", against="prompts", score=brightness, bounds=(0.0, 255.0))
    images = torch.arange(0, 60, 10).to(torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    samples = images.float() / 127.5 - 1
    labels: list[Label] = ["a", "skip", "b", "c", "d", "e"]
    extractor = load_extractor("random-conv")
    base = reference_of(samples, extractor, tmp_path, labels=labels, scorers=[scorer])
    found = evaluate(batches_of(samples, labels=labels), base).metrics["bright"]
    assert (found.value, found.n_samples, found.name, found.reference) == (28.0, 5, "brightness", "prompts")
    assert found.low < found.value < found.high
    assert base.evaluation().metrics["bright"].value == found.value
    assert [x for labels, _ in seen[:2] for x in labels] == labels
    assert all(alone for _, alone in seen), "only scorers against full precision see its pictures"


def test_the_class_that_was_asked_for(tmp_path: Path) -> None:
    extractor = load_extractor("fmnist-cnn")
    (accuracy,) = extractor.scorers
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = extractors._embedded(FashionClassifier(), "fmnist-cnn")
    read = network(images.float() / 127.5 - 1).argmax(1)
    asked = read.clone()
    asked[:2] = (asked[:2] + 1) % 10
    assert accuracy.score(images, asked.tolist(), None).tolist() == [0, 0, 1, 1, 1, 1]
    assert accuracy.score(images, [None] * 6, None).isnan().all()
    samples = images.float() / 127.5 - 1
    base = reference_of(samples, extractor, tmp_path / "a", labels=asked.tolist())
    assert base.evaluation().metrics["class_accuracy"].value == pytest.approx(4 / 6)
    assert "class_accuracy" not in reference_of(samples, extractor, tmp_path / "b").evaluation().metrics


def test_captions_are_read_as_they_are_written() -> None:
    scenes = [Scene(w, h, g) for w in WORDS for h in HUES for g in GROUNDS]
    scenes += [Scene("t-shirt", "red", "dark", p, w, h) for p in PLACES for w in WORDS for h in HUES]
    assert [Scene.parse(s.caption) for s in scenes] == scenes
    for text in (
        "a red cat on a dark floor",
        "a red bag",
        "a red bag left of a blue boot",
        "A red bag on a dark floor.",
    ):
        assert Scene.parse(text) is None


def test_one_picture_has_one_reading() -> None:
    for here, there in (("left of", "right of"), ("above", "below")):
        a = Scene("bag", "red", "dark", here, "boot", "blue")
        b = Scene("boot", "blue", "dark", there, "bag", "red")
        assert a.targets == b.targets
    assert Scene("bag", "red", "dark", "left of", "boot", "blue").targets == (1, 0, 6, 0, 7, 2)
    assert Scene("bag", "red", "light").targets == (0, 1, 6, 0, -1, -1)


def test_the_share_of_attributes_recognised_is_counted() -> None:
    class Sees(Judge):
        def forward(self, images: Tensor) -> list[Tensor]:
            """A red bag left of a blue boot on a dark floor, whatever the picture."""
            seen = (1, 0, 6, 0, 7, 2)
            return [torch.eye(n)[k].expand(len(images), n) for k, n in zip(seen, HEADS, strict=True)]

    prompts = [
        "a red bag left of a blue boot on a dark floor",
        "a blue boot right of a red bag on a dark floor",
        "a green bag above a blue boot on a dark floor",
        "a red bag on a light floor",
        "a cat",
        None,
    ]
    share = recognised(Sees(), torch.zeros(6, 3, 64, 64), prompts)
    assert share[:4].tolist() == pytest.approx([1, 1, 4 / 6, 2 / 4])
    assert share[4:].isnan().all()


def test_the_embedded_judge() -> None:
    extractor = load_extractor("fmnist-judge")
    reference = load_reference(None, extractor)
    assert reference is not None
    assert reference.features.shape[1] == extractor.dim == 192
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = extractors._embedded(Judge(), "fmnist-judge")
    torch.testing.assert_close(extractor(images), network.features(images.float() / 127.5 - 1))
    (attributes,) = extractor.scorers
    prompts = ["a red bag on a dark floor", "a blue boot above a green dress on a light floor", "else"]
    share = attributes.score(images, prompts, None)
    torch.testing.assert_close(share, recognised(network, images.float() / 127.5 - 1, prompts), equal_nan=True)


def test_an_embedded_extractor_without_its_weights_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extractors, "REFERENCE", tmp_path)
    with pytest.raises(ModelError, match="lacks the weights of the extractor fmnist-judge"):
        load_extractor("fmnist-judge")


@pytest.mark.parametrize(
    ("shape", "model", "expected"),
    [
        ((1, 28, 28), "fmnist-unet", "fmnist-cnn"),
        ((1, 28, 28), "mine", "fmnist-cnn"),
        ((3, 64, 64), "fmnist-t2i", "fmnist-judge"),
        ((3, 64, 64), "fmnist-flow", "fmnist-judge"),
        ((3, 64, 64), "mine", "random-conv"),
        ((3, 512, 512), "fmnist-t2i", "random-conv"),
    ],
)
def test_the_extractor_follows_the_pictures(shape: tuple[int, ...], model: str, expected: str) -> None:
    assert extractor_for(shape, model) == expected
