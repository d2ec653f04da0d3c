"""SSIM, LPIPS and the scores of a CLIP against the libraries that define them, on weights that were drawn at random:
their numbers say nothing of any picture."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor
from torch.nn import functional as F

from mpqsearch.errors import ConfigError, ModelError, NumericsError, UnknownNameError
from mpqsearch.metrics import SSIM, evaluate, load_extractor, load_scorer
from mpqsearch.metrics.frechet import CMMD, kernel_distance, paired_kernel_distance
from mpqsearch.metrics.lpips import alexnet, lpips_scorer, vgg16
from mpqsearch.metrics.named import scorer_inputs
from mpqsearch.metrics.text import QUALITIES
from mpqsearch.models.runner import Label
from tests.support.drawn import batches_of, reference_of
from tests.unit.metrics.test_text import PROMPTS, expected, folder, pictures

__all__ = ["folder"]


def noisy(images: Tensor) -> Tensor:
    noise = torch.randint(-20, 21, images.shape, generator=torch.Generator().manual_seed(2))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_torchmetrics(channels: int) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    full = pictures(4, 24, 31)[:, :channels]
    images = noisy(full)
    theirs = structural_similarity_index_measure(images.double(), full.double(), data_range=255.0, reduction="none")
    torch.testing.assert_close(SSIM.score(images, [None] * 4, full), theirs, rtol=0, atol=1e-5)
    assert SSIM.score(full, [None] * 4, full).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_torchmetrics(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code and heads, around the layers that torchvision would bring."""
    from torchmetrics.functional.image import lpips as theirs

    torch.manual_seed(0)
    layers, _ = {"alex": alexnet, "vgg": vgg16}[net]()
    brought = lambda weights=None: types.SimpleNamespace(features=layers)  # noqa: E731
    models = types.SimpleNamespace(alexnet=brought, vgg16=brought)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    network = theirs._NoTrainLpips(net=net, pnet_rand=True)
    full = pictures(3, 64, 70)
    images = noisy(full)
    with torch.no_grad():
        found = network(images.float() / 255, full.float() / 255, normalize=True).flatten()
    torch.save({f"features.{k}": v for k, v in layers.state_dict().items()}, tmp_path / "backbone.pth")
    scorer = lpips_scorer(tmp_path / "backbone.pth")
    assert scorer.name == f"LPIPS 0.1 ({net}) vs FP, same noise"
    torch.testing.assert_close(scorer.score(images, [None] * 3, full), found, rtol=0, atol=1e-5)
    assert scorer.score(full, [None] * 3, full).tolist() == [0.0] * 3
    grey = scorer.score(images[:, :1], [None] * 3, full[:, :1])
    wide = scorer.score(images[:, :1].expand(-1, 3, -1, -1), [None] * 3, full[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey, wide)


def test_lpips_reads_its_own_layout_and_says_what_else_it_was_given(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    layers, _ = alexnet()
    widths = (64, 192, 384, 256, 256)
    whole = {f"net.slice1.{k}": v for k, v in layers.state_dict().items()}
    whole |= {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate(widths)}
    save_file(whole, tmp_path / "lpips.safetensors")
    full = pictures(1, 64, 64)
    assert float(lpips_scorer(tmp_path / "lpips.safetensors").score(noisy(full), [None], full)) > 0
    with pytest.raises(ModelError, match=r"do not exist: give a file of torchvision's AlexNet .* nothing is down"):
        lpips_scorer(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ModelError, match=r"text\.pth is no file of tensors alone"):
        lpips_scorer(tmp_path / "text.pth")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    with pytest.raises(ModelError, match=r"has no features\.0\.weight: LPIPS reads .* AlexNet or VGG-16"):
        lpips_scorer(tmp_path / "resnet.pth")
    del whole["net.slice1.3.weight"]
    torch.save(whole, tmp_path / "part.pth")
    with pytest.raises(ModelError, match="holds other layers than alexnet has"):
        lpips_scorer(tmp_path / "part.pth")


def test_pick_score_and_clip_iqa_are_those_of_transformers(folder: Path) -> None:
    images = pictures(len(PROMPTS), 24, 24)
    model = t.CLIPModel.from_pretrained(folder)
    pick = load_scorer(f"pickscore:{folder}")
    cosines = expected(folder, images, list(PROMPTS))
    torch.testing.assert_close(
        pick.score(images, PROMPTS, None), model.logit_scale.exp().detach() * cosines, rtol=0, atol=1e-5
    )
    quality = load_scorer(f"clip-iqa:{folder}")
    good, bad = (expected(folder, images, [text] * len(images)) for text in QUALITIES)
    theirs = (100 * torch.stack([good, bad], 1)).softmax(1)[:, 0]
    torch.testing.assert_close(quality.score(images, [None] * len(images), None), theirs, rtol=0, atol=1e-5)
    assert pick.weights == quality.weights != ""


def test_clip_and_dinov2_features_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = t.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    t.Dinov2Model(config).save_pretrained(tmp_path)
    side = {"height": 28, "width": 28}
    t.BitImageProcessor(size={"shortest_edge": 40}, crop_size=side).save_pretrained(tmp_path)
    images = pictures(3, 28, 28)
    found = load_extractor("dinov2", weights=tmp_path)
    processor = t.BitImageProcessor(size=side, crop_size=side)
    pixels = processor(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = t.Dinov2Model.from_pretrained(tmp_path).eval()(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found(images), theirs, rtol=0, atol=1e-5)
    assert found.label.startswith("dinov2@")
    assert found.dim == 32

    clip = load_extractor("clip", weights=folder)
    small = pictures(3, 24, 24)
    with torch.no_grad():
        whole = t.CLIPModel.from_pretrained(folder).eval()
        pixels = t.CLIPImageProcessor.from_pretrained(folder)(list(small), return_tensors="pt").pixel_values
        embeds = whole(pixel_values=pixels, input_ids=torch.tensor([[512, 513]])).image_embeds
    torch.testing.assert_close(clip(small), embeds, rtol=0, atol=1e-5)
    assert (clip.dim, clip.kernel) == (16, CMMD)
    for name in ("clip", "dinov2"):
        with pytest.raises(ModelError, match=f"the extractor {name} needs a folder of transformers"):
            load_extractor(name)


def test_cmmd_is_the_mean_over_pairs_of_a_gaussian_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1) for n in (7, 7))

    def k(a: Tensor, b: Tensor) -> float:
        return float(1000 * torch.exp(-((a - b) ** 2).sum() / 200))

    off = [(i, j) for i in range(7) for j in range(7) if i != j]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in off) / len(off)
    across = sum(k(a, b) for a in x for b in y) / 49
    assert float(kernel_distance(x, y, kernel=CMMD)) == pytest.approx(within - 2 * across, abs=1e-9)
    unpaired = sum(k(x[i], y[j]) for i, j in off) / len(off)
    assert float(paired_kernel_distance(x, y, kernel=CMMD)) == pytest.approx(within - 2 * unpaired, abs=1e-9)


