"""Weight-only profile of a U-Net of Stable Diffusion 1.5's size from disk: seconds, memory, and ratios measured in one
run.

python -m pytest tests/benchmarks/test_streaming_benchmark.py --benchmark-enable --benchmark-only -s        (or: make
benchmark)

The weights are random, in bf16, written to a temporary folder of 1.7 GB. Peak memory is that of a child process that
does nothing else.

python -m tests.benchmarks.test_streaming_benchmark FOLDER 14    profiles every 14th layer only and scales its time up
by weights
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpqsearch.core import Policy, QuantFormat
from mpqsearch.models import discover_streamed, open_streamed
from mpqsearch.profile import profile_weights
from mpqsearch.quant import rows_of
from mpqsearch.quant.rows import row_summary
from tests.benchmarks.test_range_search import loop

CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""The configuration of the U-Net of Stable Diffusion 1.5."""

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
SCHEMES = ("asymmetric", "auto")
SAMPLE = 40
"""Layers of which the naive loop runs on one channel; its time is scaled up to all channels of the layer, then to all
layers."""


def write_model(folder: Path) -> None:
    """The configuration, and random weights of unit fan-in variance with a heavy-tailed few, as one bf16 file."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(CONFIG)
    g = torch.Generator().manual_seed(0)
    weights = {}
    for key, meta in module.state_dict().items():
        fan_in = max(1, meta[0].numel()) if meta.dim() > 1 else 1
        values = torch.empty(meta.shape, dtype=torch.float32).normal_(0, fan_in**-0.5, generator=g)
        weights[key] = values.bfloat16()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def read_once(folder: Path) -> None:
    """One pass over the bytes of the weights, in as many threads as torch uses, each with a buffer of 16 MB."""
    path, threads = folder / "diffusion_pytorch_model.safetensors", torch.get_num_threads()
    edges = [path.stat().st_size * i // threads for i in range(threads + 1)]

    def read(start: int, stop: int) -> None:
        buffer = memoryview(bytearray(1 << 24))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < stop:
                start += file.readinto(buffer[: stop - start]) or stop

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, edges[:-1], edges[1:]):
            pass


class Clock:
    """Wall seconds and seconds of all cores together of a block: the latter do not depend on what else the machine
    does."""

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_error: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def best(rounds: int, work: Any) -> dict[str, float]:
    """The least times of several rounds."""
    times = []
    for _ in range(rounds):
        with Clock() as clock:
            work()
        times.append((clock.wall, clock.cpu))
    return {"wall": min(t[0] for t in times), "cpu": min(t[1] for t in times)}


def profile(folder: str, every: int = 1) -> dict[str, Any]:
    """All measurements of one process: called in a child, so that the peak is its own. Times of a part of the layers
    are scaled up."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    read_once(Path(folder))  # into the page cache, so that all passes below read the same way
    found["read"] = best(5, lambda: read_once(Path(folder)))
    model = open_streamed(folder)
    with Clock() as clock:
        table = discover_streamed(model)
    found["discover"] = {"wall": clock.wall, "cpu": clock.cpu}
    found["channels"], found["weights"] = table.n_channels, table.n_weights
    row_summary(torch.randn(64, 2048).bfloat16())  # loads the compiled kernels

    def kurtosis() -> None:
        for layer in table:
            row_summary(rows_of(model.read(f"{layer.name}.weight"), layer))

    found["kurtosis"] = best(5, kurtosis)
    part = replace(table, layers=table.layers[::every])
    with Clock() as clock:
        made = profile_weights(model, part, Policy(widths=WIDTHS), SCHEMES, QuantFormat())
    scale = table.n_weights / part.n_weights
    found["profile"] = {"wall": clock.wall * scale, "cpu": clock.cpu * scale}
    found["measured"] = part.n_weights
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert made.arrays["weight_error/auto"].shape == (part.n_channels, len(WIDTHS))

    channels, seconds = 0, 0.0
    for layer in list(table)[:: max(every, len(table) // SAMPLE)]:
        row = rows_of(model.read(f"{layer.name}.weight"), layer)[0].float()
        with Clock() as clock:
            for bits in WIDTHS:
                loop(row, bits)
        seconds += clock.cpu * layer.n_channels
        channels += layer.n_channels
    found["loop"] = seconds / channels * table.n_channels
    return found


def show(found: dict[str, Any]) -> None:
    """Print a run as a table."""

    def row(what: str, key: str) -> str:
        return f"| {what} | {found[key]['wall']:.2f} | {found[key]['cpu']:.2f} |"

    ratio = {clock: found["kurtosis"][clock] / found["read"][clock] for clock in ("wall", "cpu")}
    share = "" if found["measured"] == found["weights"] else f", scaled up from {found['measured'] / 1e6:.0f} M weights"
    rows = [
        row("one read of the file through buffers, from the page cache", "read"),
        row("discovery, with the digest of all weights", "discover"),
        row("kurtosis of all rows", "kurtosis"),
        row(f"profile at {len(WIDTHS)} widths, schemes {' and '.join(SCHEMES)}{share}", "profile"),
        f"| naive loop, affine alone, one channel of some layers, scaled up | | {found['loop']:.0f} |",
    ]
    print(
        f"\n{found['weights'] / 1e6:.0f} M weights in bf16, {found['channels']} channels, {found['threads']} threads\n"
        "| what | wall s | CPU s |\n|---|---|---|\n"
        + "\n".join(rows)
        + f"\nkurtosis against reading: {ratio['wall']:.1f} (wall), "
        f"{ratio['cpu']:.1f} (CPU); loop against profile (CPU): {found['loop'] / found['profile']['cpu']:.0f}; "
        f"peak memory {found['peak'] / 1e9:.2f} GB"
    )


@pytest.mark.benchmark(group="streaming")
@pytest.mark.timeout(3600)
def test_profile_of_the_weights_of_a_unet_of_stable_diffusion_size(benchmark: Any, tmp_path: Path) -> None:
    write_model(tmp_path)
    code = (
        "import json, sys; from tests.benchmarks.test_streaming_benchmark import profile; "
        f"print(json.dumps(profile({str(tmp_path)!r})), file=sys.stdout)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }

    def child() -> dict[str, Any]:
        out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        made: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
        return made

    found = benchmark.pedantic(child, rounds=1, warmup_rounds=0)
    show(found)
    assert found["channels"] == 318_404
    assert found["loop"] / found["profile"]["cpu"] >= 50
    assert found["peak"] < 6e9


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    if not (where / "config.json").exists():
        write_model(where)
    show(profile(str(where), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
