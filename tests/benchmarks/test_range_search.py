"""Range search of a whole model against one Python loop over channels with the same candidates; both in one run.

make benchmark        or        python -m pytest tests/benchmarks/test_range_search.py --benchmark-enable
--benchmark-only -s
"""

from __future__ import annotations

import time

import pytest
from torch import Tensor

from mpqsearch.core import QuantFormat
from mpqsearch.models import discover
from mpqsearch.quant import decode, encode, fit_rows, rows_of
from mpqsearch.sampling import load_model

WIDTHS = (2, 3, 4, 8)
SAMPLE = 40
"""Channels that the loop runs on, spread evenly; its time is scaled up to all channels."""


def loop(row: Tensor, bits: int, p: float = 2.4) -> Tensor:
    """The search of one channel, candidate by candidate, as the released codes of EfficientDM and MPQ-DM are
    written."""
    best, found = float("inf"), row
    top = 2**bits - 1
    high, low = row.max().clamp(min=0), row.min().clamp(max=0)
    for i in range(80):
        scale = (high - low) * (1 - 0.01 * i) / top
        zero = (-low * (1 - 0.01 * i) / scale).round()
        quantized = ((row / scale).round() + zero).clamp(0, top).sub(zero).mul(scale)
        error = (row - quantized).abs().pow(p).sum()
        if error < best:
            best, found = error, quantized
    return found


@pytest.mark.benchmark(group="range search")
def test_whole_model_against_a_loop_over_channels(benchmark: object) -> None:
    denoiser = load_model("fmnist-unet")
    modules = dict(denoiser.module.named_modules())
    layers = [(la, rows_of(modules[la.name].weight, la)) for la in discover(denoiser)]

    def whole() -> list[Tensor]:
        out = []
        for bits in WIDTHS:
            for _, rows in layers:
                q = fit_rows(rows, bits, QuantFormat())
                out.append(decode(encode(rows, q), q))
        return out

    began = time.perf_counter()
    whole()  # once a process: loads the machine code, or compiles it once a machine
    first = time.perf_counter() - began
    began = time.perf_counter()
    benchmark.pedantic(whole, rounds=1, warmup_rounds=0)  # type: ignore[attr-defined]
    ours = time.perf_counter() - began
    total = sum(la.n_channels for la, _ in layers)
    every = [(rows[c], c) for _, rows in layers for c in range(len(rows))]
    chosen = every[:: max(1, len(every) // SAMPLE)]
    began = time.perf_counter()
    for row, _ in chosen:
        for bits in WIDTHS:
            loop(row, bits)
    theirs = (time.perf_counter() - began) * total / len(chosen)
    print(
        f"\nrange search, {total} channels x {len(WIDTHS)} widths x 80 candidates: {ours:.2f} s (first call of the "
        f"process {first:.2f} s); "
        f"loop {theirs:.1f} s; ratio {theirs / ours:.0f}"
    )
    assert theirs / ours >= 50
