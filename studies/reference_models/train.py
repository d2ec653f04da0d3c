"""Train the embedded reference models on Fashion-MNIST: ``fmnist-cnn``, ``fmnist-unet``, ``fmnist-dit``.

    python studies/reference_models/train.py fmnist-unet            # train, or continue where it stopped
    python studies/reference_models/train.py fmnist-unet --export   # write the weights into the package

Seeded and resumable: batch, noise, timesteps and label dropout of step ``k`` come from a generator seeded by
``(seed, k)``, so a run that was killed and continued equals one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion_mnist import DEFAULT_DIR, load, to_unit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mpqsearch.models.classifier import FashionClassifier

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "mpqsearch" / "models" / "reference"
NULL_CLASS = 10

UNET = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [24, 48, 80],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "num_class_embeds": NULL_CLASS + 1,
}
DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 5,
    "sample_size": 28,
    "patch_size": 4,
    "num_embeds_ada_norm": NULL_CLASS,  # the embedding table adds the null class itself
    "norm_num_groups": 1,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
}
RECIPES: dict[str, dict[str, Any]] = {
    "fmnist-cnn": {"steps": 4500, "batch": 128, "lr": 3e-3, "ema": 0.99, "warmup": 100, "weight_decay": 5e-4},
    "fmnist-unet": {"steps": 2600, "batch": 64, "lr": 1.2e-3, "ema": 0.998, "warmup": 100, "weight_decay": 0.0},
    "fmnist-dit": {"steps": 6000, "batch": 64, "lr": 1.0e-3, "ema": 0.999, "warmup": 200, "weight_decay": 0.0},
}


def build(name: str) -> nn.Module:
    """The untrained network of a recipe."""
    from diffusers import DiTTransformer2DModel, UNet2DModel

    if name == "fmnist-cnn":
        return FashionClassifier()
    if name == "fmnist-unet":
        return UNet2DModel(**UNET)
    model = DiTTransformer2DModel(**DIT)
    for key, parameter in model.named_parameters():  # adaLN-Zero: every block starts as the identity (DiT, section 3.2)
        if ".norm1.linear." in key or key.startswith(("proj_out_1.", "proj_out_2.")):
            nn.init.zeros_(parameter)
    return model


def loss_of(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, alpha_bar: Tensor, gen: torch.Generator
) -> Tensor:
    """One batch's training loss; every random draw comes from ``gen``."""
    if name == "fmnist-cnn":
        flip = torch.rand(len(images), 1, 1, 1, generator=gen) < 0.5
        return F.cross_entropy(model(torch.where(flip, images.flip(3), images)), labels)
    n = images.shape[0]
    # Stratified timesteps: one per n-th of the range, which lowers the variance of the loss at no cost.
    u = (torch.arange(n) + torch.rand(n, generator=gen)) / n
    t = (u * 1000).long().clamp(max=999)
    noise = torch.randn(images.shape, generator=gen)
    drop = torch.rand(n, generator=gen) < 0.1  # classifier-free guidance
    labels = torch.where(drop, NULL_CLASS, labels)
    a = alpha_bar[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * images + (1 - a).sqrt() * noise
    return F.mse_loss(model(noisy, t, class_labels=labels).sample, noise)


def train(name: str, data_dir: Path, out: Path, seed: int) -> None:
    """Run or continue a recipe; leaves ``state.safetensors``, ``state.json`` and ``log.jsonl`` in ``out``."""
    from diffusers import DDIMScheduler

    recipe = RECIPES[name]
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    images, labels = load("train", data_dir)
    model = build(name)
    model.train(
        name == "fmnist-cnn"
    )  # eval mode elsewhere: DiT's own per-block label dropout would disagree between blocks
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=recipe["weight_decay"])
    alpha_bar = DDIMScheduler.from_config(SCHEDULER).alphas_cumprod
    start = load_state(out, model, ema, optimizer)
    log = (out / "log.jsonl").open("a")
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], desc=name, mininterval=5)
    began, recent = time.time(), 0.0
    for step in bar:
        gen = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(0, len(images), (recipe["batch"],), generator=gen)
        rate = recipe["lr"] * min(1.0, (step + 1) / recipe["warmup"])
        rate *= 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(name, model, to_unit(images[index]), labels[index], alpha_bar, gen)
        if not torch.isfinite(loss):
            raise SystemExit(
                f"{name}: the loss is {loss.item()} at step {step}; lower the learning rate and start again"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(recipe["ema"], (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    ema[key].lerp_(value, 1 - decay)
                else:
                    ema[key].copy_(value)
        recent = loss.item() if step == start else 0.98 * recent + 0.02 * loss.item()
        bar.set_postfix(loss=f"{recent:.4f}")
        if (step + 1) % 50 == 0:
            log.write(
                json.dumps({"step": step + 1, "loss": round(recent, 6), "seconds": round(time.time() - began, 1)})
                + "\n"
            )
            log.flush()
        if (step + 1) % 200 == 0 or step + 1 == recipe["steps"]:
            save_state(out, step + 1, model, ema, optimizer)


def save_state(
    out: Path, step: int, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write everything that a resumed run needs, atomically."""
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()} | {f"ema/{k}": v for k, v in ema.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v) for k, v in state.items()}
    temporary = out / f".state.{os.getpid()}.safetensors"
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(out / "state.safetensors")


def load_state(out: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restore a state written by `save_state`; returns the number of finished steps (0 for a fresh start)."""
    from safetensors import safe_open

    path = out / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as handle:
        step = int(handle.metadata()["step"])
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
    for key, value in ema.items():
        value.copy_(tensors[f"ema/{key}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, field = key.split("/")
            state.setdefault(int(i), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def export(name: str, out: Path) -> None:
    """Write the averaged weights into the package as float16 safetensors with their configuration."""
    tensors = {k[4:]: v for k, v in load_file(out / "state.safetensors").items() if k.startswith("ema/")}
    folder = PACKAGE / name
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in tensors.items()}
    if name == "fmnist-cnn":
        save_file(half, folder / "model.safetensors")
        return
    model = build(name)
    model.load_state_dict(tensors)
    model.half().save_pretrained(folder, safe_serialization=True)
    (folder / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", **SCHEDULER}, indent=2) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, help="where the training state goes (default: runs/reference/NAME)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", action="store_true", help="write the trained weights into the package")
    options = parser.parse_args()
    out = options.out or Path("runs/reference") / options.name
    if options.export:
        export(options.name, out)
    else:
        train(options.name, options.data_dir, out, options.seed)


if __name__ == "__main__":
    main()