def test_what_a_score_lost_is_measured_pair_by_pair(folder: Path, tmp_path: Path) -> None:
    """Its interval is that of the differences, which is far narrower than those of the scores."""
    scorers = [load_scorer("ssim"), load_scorer("tests.unit.metrics.test_quality:brightness")]
    full = pictures(6, 24, 24).float() / 127.5 - 1
    extractor = load_extractor("clip", weights=folder)
    base = reference_of(full, extractor, tmp_path, labels=[f"prompt {i}" for i in range(6)], scorers=scorers)
    found = evaluate(batches_of(full * 0.9, labels=[f"prompt {i}" for i in range(6)]), base).metrics
    lost, score = found["brightness_drop"], found["brightness"]
    assert lost.value == pytest.approx(base.evaluation().metrics["brightness"].value - score.value)
    assert lost.high - lost.low < (score.high - score.low) / 2
    assert not lost.higher_is_better
    assert {"ssim", "cmmd_fp", "fd_fp"} <= set(found)
    assert not {"kid_fp", "ssim_drop"} & set(found)
    assert found["cmmd_fp"].name.startswith("CMMD[clip@")
    assert "ssim" not in base.evaluation().metrics


def brightness(images: Tensor, prompts: list[Label], _reference: Any) -> Tensor:
    assert all(isinstance(prompt, str) for prompt in prompts)
    return images.double().flatten(1).mean(1)


def endless(images: Tensor, _prompts: list[Label], _reference: Any) -> Tensor:
    return torch.tensor([1.0, torch.inf, *[2.0] * (len(images) - 2)])


def one_number(_images: Tensor, _prompts: list[Label], _reference: Any) -> Tensor:
    return torch.tensor(3.0)


def test_a_score_that_is_no_number_names_the_seed_and_the_prompt(tmp_path: Path) -> None:
    full = pictures(3, 24, 24).float() / 127.5 - 1
    extractor, here = load_extractor("random-conv"), "tests.unit.metrics.test_quality"
    asked: list[Label] = ["a cat", "a dog", "a bird"]
    with pytest.raises(NumericsError, match=r"endless .*of the sample of seed 1 \('a dog'\) are not finite"):
        reference_of(full, extractor, tmp_path / "a", labels=asked, scorers=[load_scorer(f"{here}:endless")])
    with pytest.raises(ConfigError, match=r"one_number .*gave \(\) numbers for 3 pictures"):
        reference_of(full, extractor, tmp_path / "b", labels=asked, scorers=[load_scorer(f"{here}:one_number")])


def test_scorers_by_name(tmp_path: Path) -> None:
    for text, error, message in (
        ("lpip:x.pth", UnknownNameError, r"unknown scorer 'lpip:x\.pth'"),
        ("lpips", ConfigError, "the scorer lpips needs a file of torchvision: alexnet-owt"),
        ("ssim:x", ConfigError, "the scorer ssim takes no path, got 'x'"),
        ("clip:nowhere", ModelError, r"nowhere.* has no config\.json"),
        ("tests.unit.metrics.test_quality:nothing", ModelError, "has no attribute 'nothing'"),
    ):
        with pytest.raises(error, match=message):
            load_scorer(text)
    assert scorer_inputs("ssim") == ("ssim", {})
    name, files = scorer_inputs("tests.unit.metrics.test_quality:brightness")
    assert name.endswith(":brightness")
    assert [file.name for file in files.values()] == ["test_quality.py"]
