"""Maps allocated for GGUF against one GGUF type everywhere, at equal file size, on an embedded model.

    python studies/gguf/compare.py --csv studies/gguf/results.csv

Every type is tried on all layers that can hold it, the K types with the fallback that llama.cpp has for rows that they
do not fit; then types are allocated under the size of each of these files. Everything is what diffusers would load: the
weights are decoded by the format itself. The number is the mean squared error of final samples against full precision,
from the same noise, with seeds from 0 on; intervals are 95 %, from a bootstrap over samples that keeps pairs together.
What the allocation knows comes from other seeds.

Three allocations, which differ in their losses:

- ``profile``: as `mpqsearch allocate --target gguf` does it, from a profile and the format's own weight errors; nothing
  else runs.
- ``probes``: the format's own errors, probed through all steps of the sampler, each layer on its own.
- ``pairs``: the same probes with the interactions of layers (`mpqsearch.export.allocation.probed_losses`).
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpqsearch.core import LayerTable, Policy, QuantFormat
from mpqsearch.export.allocation import (
    TargetAllocation,
    allocate_for,
    allocation_of,
    formats_of,
    probed_losses,
    target_errors,
    target_losses,
    target_squares,
)
from mpqsearch.export.gguf import GgufTarget
from mpqsearch.models import Denoiser, discover
from mpqsearch.profile import CalibrationSpec, WeightErrors, profile_model, projected_effects
from mpqsearch.quant import rows_of, weight_of
from mpqsearch.sampling import SamplerSpec, latents, load_model
from mpqsearch.specs.targets import FULL

FIRST_SEED = 1_000_000
"""First of the seeds from which the allocation learns."""

FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes for rows that are no multiple of 256 (``src/llama-quant.cpp``)."""

ARMS = ("profile", "probes", "pairs")


def decoded(
    denoiser: Denoiser, table: LayerTable, errors: dict[str, Tensor], made: TargetAllocation, formats: tuple[str, ...]
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


def uniform_for(table: LayerTable, fmt: str, fallback: str) -> TargetAllocation:
    """Every layer that has the type ``fmt`` in it, others in ``fallback`` or, without that, at full precision: what
    most tools do."""
    target = GgufTarget()
    has = [{c.name for c in target.choices(layer)} for layer in table]
    picked = {
        la.name: next((f for f in (fmt, fallback) if f in names), FULL) for la, names in zip(table, has, strict=True)
    }
    return allocation_of(target, table, picked)


class Study:
    """One model, its sampler, the reference samples, and how maps are made and measured."""

    def __init__(self, name: str, samples: int, calibration: int, probes: int, coupling: float) -> None:
        self.denoiser = load_model(name, sampler=SamplerSpec(steps=10, guidance=2.0))
        self.table, self.target = discover(self.denoiser), GgufTarget()
        self.formats = formats_of(self.target, self.table)
        self.seeds = range(samples)
        self.errors = target_errors(self.target, self.table, self.denoiser.module)
        self.reference = latents(self.denoiser, self.seeds)
        modules: dict[str, Any] = dict(self.denoiser.module.named_modules())
        fmt, spec = QuantFormat(), CalibrationSpec(first_seed=FIRST_SEED, schemes=("asymmetric",), smooth=False)
        profile = profile_model(self.denoiser, self.table, Policy(roles={}), spec, fmt)
        squared = target_squares(self.target, self.table, lambda n: modules[n].weight, fmt)
        self.from_profile = target_losses(squared, self.table, profile)
        effects = projected_effects(
            self.denoiser,
            self.table,
            range(FIRST_SEED, FIRST_SEED + calibration),
            WeightErrors(self.table, {"gguf": self.errors}),
            probes=probes,
        )
        effect = effects["gguf"][:, 0].astype(np.float64)  # no bias is corrected
        self.probed, self.pairs = probed_losses(effect, self.table, coupling=coupling)

    def made(self, arm: str, limit: int) -> TargetAllocation:
        """The map of one arm under a size in bits."""
        losses = self.from_profile if arm == "profile" else self.probed
        return allocate_for(self.target, self.table, losses, limit, pairs=self.pairs if arm == "pairs" else None)

    def squared(self, made: TargetAllocation) -> Tensor:
        """Squared error (mean over pixels) of every final sample."""
        model = decoded(self.denoiser, self.table, self.errors, made, self.formats)
        return (latents(model, self.seeds) - self.reference).square().flatten(1).mean(1)

    def uniform(self) -> dict[str, TargetAllocation]:
        """One type everywhere, by the name of the type and of its fallback."""
        found = {}
        for fmt in self.formats:
            fallback = FALLBACK.get(fmt, FULL)
            label = f"{fmt}/{fallback}" if fmt in FALLBACK else fmt
            found[label] = uniform_for(self.table, fmt, fallback)
        return found


def rows_of_study(study: Study) -> Iterator[dict[str, Any]]:
    """One row for each size and arm."""
    uniform = study.uniform()
    measured = {name: study.squared(made) for name, made in uniform.items()}
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(study.seeds), (2000, len(study.seeds)), generator=generator)
    sizes: dict[int, str] = {}
    for name, made in sorted(uniform.items(), key=lambda item: (item[1].stored.total, float(measured[item[0]].mean()))):
        sizes.setdefault(made.stored.total, name)
    for limit, name in sizes.items():
        rivals = [f for f, other in uniform.items() if other.stored.total <= limit]
        best = min(rivals, key=lambda f: float(measured[f].mean()))
        theirs = measured[best]
        for arm in ARMS:
            made = study.made(arm, limit)
            mine = study.squared(made)
            low, high = (mine[draws].mean(1) / theirs[draws].mean(1)).quantile(torch.tensor([0.025, 0.975])).tolist()
            yield {
                "size_of": name,
                "bytes": limit // 8,
                "best_uniform": best,
                "uniform_mse": float(theirs.mean()),
                "arm": arm,
                "mixed_bytes": made.stored.total // 8,
                "mixed_mse": float(mine.mean()),
                "ratio": float(mine.mean() / theirs.mean()),
                "ratio_low": low,
                "ratio_high": high,
                "samples": len(study.seeds),
            }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fmnist-dit")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=128, help="trajectories that are probed")
    parser.add_argument("--probes", type=int, default=2, help="random projections of each")
    parser.add_argument("--coupling", type=float, default=0.5, help="share of the interactions that is believed")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    study = Study(arguments.model, arguments.samples, arguments.calibration, arguments.probes, arguments.coupling)
    rows = []
    for row in rows_of_study(study):
        rows.append(row)
        print(
            f"{row['size_of']:13} {row['bytes']:8} bytes: best uniform {row['best_uniform']:13} "
            f"{row['uniform_mse']:.3e}, {row['arm']:8} "
            f"{row['mixed_mse']:.3e} ({row['mixed_bytes']} bytes): ratio {row['ratio']:.2f} ({row['ratio_low']:.2f} "
            f"to {row['ratio_high']:.2f})",
            flush=True,
        )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
