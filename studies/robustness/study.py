"""How well maps hold on models that nothing was chosen on: every arm at equal bytes, judged by paired samples.

    python -m studies.robustness.study --arms uniform ilp-channel --models colour-unet --bits 3 --seeds 0

Without filters everything is run; rows that are in ``results.csv`` are left out, so the same command again continues.
``paired_error`` is ``sqrt(mean((x_q - x)^2) / mean(x^2))`` over final samples (latents of latent models) from the same
noise, at full precision ``x`` and quantized ``x_q``; ``inf`` where a quantized sample is not finite. A seed of the
study moves all seeds: of calibration and probes, of the search, and of the samples that judge, which all arms share.
The size is that of the uniform map with first and last layers at 8 bits. ``seconds`` are processor seconds of making
the map from a profile; the rows of the arm ``profile`` hold those of measuring the profile. The first program with GPTQ
rounding pays for pricing it, which the others then share.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mpqsearch import stages
from mpqsearch.artifacts import read_json
from mpqsearch.config import AllocateConfig, CalibrationConfig, Config, ModelConfig
from mpqsearch.core import BitMap, Budget, Policy, size_bytes
from mpqsearch.errors import NumericsError
from mpqsearch.methods import MethodSpec
from mpqsearch.sampling import latents
from mpqsearch.specs import SamplerSpec, SearchSpec
from mpqsearch.stages.references import quantized_module

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.csv"

GUIDED = SamplerSpec(steps=10, guidance=2.0)
OWN = "studies.robustness.models"
MODELS: dict[str, tuple[str, SamplerSpec]] = {
    "colour-unet": (f"{OWN}:colour_unet", SamplerSpec(steps=10)),
    "cloud-mixer": (f"{OWN}:cloud_mixer", SamplerSpec(steps=10)),
    "sound-net": (f"{OWN}:sound_net", SamplerSpec(steps=10)),
    "heavy-dit": (f"{OWN}:heavy_dit", GUIDED),
    "fmnist-unet": ("fmnist-unet", GUIDED),
    "fmnist-dit": ("fmnist-dit", GUIDED),
    "fmnist-t2i": ("fmnist-t2i", SamplerSpec(steps=10)),
    "fmnist-flow": ("fmnist-flow", SamplerSpec(steps=10)),
}
"""Source and sampler of each model."""

TUNED_ON = ("fmnist-unet", "fmnist-dit", "fmnist-t2i", "cloud-mixer")
"""Models that constants of the package were chosen on. ``heavy-dit`` has the function of one of them."""

BITS = (2, 3, 4, 6)
SEEDS = (0, 1, 2)

_AUTO = {"scheme": "auto", "bias_correction": True}
_GPTQ = {**_AUTO, "rounding": "gptq"}
_KFAC = {**_AUTO, "rounding": "kfac"}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {"allocator": "uniform"},
    "uniform-gptq": {"allocator": "uniform", **_GPTQ},
    "omq": {"allocator": "omq"},
    "ilp-layer": {"allocator": "ilp-layer"},
    "ilp-layer-gptq": {"allocator": "ilp-layer", **_GPTQ},
    "ilp-channel": {"allocator": "ilp-channel"},
    "ilp-channel-gptq": {"allocator": "ilp-channel", **_GPTQ},
    "ilp-channel-kfac": {"allocator": "ilp-channel", **_KFAC},
    "ours": {"allocator": "measured", **_KFAC},
    "outer-search": {"allocator": "search", **_AUTO},
    **{f"shrinkage-{s:g}": {"allocator": "ilp-channel", **_GPTQ, "shrinkage": s} for s in (0.0, 0.1, 0.3, 1.0)},
}
"""Fields of `MethodSpec` by arm: what is asked for, in the words of a study's ``[[methods]]``. Arms without GPTQ or
KFAC round to nearest in the asymmetric scheme and leave biases alone: one quantizer, so only their widths differ."""

RULES = ("first-last-high", "k-quant", "sdnq-dynamic", "quant-probe", "apple-threshold", "mixed-gguf")
"""Rules of practice, each rounded to the nearest value as ``uniform`` is, and with the quantizer of ``ours``."""

KNOWN = ARMS | {f"{rule}{s}": {"allocator": rule, **q} for rule in RULES for s, q in (("", {}), ("-gptq", _GPTQ))}
"""All arms that can be named; those of `ARMS` run without a filter."""

SEARCHED = {**ARMS["ilp-channel-kfac"], "name": "ilp-channel"}
"""What the outer search begins with; its space is the default one, with the quantizer in it."""

PREDICTIONS = HERE / "predictions.csv"
PREDICTION_FIELDS = ("model", "target_bits", "seed", "maps", "spearman")
"""Rank correlation of predicted and measured errors over the maps that a selection measured."""

FIELDS = (
    *("model", "target_bits", "arm", "rounding", "seed", "size_bytes", "paired_error", "n_samples", "seconds"),
    "tuned_on",
)
Key = tuple[str, str, str, str]
"""Model, bits, arm and seed: what names a row."""


@dataclass(frozen=True)
class Scale:
    """How much is spent: ``samples`` judge a map, ``trials`` make an outer search; ``calibration`` replaces settings of
    the profile (tests)."""

    samples: int = 128
    trials: int = 30
    calibration: Mapping[str, Any] | None = None


class Bench:
    """One model at one seed: its run folder, its profile, and its samples at full precision."""

    def __init__(self, model: str, seed: int, scale: Scale, work: Path) -> None:
        self.model, self.seed, self.scale = model, seed, scale
        self.folder = work / f"{model}-seed{seed}"
        self.seeds = range(1000 * seed, 1000 * seed + scale.samples)
        self.run = stages.Run(config=self.config(), folder=self.folder)

    def config(self, **tables: Any) -> Config:
        """The study as a user would write it, with the seeds of this bench."""
        source, sampler = MODELS[self.model]
        first = 1_000_000 + 1000 * self.seed
        return Config(
            model=ModelConfig(source=source, device="cpu"),
            policy=Policy(widths=tuple(range(1, 9)), roles={"first": 8, "last": 8}),
            sampler=sampler,
            calibration=CalibrationConfig(first_seed=first, seed=self.seed, **(self.scale.calibration or {})),
            **tables,
        )

    @cached_property
    def prepared(self) -> stages.Run:
        """The run with its layers and profile; both are reused from the folder."""
        assert stages.prepare(self.run)
        return self.run

    @cached_property
    def reference(self) -> Tensor:
        """Final samples at full precision."""
        return latents(self.run.denoiser, self.seeds)

    def paired_error(self, bit_map: BitMap, *, bias_correction: bool) -> float:
        """Relative root mean square error of the final samples of a map."""
        module = quantized_module(self.prepared, bit_map, bias_correction=bias_correction)
        try:
            made = latents(self.run.denoiser.with_module(module), self.seeds)
        except NumericsError:
            return float("inf")
        return float(((made - self.reference).square().mean() / self.reference.square().mean()).sqrt())

    def map_of(self, arm: str, bits: int) -> tuple[BitMap, bool]:
        """The map that an arm makes at the size of the uniform one, and whether biases are corrected."""
        budget = Budget.parse(f"uniform:{bits}")
        if arm == "outer-search":
            bit_map, data = self._searched(budget)
        else:
            method = MethodSpec(name=arm, **KNOWN[arm])
            bit_map, data = stages.allocation(self.prepared, method, budget)
        return bit_map, bool(data.get("bias_correction", KNOWN[arm].get("bias_correction", False)))

    def _searched(self, budget: Budget) -> tuple[BitMap, dict[str, Any]]:
        """The map of an outer search at one budget, in a run folder of its own."""
        text = budget.label()
        spec = SearchSpec(
            method="ilp-channel",
            trials=self.scale.trials,
            seed=self.seed,
            budgets=(text,),
            first_seed=4_000_000 + 1000 * self.seed,
            error="latents",
        )
        config = self.config(methods=(MethodSpec(**SEARCHED),), allocate=AllocateConfig(budgets=(text,)), search=spec)
        folder = self.folder / f"search-{text.replace(':', '-')}"
        run = stages.Run(config=config, folder=folder, given=self.run.denoiser)
        run.table, run.profile = self.prepared.table, self.prepared.profile
        stages.search(run)
        return stages.searched_map(run, budget)

    def profile_row(self) -> dict[str, Any] | None:
        """What the profile took; None when it was there before."""
        began, there = time.process_time(), (self.folder / "profile.json").exists()
        _ = self.prepared
        return None if there else self._row("", "profile", "", 0, "", time.process_time() - began)

    def row(self, arm: str, bits: int) -> dict[str, Any]:
        """One measured cell."""
        began = time.process_time()
        bit_map, corrected = self.map_of(arm, bits)
        seconds = time.process_time() - began
        roundings = {f.rounding for f in (bit_map.format, *bit_map.formats.values())}
        error = self.paired_error(bit_map, bias_correction=corrected)
        size = size_bytes(self.prepared.table, bit_map)
        return self._row(str(bits), arm, "+".join(sorted(roundings)), size, f"{error:.6g}", seconds)

    def _row(self, bits: str, arm: str, rounding: str, size: int, error: str, seconds: float) -> dict[str, Any]:
        values = (self.model, bits, arm, rounding, self.seed, size, error, self.scale.samples, f"{seconds:.1f}")
        return dict(zip(FIELDS, (*values, str(self.model in TUNED_ON).lower()), strict=True))


def key_of(row: Mapping[str, Any]) -> Key:
    """What names a row."""
    return str(row["model"]), str(row["target_bits"]), str(row["arm"]), str(row["seed"])


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; none when there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Put one row at the end of a results file."""
    fresh = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def predictions(work: Path) -> Iterator[dict[str, Any]]:
    """How well predicted losses rank the maps that ``ours`` measured, from the folders of the runs."""
    for path in sorted(work.glob("*-seed*/allocations/ours@uniform-*/allocation.json")):
        model, seed = path.parents[2].name.rsplit("-seed", 1)
        found = read_json(path, "mpqsearch/allocation").data["selection"]
        values = (model, path.parent.name.rsplit("-", 1)[1], seed, len(found["rows"]), found["spearman"])
        yield dict(zip(PREDICTION_FIELDS, values, strict=True))


