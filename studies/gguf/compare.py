"""Mixed GGUF types against one type everywhere, at equal file size, on an embedded model.

    python studies/gguf/compare.py [--model fmnist-dit] [--samples 128] [--json out.json]

Every type is tried on all layers that can hold it; then types are allocated under the size of that file and of no more. Both are what
diffusers would load: the weights are decoded by the format itself. The number is the mean squared error of final samples against full
precision, from the same noise; intervals are 95 %, from a bootstrap over samples that keeps pairs together.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpqsearch.export.allocation import TargetAllocation, allocate_for, formats_of, target_errors, uniform_for
from mpqsearch.export.gguf import GgufExporter
from mpqsearch.models import Denoiser, discover, load_model
from mpqsearch.profile import CalibrationSpec, price_errors
from mpqsearch.quant import rows_of, weight_of
from mpqsearch.sampling import SamplerSpec, sample


def decoded(
    denoiser: Denoiser, table: Any, errors: dict[str, Tensor], made: TargetAllocation, formats: tuple[str, ...]
) -> Denoiser:
    """The model with the weights of a GGUF file: decoded types, and half precision elsewhere in weight layers."""
    module = copy.deepcopy(denoiser.module)
    modules: dict[str, Any] = dict(module.named_modules())
    for layer in table:
        weight = modules[layer.name].weight
        if layer.name in made.choices:
            rows = rows_of(weight, layer) + errors[layer.name][formats.index(made.choices[layer.name])]
            weight.data.copy_(weight_of(rows, layer))
        else:
            weight.data.copy_(weight.half())
    return denoiser.with_module(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fmnist-dit")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    denoiser = load_model(arguments.model)
    table, target = discover(denoiser), GgufExporter()
    formats = formats_of(target, table)
    sampler = SamplerSpec(steps=10, guidance=2.0 if denoiser.null_class is not None else 1.0)
    errors = target_errors(target, table, denoiser.module)
    losses = {n: v.tolist() for n, v in price_errors(denoiser, table, errors, sampler, CalibrationSpec()).items()}
    seeds = range(arguments.samples)
    reference = sample(denoiser, seeds, sampler)

    def squared(made: TargetAllocation) -> Tensor:
        return (sample(decoded(denoiser, table, errors, made, formats), seeds, sampler) - reference).square().flatten(1).mean(1)

    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(arguments.samples, (1000, arguments.samples), generator=generator)
    uniform = {fmt: uniform_for(target, table, fmt, losses) for fmt in formats}
    measured = {fmt: squared(made) for fmt, made in uniform.items()}
    rows = []
    for fmt, made in sorted(uniform.items(), key=lambda item: item[1].stored.total):
        rivals = [f for f, other in uniform.items() if other.stored.total <= made.stored.total]
        best = min(rivals, key=lambda f: float(measured[f].mean()))
        mixed = allocate_for(target, table, losses, made.stored.total)
        mine, theirs = squared(mixed), measured[best]
        ratios = (mine[draws].mean(1) / theirs[draws].mean(1)).quantile(torch.tensor([0.025, 0.975]))
        row = {
            "size of": fmt,
            "bytes": made.stored.total // 8,
            "mixed bytes": mixed.stored.total // 8,
            "best uniform": best,
            "uniform mse": float(theirs.mean()),
            "mixed mse": float(mine.mean()),
            "ratio": float(mine.mean() / theirs.mean()),
            "low": float(ratios[0]),
            "high": float(ratios[1]),
        }
        rows.append(row)
        print(
            f"{fmt:7} {row['bytes']:8} bytes: best uniform {best:7} {row['uniform mse']:.3e}, mixed {row['mixed mse']:.3e} "
            f"({row['mixed bytes']} bytes): ratio {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
