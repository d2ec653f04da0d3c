"""Tables of weight errors for rows of the shapes of SD 1.5: the compiled range search, and torch beside it.

python tests/benchmarks/range_search_benchmark.py [MILLIONS [MILLIONS for torch]]
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from mpqsearch.core import QuantFormat
from mpqsearch.quant import search
from mpqsearch.quant.tables import weight_error_tables

SHAPES = (
    *((320, 2880), (640, 5760), (1280, 11520), (1280, 17280), (1280, 1280), (320, 320)),
    *((1280, 768), (10240, 1280), (5120, 640), (1280, 5120), (640, 640), (2560, 320)),
)
"""Output channels and fan-in of layers of the U-Net, 68 M weights in all."""

SD15 = 859_520_964


def layers(millions: float) -> list[Tensor]:
    """Random rows of all shapes, with fewer or more output channels."""
    share = millions * 1e6 / sum(c * d for c, d in SHAPES)
    g = torch.Generator().manual_seed(0)
    return [torch.randn(max(1, round(c * share)), d, generator=g) for c, d in SHAPES]


def seconds(weights: list[Tensor]) -> float:
    """Processor seconds of the tables at 2 to 8 bits of both schemes."""
    began = time.process_time()
    for rows in weights:
        weight_error_tables(rows, range(2, 9), ("asymmetric", "auto"), QuantFormat())
    return time.process_time() - began


def main() -> None:
    """Measure both, and scale to the whole model."""
    torch.set_num_threads(1)
    began = time.process_time()
    seconds([torch.randn(10, 1000)])
    print(f"first call of the process: {time.process_time() - began:.1f} s")
    sizes = [float(x) for x in sys.argv[1:]] or [100.0]
    for name, millions in (("compiled", sizes[0]), ("torch", sizes[-1] if len(sizes) > 1 else sizes[0] / 40)):
        if name == "torch":
            search.COMPILED_WEIGHTS = sys.maxsize
        weights = layers(millions)
        n, taken = sum(w.numel() for w in weights), seconds(weights)
        print(f"{name}: {n / 1e6:.1f} M weights, {taken:.1f} s; {taken / n * SD15:.0f} s for {SD15 / 1e6:.0f} M")


if __name__ == "__main__":
    main()
