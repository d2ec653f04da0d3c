"""Train the networks of the robustness study on data that are made, not stored.

    python -m studies.robustness.train colour-unet    # or cloud-mixer, sound-net; continues where it stopped

Each takes a few minutes of one core. Data, noise and timesteps of step ``k`` come from a generator seeded by
``(seed, k)``, so a run that was killed and continued equals one that was not. The averaged weights go to ``weights/``
in half precision, samples to ``samples/``, and a line with the loss to ``training.csv``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from studies.robustness.models import NETWORKS, WEIGHTS, scheduler_of

HERE = Path(__file__).resolve().parent
HELD_OUT = 10_000_000
"""Seed of the pictures and noises that the loss is measured on after training."""

RECIPE: dict[str, Any] = {"steps": 1200, "batch": 16, "lr": 1.5e-3}
"""The same for all three; none was tuned."""

SAVE_EVERY = 200


def shapes(n: int, generator: torch.Generator) -> Tensor:
    """``[n, 3, 16, 16]`` in [-1, 1]: two discs or boxes in colours of their own on a floor that gets lighter below."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    floor = torch.rand(n, 3, 1, 1, generator=generator) * 0.6 - 0.8
    canvas = floor + 0.2 * y
    for _ in range(2):
        centre = torch.rand(n, 2, 1, 1, generator=generator) * 1.2 - 0.6
        radius = 0.2 + 0.3 * torch.rand(n, 1, 1, generator=generator)
        dx, dy = (x - centre[:, 0]).abs(), (y - centre[:, 1]).abs()
        boxed = torch.rand(n, 1, 1, generator=generator) < 0.5
        away = torch.where(boxed, torch.maximum(dx, dy), (dx.square() + dy.square()).sqrt())
        cover = ((radius - away) * 12 + 0.5).clamp(0, 1)[:, None]
        colour = torch.rand(n, 3, 1, 1, generator=generator) * 2 - 1
        canvas = cover * colour + (1 - cover) * canvas
    return canvas.clamp(-1, 1)


def clouds(n: int, generator: torch.Generator) -> Tensor:
    """``[n, 3, 16, 16]`` in [-1, 1]: smooth fields of each colour, nine cosines wide, through a tanh."""
    waves = torch.arange(3)
    cosines = torch.cos(math.pi * waves[:, None] * (torch.arange(16) + 0.5) / 16)  # [3, 16]
    sizes = 1.2 / (1 + waves[:, None] + waves)
    field = torch.randn(n, 3, 3, 3, generator=generator) * sizes
    return torch.einsum("ncij,iy,jx->ncyx", field, cosines, cosines).tanh()


def sounds(n: int, generator: torch.Generator) -> Tensor:
    """``[n, 1, 256]``: a damped chirp and a damped sine, begun at random times."""
    t = torch.linspace(0, 1, 256)
    total = torch.zeros(n, 256)
    for chirp in (20.0, 0.0):
        began, rate, amplitude, sweep, phase, decay = torch.rand(6, n, 1, generator=generator)
        since = (t - 0.3 * began).clamp(min=0)
        cycles = (4 + 16 * rate) * since + chirp * (sweep - 0.5) * since.square()
        envelope = (0.4 + 0.6 * amplitude) * torch.exp(-4 * decay * since) * (since > 0)
        total += envelope * torch.sin(2 * math.pi * (cycles + phase))
    return total[:, None] * 0.7


DATA = {"colour-unet": shapes, "cloud-mixer": clouds, "sound-net": sounds}


