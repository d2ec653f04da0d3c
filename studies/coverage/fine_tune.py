"""What a fine-tune loses when it takes the sensitivities of its base (`calibration.reuse`).

Run from the repository root: ``python -m studies.coverage.fine_tune``. The base is `fmnist-unet`; a fine-tune is that
model after 200 steps of AdamW (learning rate 2e-4, batch 16) on about 128 of its own samples of classes 0 to 4, as
negatives, so that weights and inputs change. Maps are `ilp-channel` at the bytes of 2 and 3 bits, from the fine-tune's
own profile and from the base's sensitivities with the fine-tune's errors, beside uniform ones. Each is measured on 64
samples of the fine-tune. Writes `fine_tune.csv`, seed 0.
"""

from __future__ import annotations

import csv
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mpqsearch as mpq
from mpqsearch.core import Policy, QuantFormat, SensitivityProfile
from mpqsearch.methods import MethodSpec
from mpqsearch.models import Denoiser
from mpqsearch.profile import profile_model
from mpqsearch.sampling import samples
from mpqsearch.specs import CalibrationSpec

TABLE = Path(__file__).with_name("fine_tune.csv")
SEED, STEPS, BATCH, RATE = 0, 200, 16, 2e-4
COLUMNS = ("seed", "budget", "profile", "seconds", "psnr", "fd_fp")
UNIFORM = MethodSpec(name="uniform", allocator="uniform", scheme="auto", bias_correction=True)
OURS = MethodSpec(name="ilp-channel", allocator="ilp-channel", scheme="auto", bias_correction=True, loss="sampler")
CALIBRATION = CalibrationSpec(context_seeds=0)


def fine_tuned(seed: int) -> Denoiser:
    """The model after training to predict the noise in negatives of its own samples."""
    from diffusers import DDPMScheduler

    model = mpq.load("fmnist-unet")
    generator = torch.Generator().manual_seed(seed)
    schedule = DDPMScheduler.from_config(model.runner.files()["scheduler_config.json"])
    drawn = [d for d in samples(model, range(10_000_000, 10_000_256)) if d.labels is not None]
    images = torch.cat([d.latents for d in drawn])
    labels = torch.tensor([int(label) for d in drawn for label in d.labels])
    images, labels = -images[labels < 5], labels[labels < 5]
    module = model.module.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE)
    for _ in range(STEPS):
        at = torch.randint(len(images), (BATCH,), generator=generator)
        times = torch.randint(schedule.config.num_train_timesteps, (BATCH,), generator=generator)
        noise = torch.randn(images[at].shape, generator=generator)
        predicted = module(schedule.add_noise(images[at], noise, times), times, class_labels=labels[at]).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
    module.eval().requires_grad_(False)
    return replace(model, digest=f"fine-tune {seed}")


def profiles(tuned: Denoiser, base: SensitivityProfile) -> dict[str, tuple[float, SensitivityProfile]]:
    """The fine-tune's profile in two ways, with the seconds that each took."""
    table, found = mpq.discover(tuned), {}
    for name, known in (("its own", None), ("sensitivities of its base", base)):
        began = time.perf_counter()
        made = profile_model(tuned, table, Policy(), CALIBRATION, QuantFormat(), known=known)
        found[name] = (time.perf_counter() - began, made)
    return found


def rows(seed: int, base: SensitivityProfile) -> list[dict[str, Any]]:
    tuned = fine_tuned(seed)
    made = profiles(tuned, base)
    tried = [(name, seconds, profile, OURS) for name, (seconds, profile) in made.items()]
    tried.append(("none: uniform", 0.0, made["its own"][1], UNIFORM))
    found = []
    for budget in ("uniform:2", "uniform:3"):
        for name, seconds, profile, method in tried:
            small = mpq.quantize(tuned, mpq.allocate(tuned, profile, budget, method=method), profile)
            values = {
                k: v.value for k, v in mpq.evaluate(tuned, small, seeds=range(64), progress=False).metrics.items()
            }
            cells = (seed, budget, name, round(seconds), f"{values['paired_psnr']:.2f}", f"{values['fd_fp']:.4g}")
            found.append(dict(zip(COLUMNS, cells, strict=True)))
            print(found[-1], flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    model = mpq.load("fmnist-unet")
    base = profile_model(model, mpq.discover(model), Policy(), CALIBRATION, QuantFormat())
    with TABLE.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(SEED, base))


if __name__ == "__main__":
    main()