def missing(
    done: Iterable[Key], models: Iterable[str], bits: Iterable[int], arms: Iterable[str], seeds: Iterable[int]
) -> Iterator[tuple[str, int, list[tuple[str, int]]]]:
    """By model and seed: the arms and bits that have no row."""
    known, arms, bits, seeds = set(done), list(arms), list(bits), list(seeds)
    for seed in seeds:
        for model in models:
            cells = [(a, b) for b in bits for a in arms if (model, str(b), a, str(seed)) not in known]
            if cells:
                yield model, seed, cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--arms", nargs="+", choices=KNOWN, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--samples", type=int, default=Scale.samples, help="pairs of samples that judge a map")
    parser.add_argument("--trials", type=int, default=Scale.trials, help="trials of each outer search")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/robustness"), help="folder of the runs")
    options = parser.parse_args()
    scale = Scale(samples=options.samples, trials=options.trials)
    done = map(key_of, read(options.csv))
    for model, seed, cells in missing(done, options.models, options.bits, options.arms, options.seeds):
        bench = Bench(model, seed, scale, options.work)
        if row := bench.profile_row():
            append(options.csv, row)
        for arm, bits in cells:
            row = bench.row(arm, bits)
            append(options.csv, row)
            print(f"{model} seed {seed}, {bits} bits, {arm}: {row['paired_error']} ({row['seconds']} s)", flush=True)
    known = {tuple(list(r.values())[:3]) for r in read(PREDICTIONS)}
    for row in predictions(options.work):
        if tuple(map(str, list(row.values())[:3])) not in known:
            append(PREDICTIONS, row)


if __name__ == "__main__":
    main()