def loss_of(name: str, model: nn.Module, n: int, alpha_bar: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the prediction on ``n`` new samples, one at each n-th of the timesteps."""
    data = DATA[name](n, generator)
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long().clamp(max=999)
    noise = torch.randn(data.shape, generator=generator)
    a = alpha_bar[t].view(-1, *[1] * (data.dim() - 1))
    noisy = a.sqrt() * data + (1 - a).sqrt() * noise
    velocity = scheduler_of(name)["prediction_type"] == "v_prediction"
    target = a.sqrt() * noise - (1 - a).sqrt() * data if velocity else noise
    return F.mse_loss(model.denoise(noisy, t), target)  # type: ignore[operator]


def train(name: str, out: Path, seed: int) -> dict[str, Any]:
    """Run or continue a recipe; returns the averaged weights' loss on held-out samples, with what led to it."""
    from diffusers import DDIMScheduler

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model, averaged = NETWORKS[name](), NETWORKS[name]()
    averaged.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE["lr"])
    alpha_bar = DDIMScheduler.from_config(scheduler_of(name)).alphas_cumprod
    start, seconds = load_state(out, model, averaged, optimizer)
    began = time.process_time() - seconds
    for step in range(start, RECIPE["steps"]):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        warm, done = min(1.0, (step + 1) / 100), step / RECIPE["steps"]
        for group in optimizer.param_groups:
            group["lr"] = RECIPE["lr"] * warm * 0.5 * (1 + math.cos(math.pi * done))
        loss = loss_of(name, model, RECIPE["batch"], alpha_bar, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average(averaged, model, min(0.998, (1 + step) / (10 + step)))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == RECIPE["steps"]:
            seconds = time.process_time() - began
            print(f"{name}: step {step + 1}, loss {loss.item():.4f}, {seconds:.0f} s of processor", flush=True)
            save_state(out, step + 1, seconds, model, averaged, optimizer)
    with torch.no_grad():
        held_out = loss_of(name, averaged, 1000, alpha_bar, torch.Generator().manual_seed(HELD_OUT))
    half = {key: value.half().contiguous() for key, value in averaged.state_dict().items()}
    WEIGHTS.mkdir(exist_ok=True)
    save_file(half, WEIGHTS / f"{name}.safetensors")
    row = {"model": name, "weights": sum(v.numel() for v in half.values()), **RECIPE, "seed": seed}
    return row | {"held_out_loss": round(float(held_out), 5), "cpu_seconds": round(seconds)}


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights towards the present ones."""
    for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def save_state(
    out: Path, step: int, seconds: float, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write everything that a resumed run needs, atomically."""
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"averaged/{k}": v for k, v in averaged.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v) for k, v in state.items()}
    temporary = out / f".state.{os.getpid()}.safetensors"
    metadata = {"step": str(step), "seconds": str(seconds)}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, metadata=metadata)
    temporary.replace(out / "state.safetensors")


def load_state(out: Path, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restore a state written by `save_state`; returns finished steps and their seconds (0 for a fresh start)."""
    path = out / "state.safetensors"
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
    averaged.load_state_dict({k[9:]: v for k, v in tensors.items() if k.startswith("averaged/")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, field = key.split("/")
            state.setdefault(int(i), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata["seconds"])


def show(name: str) -> None:
    """Draw data above samples of the trained model into ``samples/<name>.png``."""
    import matplotlib.pyplot as plt

    from mpqsearch.sampling import latents, load_model

    made = latents(load_model(f"studies.robustness.models:{name.replace('-', '_')}"), range(12))
    data = DATA[name](12, torch.Generator().manual_seed(HELD_OUT))
    figure, axes = plt.subplots(2, 12, figsize=(12, 2.2))
    for row, values in zip(axes, (data, made), strict=True):
        for axis, sample in zip(row, values, strict=True):
            if sample.dim() == 3:
                axis.imshow(((sample.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            else:
                axis.plot(sample[0].numpy(), lw=0.6)
                axis.set_ylim(-1.5, 1.5)
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 0].set_ylabel("data")
    axes[1, 0].set_ylabel("samples")
    figure.tight_layout(pad=0.3)
    (HERE / "samples").mkdir(exist_ok=True)
    figure.savefig(HERE / "samples" / f"{name}.png", dpi=70)


def note(row: dict[str, Any]) -> None:
    """Put one row into ``training.csv``, in the place of an earlier one of the model."""
    path = HERE / "training.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []
    rows = [r for r in rows if r["model"] != row["model"]] + [row]
    rows.sort(key=lambda r: list(NETWORKS).index(r["model"]))
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the training state goes (default: runs/robustness/NAME)")
    options = parser.parse_args()
    note(train(options.name, options.out or Path("runs/robustness") / options.name, options.seed))
    show(options.name)


if __name__ == "__main__":
    main()
