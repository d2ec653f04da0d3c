"""What the runner and an evaluation cost beside the bare pipeline, in processor seconds of one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/sampling_benchmark.py [samples]

All on the embedded text-to-image pipeline as its folder says it is drawn. Bare: the pipeline of diffusers, called in
the same batches with the same prompts and generators. Evaluation: the samples of a quantized copy are drawn, measured
against full precision (features, distances, intervals) and dropped. Runs alternate; the ratio is that of medians.
Memory: the peak of a process that draws and evaluates so many samples, beside one that does so with fewer.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpqsearch.core import BitMap
from mpqsearch.metrics import Reference, SampleStore, evaluate, load_extractor
from mpqsearch.models import Denoiser, discover
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import PipelineRunner, load_model, samples
from mpqsearch.sources import REFERENCE
from mpqsearch.specs import SamplerSpec

MODEL = "fmnist-t2i"
REPEATS = 3
FEW, MANY = 64, 512


def drawn(denoiser: Denoiser, seeds: range) -> list[Tensor]:
    """Pictures through the runner, batch by batch."""
    return [batch.images for batch in samples(denoiser, seeds) if batch.images is not None]


def drawn_bare(pipe: Any, denoiser: Denoiser, seeds: range) -> list[Tensor]:
    """The same from the pipeline's own call."""
    runner = denoiser.runner
    assert isinstance(runner, PipelineRunner)
    images = []
    for start in range(0, len(seeds), runner.batch):
        some = seeds[start : start + runner.batch]
        out = pipe(
            prompt=[str(label) for label in runner.labels(some)],
            num_inference_steps=runner.spec.steps,
            guidance_scale=runner.spec.guidance,
            generator=[torch.Generator().manual_seed(s) for s in some],
            output_type="np",
            **runner.spec.call,
        )
        images.append(torch.from_numpy((out.images * 255).round().astype(np.uint8)).movedim(-1, 1))
    return images


def quantized(denoiser: Denoiser) -> Denoiser:
    """A copy with every layer at 4 bits."""
    table = discover(denoiser)
    bit_map = BitMap(model_digest=table.digest, weights={la.name: np.array(4) for la in table})
    return denoiser.with_module(quantize_model(denoiser.module, table, bit_map).module)


def full_precision(denoiser: Denoiser, seeds: range, folder: Path) -> Reference:
    """Samples of full precision, on disk."""
    store = SampleStore(folder, seeds, {})
    store.fill(samples(denoiser, store.missing))
    return Reference.of(store, load_extractor("fmnist-judge"))


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came out."""
    began = time.process_time()
    out = work()
    return time.process_time() - began, out


def times(n: int) -> None:
    """Print the cost of the runner and of an evaluation."""
    import diffusers

    seeds = range(n)
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(REFERENCE / MODEL), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        denoiser = load_model(MODEL, encoded=Path(folder) / "prompts")
        full = full_precision(denoiser, seeds, Path(folder) / "full")
        small = quantized(denoiser)
        drawn_bare(pipe, denoiser, seeds[:2])  # what a first call sets up is no cost of any
        spent: dict[str, list[float]] = {"bare": [], "runner": [], "drawn": [], "evaluated": []}
        for _ in range(REPEATS):
            bare, own = seconds(lambda: drawn_bare(pipe, denoiser, seeds))
            through, ours = seconds(lambda: drawn(denoiser, seeds))
            # Decoded one at a time and 32 at a time: the last of 8 bits may differ.
            assert max(int((a.int() - b.int()).abs().max()) for a, b in zip(own, ours, strict=True)) <= 1
            alone, _ = seconds(lambda: drawn(small, seeds))
            whole, _ = seconds(lambda: evaluate(samples(small, seeds), full))
            for name, value in zip(spent, (bare, through, alone, whole), strict=True):
                spent[name].append(value)
    for name, values in spent.items():
        print(f"{name:10} {median(values):7.2f} s of {', '.join(f'{v:.2f}' for v in values)}")
    for a, b in (("runner", "bare"), ("evaluated", "drawn")):
        ratios = sorted(x / y for x, y in zip(spent[a], spent[b], strict=True))
        print(f"{a} / {b}: {median(spent[a]) / median(spent[b]):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})", flush=True)


def peak(n: int) -> None:
    """Draw and evaluate so many samples; print the peak memory of the process in MB."""
    with tempfile.TemporaryDirectory() as folder:
        few_steps = SamplerSpec(steps=2)  # memory does not depend on them
        denoiser = load_model(MODEL, encoded=Path(folder) / "prompts", sampler=few_steps)
        full = full_precision(denoiser, range(n), Path(folder) / "full")
        evaluate(samples(quantized(denoiser), range(n)), full)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Print all numbers."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        peak(int(sys.argv[2]))
        return
    times(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
    for n in (FEW, MANY):
        done = subprocess.run([sys.executable, __file__, "--peak", str(n)], check=True, capture_output=True, text=True)
        print(f"peak memory with {n} samples: {float(done.stdout.splitlines()[-1]):.0f} MB", flush=True)


if __name__ == "__main__":
    main()
