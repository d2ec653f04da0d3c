"""What the losses are worth in an allocation: maps of one profile at equal bytes, measured on final samples.

    mpqsearch profile --config studies/quickstart.toml --run-dir runs/quickstart
    python studies/predictors/allocation.py runs/quickstart [--work runs/predictors]      # writes allocation.csv

For each budget and granularity: the map of every loss; then, from the map of ``sampler``, one round of linearisation at
that map (loss ``operating``). Each measured map is kept, so the same command continues.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, Policy, QuantFormat
from mpqsearch.methods import MethodSpec, allocate
from mpqsearch.metrics import load_extractor
from mpqsearch.metrics.frechet import FeatureStatistics, frechet_distance
from mpqsearch.models import load_model
from mpqsearch.profile import remeasure
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import SamplerSpec, sample, to_uint8

HERE = Path(__file__).resolve().parent
BUDGETS = ("uniform:2", "uniform:3")
SEEDS = range(32)
PROBED = range(1_000_000, 1_000_016)
SAMPLER = SamplerSpec(steps=10, guidance=2.0, batch=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("run", type=Path, help="a run folder with layers.json and profile.json")
    parser.add_argument("--work", type=Path, default=Path("runs/predictors"), help="where measured maps are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, profile = artifacts.load_layers(args.run / "layers.json"), artifacts.load_profile(args.run / "profile.json")
    denoiser, extractor = load_model(table.model), load_extractor("fmnist-cnn")
    means = {n: torch.from_numpy(np.array(m)) for n, m in profile.means.items()}
    reference: list[Tensor] = []

    def measured(bit_map: BitMap) -> tuple[float, float]:
        path = args.work / "allocation" / f"{bit_map.digest[:24]}.npz"
        if not path.exists():
            if not reference:
                reference.append(sample(denoiser, SEEDS, SAMPLER))
            module = quantize_model(denoiser.module, table, bit_map, means=means).module
            found = sample(denoiser.with_module(module), SEEDS, SAMPLER)
            base, mine = (FeatureStatistics.of(extractor(to_uint8(x))) for x in (reference[0], found))
            error = float((found - reference[0]).square().mean())
            artifacts.write_arrays(path, {"mse": np.array(error), "fd": np.array(frechet_distance(base, mine))})
        kept = artifacts.read_arrays(path)
        return float(kept["mse"]), float(kept["fd"])

    def round_at(bit_map: BitMap) -> dict[str, np.ndarray]:
        path = args.work / "allocation" / f"at-{bit_map.digest[:24]}.npz"
        keys = ("layer_operating_error/auto", "layer_operating_std_error/auto")
        if not path.exists():
            found = remeasure(denoiser, table, profile, bit_map, SAMPLER, PROBED, probes=2)
            artifacts.write_arrays(path, {k.replace("/", "."): found.arrays[k] for k in keys})
        kept = artifacts.read_arrays(path)
        return {k: kept[k.replace("/", ".")] for k in keys}

    rows = []
    for budget in BUDGETS:
        for allocator in ("ilp-layer", "ilp-channel"):

            def solve(loss: str, source: object = profile, budget: str = budget, allocator: str = allocator) -> BitMap:
                method = MethodSpec(name=loss, allocator=allocator, loss=loss, scheme="auto", bias_correction=True)
                return allocate(method, Budget.parse(budget), table, source, Policy(), QuantFormat()).bit_map  # type: ignore[arg-type]

            maps = {loss: solve(loss) for loss in ("output", "probe", "final", "sampler")}
            at = replace(profile, arrays={**profile.arrays, **round_at(maps["sampler"])})
            maps["operating, at the map of sampler"] = solve("operating", at)
            for loss, bit_map in maps.items():
                error, distance = measured(bit_map)
                rows.append(
                    {"budget": budget, "allocator": allocator, "loss": loss, "paired_mse": error, "fd_fp": distance}
                )
                print(f"{budget} {allocator} {loss}: paired MSE {error:.5f}, FD {distance:.3f}", flush=True)
    pd.DataFrame(rows).round(5).to_csv(HERE / "allocation.csv", index=False)


if __name__ == "__main__":
    main()
