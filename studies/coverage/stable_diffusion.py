"""A pipeline of the size of Stable Diffusion 1.5 with random weights through profile, allocate and evaluate: time and
peak memory of each command, in a process of its own.

Run from the repository root, whose tests it uses: ``python -m studies.coverage.stable_diffusion FOLDER [COMMAND ...]``.
The pipeline (2.1 GB, fp16) and the run folder are written under FOLDER; with commands, only those are measured again.
Needs about 16 GB of memory.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpqsearch.cli.init import presets

HERE = Path(__file__).parent
TABLE = HERE / "stable_diffusion.csv"
PAGE = HERE.parent / "guides" / "pipelines.md"
COLUMNS = ("command", "wall_seconds", "cpu_seconds", "peak_gigabytes")
START, END = (
    "<!-- stable diffusion: made by studies/coverage/stable_diffusion.py -->",
    "<!-- end of stable diffusion -->",
)
AUTOENCODER: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
"""The text encoder; its vocabulary of 49,408 is of random vectors, of which the tokenizer of characters uses 514."""
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STUDY = """
[model]
source = "{folder}/model"
memory_limit = "{limit}"
[policy]
widths = [2, 3, 4, 8]
[sampler]
steps = 2
guidance = 7.5
batch = 1
call = {{ height = 512, width = 512 }}
[calibration]
granularity = "layer"
samples = 1
schemes = ["auto"]
checkpoint = true
[allocate]
budgets = ["uniform:4"]
[[methods]]
name = "ilp-layer"
allocator = "ilp-layer"
scheme = "auto"
[evaluate]
samples = 2
extractor = "random-conv"
"""
LIMIT = "1GB"
PROMPTS = ("a lighthouse at dusk", "two red cats", "a bowl of fruit", "rain on a tin roof")


def write_pipeline(folder: Path) -> None:
    """Structure and sizes of Stable Diffusion 1.5, weights as the classes draw them, with seed 0."""
    import diffusers
    import torch
    import transformers

    from tests.support.pipelines.parts import clip_tokenizer

    torch.manual_seed(0)
    (unet,) = (p["shapes"]["Stable Diffusion 1.5"] for p in presets()["preset"] if p["name"] == "Stable Diffusion 1.5")
    text = transformers.CLIPTextConfig(**CLIP_L, projection_dim=768)
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**AUTOENCODER).half(),
        text_encoder=transformers.CLIPTextModel(text).half(),
        tokenizer=clip_tokenizer(),
        unet=diffusers.UNet2DConditionModel(**unet).half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


def measured(words: Sequence[str | Path]) -> dict[str, str]:
    """One command of mpqsearch in a process of its own."""
    command, began = str(words[0]), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mpqsearch.cli", *words])
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if process_failed := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command} failed with {process_failed}")
    values = (command, f"{wall:.0f}", f"{used.ru_utime + used.ru_stime:.0f}", f"{used.ru_maxrss / 1e6:.1f}")
    return dict(zip(COLUMNS, values, strict=True))


def write(rows: dict[str, dict[str, str]]) -> None:
    """The table as a file and in the guide."""
    with TABLE.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    lines = ["| command | wall s | CPU s | peak memory, GB |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows.values()]
    page = PAGE.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text("\n".join([before + START, *lines, END]) + after)


def main() -> None:
    folder, asked = Path(sys.argv[1]).resolve(), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, str]] = {}
    if asked:
        with TABLE.open(newline="") as handle:
            rows = {row["command"]: row for row in csv.DictReader(handle)}
    else:
        shutil.rmtree(folder / "run", ignore_errors=True)
    if not (folder / "model" / "prompts.txt").is_file():
        write_pipeline(folder / "model")
    (folder / "study.toml").write_text(STUDY.format(folder=json.dumps(str(folder))[1:-1], limit=LIMIT))
    for command in asked or ("profile", "allocate", "evaluate"):
        rows[command] = measured((command, "-c", folder / "study.toml", "--run-dir", folder / "run"))
        write(rows)


if __name__ == "__main__":
    main()
