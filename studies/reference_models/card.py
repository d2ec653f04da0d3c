"""Measure the trained reference models and write their model cards, reference statistics and sample grids into the
package.

    python studies/reference_models/card.py fmnist-cnn     # first: the others are judged with it
    python studies/reference_models/card.py fmnist-unet
    python studies/reference_models/card.py fmnist-dit

Guided DDIM samples, seeds 0..999; the asked class is judged by ``fmnist-cnn``. The Fréchet distance to the training
data stands beside the one between two disjoint halves of the real data at the same sample count, so that one sees what
is noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from fashion_mnist import DEFAULT_DIR, load
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from train import PACKAGE, RECIPES

from mpqsearch.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    frechet_distance,
    load_extractor,
    load_reference,
    save_reference,
)
from mpqsearch.sampling import SamplerSpec, latents, load_model, to_uint8

CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LICENCE = (
    "Weights: Apache-2.0, as this package. Trained on Fashion-MNIST (MIT licence, copyright 2017 Zalando SE, "
    "https://github.com/zalandoresearch/fashion-mnist)."
)


def classifier_card(data_dir: Path) -> str:
    """Test accuracy and reference statistics of the classifier."""
    extractor = load_extractor("fmnist-cnn")
    (accuracy,) = extractor.scorers
    images, labels = load("t10k", data_dir)
    hits = torch.cat(
        [
            accuracy.score(part, truth.tolist(), None)
            for part, truth in zip(images.split(500), labels.split(500), strict=True)
        ]
    )
    train_images, _ = load("train", data_dir)
    features = extractor(train_images)
    name = "Fashion-MNIST train, 60,000 images"
    save_reference(PACKAGE / "fmnist-cnn/reference.safetensors", features, extractor, name)
    halves = torch.randperm(60_000, generator=torch.Generator().manual_seed(0)).chunk(2)
    distance = frechet_distance(*(FeatureStatistics.of(features[h]) for h in halves))
    return "\n".join(
        [
            "# fmnist-cnn",
            "",
            (
                "A convolutional classifier of 28x28 grey images; its 64 penultimate features are the embedded feature "
                "extractor"
            ),
            f"(`{extractor.label}`).",
            "",
            f"- Test accuracy: {100 * float(hits.double().mean()):.2f} % of {len(hits):,} images of the test split.",
            (
                f"- `reference.safetensors`: mean and covariance of the features over {name}, and 2,000 of the "
                "features (seed 0)."
            ),
            f"- Fréchet distance between two random halves of the training images (30,000 each): {distance:.4f}.",
            *training_lines("fmnist-cnn"),
            "",
        ]
    )


def denoiser_card(name: str, data_dir: Path, samples: int, steps: int, guidance: float) -> str:
    """Class accuracy, distances and a grid of guided samples."""
    extractor = load_extractor("fmnist-cnn")
    (accuracy,) = extractor.scorers
    denoiser = load_model(name, sampler=SamplerSpec(name="ddim", steps=steps, guidance=guidance, batch=100))
    with tqdm(total=samples, desc=name) as bar:
        drawn = to_uint8(latents(denoiser, range(samples), progress=bar.update))
    labels = torch.tensor(denoiser.runner.labels(range(samples)))
    hits = accuracy.score(drawn, labels.tolist(), None)
    by_class = {CLASSES[c]: float(hits[labels == c].double().mean()) for c in range(10)}
    save_grid(drawn[:100], PACKAGE / name / "samples.png")
    reference = load_reference(None, extractor)
    assert reference is not None
    distance = frechet_distance(reference.statistics, FeatureStatistics.of(extractor(drawn)))
    real = real_distances(extractor, data_dir, samples)
    parameters = sum(p.numel() for p in denoiser.module.parameters())
    return "\n".join(
        [
            f"# {name}",
            "",
            (
                f"A class-conditional `diffusers.{type(denoiser.module).__name__}` with {parameters:,} parameters "
                "(stored in half precision),"
            ),
            "28x28 grey, epsilon prediction, label 10 is the null class of classifier-free guidance.",
            "",
            (
                f"Measured on {samples} DDIM samples of {steps} steps, guidance {guidance:g}, seeds 0..{samples - 1}, "
                "class = seed mod 10:"
            ),
            "",
            f"- asked class recognised by fmnist-cnn: {100 * float(hits.double().mean()):.1f} %",
            f"  ({', '.join(f'{k} {100 * v:.0f}' for k, v in by_class.items())});",
            f"- FD[{extractor.label}]-{samples} vs data (60,000 training images): {distance:.3f};",
            f"- the same between {samples} real test images and the training images: {real[0]:.3f},",
            f"  and between two disjoint sets of {samples} real training images: {real[1]:.3f}.",
            "",
            "These distances are not comparable with a published FID, which uses other features.",
            *training_lines(name),
            "",
            "![100 samples, seeds 0..99, one class a column](samples.png)",
            "",
        ]
    )


def real_distances(extractor: FeatureExtractor, data_dir: Path, n: int) -> tuple[float, float]:
    """Distance of ``n`` real test images to the training statistics, and of two disjoint sets of ``n`` training
    images."""
    reference = load_reference(None, extractor)
    assert reference is not None
    test, _ = load("t10k", data_dir)
    train, _ = load("train", data_dir)
    pick = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:n]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    halves = [FeatureStatistics.of(extractor(train[order[k * n : (k + 1) * n]])) for k in range(2)]
    return frechet_distance(reference.statistics, FeatureStatistics.of(extractor(test[pick]))), frechet_distance(
        *halves
    )


def training_lines(name: str) -> list[str]:
    """How the weights were made: command, seed, recipe, losses."""
    log = Path("runs/reference") / name / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    marks = [rows[round(i * (len(rows) - 1) / 6)] for i in range(7)] if rows else []
    curve = ", ".join(f"{r['loss']:.4f} at {r['step']}" for r in marks) or "see log.jsonl of the run"
    return [
        "",
        "## Training",
        "",
        f"- Command: `python studies/reference_models/train.py {name}` and the same with `--export`, seed 0.",
        (
            f"- Recipe: {', '.join(f'{k} {v}' for k, v in RECIPES[name].items())}; AdamW, cosine decay, averaged "
            "weights; float32 on one CPU thread."
        ),
        f"- Loss (running mean): {curve}.",
        f"- This card: `python studies/reference_models/card.py {name}`.",
        "",
        LICENCE,
    ]


def save_grid(images: Tensor, path: Path, columns: int = 10, scale: int = 2) -> None:
    """Write ``uint8 [N, 1, H, W]`` as one picture."""
    rows = images[:, 0].reshape(-1, columns, 28, 28).permute(0, 2, 1, 3).reshape(-1, columns * 28)
    picture = Image.fromarray(rows.numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    options = parser.parse_args()
    if options.name == "fmnist-cnn":
        text = classifier_card(options.data_dir)
    else:
        text = denoiser_card(options.name, options.data_dir, options.samples, options.steps, options.guidance)
    (PACKAGE / options.name / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
