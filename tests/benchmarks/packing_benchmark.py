"""Packing and loading SD 1.5's U-Net at mixed widths: ``python tests/benchmarks/packing_benchmark.py [--scale 0.2]``.

The public configuration with random weights, in float32 as models are loaded here; every output channel of every layer
gets a width of 2 to 8 at random. ``--scale`` multiplies the channels of its blocks (1: all 860 million parameters).
Rates are MB of the *bfloat16* weights a second, whatever is done with them, by wall time and by processor time, with as
many threads as ``OMP_NUM_THREADS`` allows:

- ``copy``: the bfloat16 weights are written to a file, flushed to disk, and read again: what no packing can be faster
  than by much.
- ``pack``: `save_quantized` with ranges of minimum and maximum: ranges, codes, bit streams, digests, the file flushed
  to disk.
- ``load``: `load_quantized`: reading, digests, codes, decoded float32 weights in the diffusers model, which is built in
  that time, too.
- ``range search``: the default search of ranges alone, on one layer; it belongs to quantizing and not to packing.

``memory``: largest anonymous memory beside the model (and beside the file), sampled every 2 ms, over that of the
largest layer in float32. The loaded weights are compared with those of the fake-quantized model, all of them, bit for
bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from mpqsearch.core import BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.export.packed import FILE, load_quantized, save_quantized
from mpqsearch.quant import quantize_weight, weight_of

CHANNELS = (320, 640, 1280, 1280)
"""Output channels of the blocks of SD 1.5's U-Net."""

FORMAT = QuantFormat(criterion="minmax")


@dataclass
class Spent:
    """What a phase took: seconds of the wall, seconds of the processor, bytes of memory at its highest and at its
    end."""

    wall: float = 0.0
    cpu: float = 0.0
    before: int = 0
    highest: int = 0
    after: int = 0


def anonymous() -> int:
    """Bytes of anonymous memory of this process; pages of mapped files are the system's cache and not counted
    (Linux)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1])


@contextmanager
def measured() -> Iterator[Spent]:
    """Measure a block."""
    found, over = Spent(before=anonymous()), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            found.highest = max(found.highest, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found.wall, found.cpu = time.perf_counter() - wall, time.process_time() - cpu
    over.set()
    thread.join()
    found.after = anonymous()


def sd15(scale: float) -> Any:
    """SD 1.5's U-Net with random weights."""
    torch.manual_seed(0)
    channels = tuple(max(32, round(c * scale / 32) * 32) for c in CHANNELS)
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8
    ).eval()


def table_of(module: Any) -> LayerTable:
    """Every linear layer and convolution, without running the model."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [
        LayerSpec(name=n, kind=type(m).__name__, weight_shape=tuple(m.weight.shape), has_bias=m.bias is not None)
        for n, m in module.named_modules()
        if isinstance(m, kinds)
    ]
    return LayerTable(digest="benchmark", layers=tuple(layers), kept=())


def copied(module: Any, folder: Path) -> None:
    """Write the weights in bfloat16, flush them to disk, and read them again."""
    path = folder / "bfloat16"
    with path.open("wb") as handle:
        for tensor in module.state_dict().values():
            handle.write(tensor.bfloat16().contiguous().flatten().view(torch.uint8).numpy())
        handle.flush()
        os.fsync(handle.fileno())
    with path.open("rb") as handle:
        while handle.read(1 << 24):
            pass
    path.unlink()


def differences(module: Any, loaded: Any, table: LayerTable, bit_map: BitMap) -> int:
    """Weights that are not those of the fake-quantized model, and any other value that changed."""
    ours, theirs, wrong = module.state_dict(), loaded.state_dict(), 0
    quantized = {f"{la.name}.weight": la for la in table}
    for key, tensor in ours.items():
        expected = tensor
        if key in quantized:
            layer = quantized[key]
            widths = torch.from_numpy(bit_map.weights[layer.name].copy())
            expected = weight_of(quantize_weight(tensor, layer, widths, FORMAT).rows(), layer)
        wrong += int((theirs[key] != expected).sum())
    return wrong


def row(what: str, megabytes: float, spent: Spent, memory: int | None, largest: int) -> str:
    """One line of the table."""
    shown = "" if memory is None else f"{memory / largest:.2f}"
    return f"| {what} | {spent.wall:.2f} | {spent.cpu:.2f} | {megabytes / spent.wall:.0f} | {megabytes / spent.cpu:.0f} | {shown} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the files go for the time of the run (default: the system's temporary folder)",
    )
    arguments = parser.parse_args()
    module = sd15(arguments.scale)
    table = table_of(module)
    rng = np.random.default_rng(0)
    weights = {la.name: rng.integers(2, 9, la.n_channels).astype(np.uint8) for la in table}
    bit_map = BitMap(model_digest=table.digest, weights=weights, format=FORMAT)
    n, largest = sum(p.numel() for p in module.parameters()), 4 * max(la.n_weights for la in table)
    megabytes = 2 * n / 1e6
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, torch.no_grad():
        folder = Path(name)
        first = table.layers[0]  # compiled kernels are built before anything is measured
        for fmt in (FORMAT, QuantFormat()):
            quantize_weight(
                module.get_submodule(first.name).weight, first, torch.from_numpy(weights[first.name].copy()), fmt
            )
        with measured() as copying:
            copied(module, folder)
        with measured() as packing:
            save_quantized(folder, module, table, bit_map)
        size = (folder / FILE).stat().st_size
        with measured() as loading:
            loaded = load_quantized(folder)
        one = max((la for la in table if la.n_weights < 5e6), key=lambda la: la.n_weights)
        with measured() as searching:
            weight = module.get_submodule(one.name).weight
            quantize_weight(weight, one, torch.from_numpy(weights[one.name].copy()), QuantFormat())
        wrong = differences(module, loaded, table, bit_map)
    print(
        f"{n:,} parameters, {len(table)} layers, {megabytes:.0f} MB in bfloat16, {size / 1e6:.0f} MB packed; largest "
        f"layer {largest / 1e6:.0f} MB "
        f"in float32; {torch.get_num_threads()} threads"
    )
    print(
        "| what | wall s | processor s | MB/s of bfloat16, wall | MB/s, processor | memory, largest layers "
        "|\n|---|---|---|---|---|---|"
    )
    print(row("copy", megabytes, copying, None, largest))
    print(row("pack", megabytes, packing, packing.highest - packing.before, largest))
    print(row("load", megabytes, loading, loading.highest - loading.after, largest))
    print(row("range search", 2 * one.n_weights / 1e6, searching, None, largest))
    print(
        f"ratio to the copy: pack {copying.wall / packing.wall:.2f}, load {copying.wall / loading.wall:.2f} of its rate"
    )
    print(f"weights that differ from the fake-quantized model: {wrong}")


if __name__ == "__main__":
    main()
