"""MPQ-DM in full against its parts and against this package, at equal size, schedule and seeds.

python studies/mpq_dm/study.py                    # every row that results.csv lacks, most telling first
python studies/mpq_dm/study.py --minutes 60       # no new row after an hour; the same command continues
python studies/mpq_dm/study.py --report-only      # figure and README from results.csv

A row is one (model, setting, method, seed). A finished row is in results.csv and is never computed again; an unfinished
one continues from its last checkpoint in --work.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alphas import choose_alphas
from report import write_report

from mpqsearch import artifacts
from mpqsearch.core import (
    BitMap,
    Budget,
    LayerTable,
    Policy,
    QuantFormat,
    SensitivityProfile,
    average_bits,
    bops,
    size_bytes,
)
from mpqsearch.distill import DistillSpec, TeacherCall, Trajectories, TRDSpec, distill
from mpqsearch.errors import NumericsError
from mpqsearch.methods import MethodSpec, Programs
from mpqsearch.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    Reference,
    SampleStore,
    distance_to_full_precision,
    evaluate,
    load_extractor,
    load_reference,
)
from mpqsearch.models import Denoiser, discover
from mpqsearch.profile import (
    CalibrationSpec,
    collect_ranges,
    formats_of,
    gptq_profile,
    input_statistics,
    profile_model,
    statistics_of,
)
from mpqsearch.quant import (
    RangeCollector,
    RowStatistics,
    build_student,
    convert,
    param_groups,
    smooth_inputs,
)
from mpqsearch.sampling import SamplerSpec, load_model, samples

HERE = Path(__file__).resolve().parent
MODELS = ("fmnist-unet", "fmnist-dit")
SETTINGS = {"W2A4": (2, 4), "W2A6": (2, 6), "W3A4": (3, 4), "W3A6": (3, 6), "W4A4": (4, 4)}
MOMENT_SAMPLES = 20
"""Trajectories, from the first calibration seed, that GPTQ sees: each of the ten classes twice."""

COLUMNS = (
    "model", "setting", "method", "seed", "average_bits", "size_bytes", "fd_data", "fd_fp", "paired_psnr", "n_samples",
    "train_steps", "seconds", "fd_data_spread", "fd_fp_spread", "paired_psnr_spread", "class_accuracy", "schedule",
    "chosen", "commit",
)  # fmt: skip
"""``*_spread``: half the width of the 95 % bootstrap interval over samples. ``schedule``: digest of `Schedule` and
`Recipe`, in the study's own words (`Recipe.digest`). ``chosen``: of methods that check, rounding and step of the
student that development noise chose, with its distance there. ``commit``: of the code that made the row."""
KEPT = 20
"""Trajectories of a teacher that stay in memory."""
CHECK_SEED = 160
"""The study's seed whose evaluation noise, from 1,600,000 on, is the development noise of methods that check: of no row
and no trial."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One method: how bits are allocated, what is trained (None: nothing), and whether there is a relation loss.

    ``size_of``: the method whose bytes are the budget, in place of the uniform map's. A method that chooses the widths
    of inputs has at most the bit operations of ``operations_of``, too. ``own_inputs``: quantized inputs as this package
    has them (zero points searched, alpha of smoothing by layer) in place of the released codes'; ``token_scales``: one
    scale for each token of a linear layer's input, in place of one for each timestep.
    ``gptq``: GPTQ rounding, which the allocation is priced with and training starts from. ``check_every``: the student
    ends as it was at the step, of every so many, with the least FD to full precision on ``check_samples`` samples of
    development noise; ``both_roundings``: of two trainings, with and without ``gptq``. ``timestep_weights``,
    ``clip_norm`` and ``ema``: of `DistillSpec`. ``lr_factor`` multiplies all learning rates. ``as_released``: the
    released code detaches both sides of the relation loss, so that it trains nothing: it is left out.
    """

    spec: MethodSpec
    trainable: str | None = None
    relation: bool = False
    as_released: bool = False
    size_of: str = ""
    operations_of: str = "ours"
    own_inputs: bool = False
    token_scales: bool = False
    gptq: bool = False
    check_every: int = 0
    check_samples: int = 0
    both_roundings: bool = False
    timestep_weights: str = "uniform"
    clip_norm: float = 1.0
    ema: float = 0.0
    lr_factor: float = 1.0

    def facts(self) -> dict[str, Any]:
        """What the method is, in words of this study: a field of the library that is renamed changes no digest."""
        own = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("spec", "operations_of", "token_scales")
        }
        return own | {
            "name": self.spec.name,
            "allocator": self.spec.allocator,
            "loss": self.spec.loss,
            "order": "kurtosis",  # what it was when the package had others
            "scheme": self.spec.scheme,
            "bias_correction": self.spec.bias_correction,
            "smoothing": self.spec.smooth,
            **({"input_widths": list(self.spec.act_choices)} if self.spec.act_choices else {}),
            **({"act_scales": "token"} if self.token_scales else {}),
            **({"operations_of": self.operations_of} if self.operations_of != "ours" else {}),
        }

    def digest(self, schedule: Schedule) -> str:
        """The first digits of the digest of all that a row of this method depends on, beside model, setting, seed and
        the package's own code."""
        return artifacts.digest_of([schedule.facts(), self.facts()])[:8]


OURS = Recipe(
    spec=MethodSpec(name="ours", allocator="ilp-channel", scheme="auto", bias_correction=True, smooth=True),
    trainable="all",
    relation=True,
    size_of="mpq-dm",
    own_inputs=True,
    gptq=True,
)
GENTLE: dict[str, Any] = {"timestep_weights": "sampler", "lr_factor": 0.25}
"""Training of the methods ``+gentle`` where weights have as many bits as inputs."""

CHECKED: dict[str, Any] = {"check_every": 50, "check_samples": 128}
"""How `ours` and ``mpq-dm+checked`` train where weights have as many bits as inputs."""

METHODS = {
    "ours": OURS,
    "ours+lora": replace(OURS, trainable="lora"),
    "mpq-dm": Recipe(
        spec=MethodSpec(name="mpq-dm", allocator="omq-paper", smooth=True), trainable="lora", relation=True
    ),
    "uniform+qalora": Recipe(spec=MethodSpec(name="uniform+qalora", allocator="uniform"), trainable="lora"),
    "uniform": Recipe(spec=MethodSpec(name="uniform", allocator="uniform")),
    "omq-paper": Recipe(spec=MethodSpec(name="omq-paper", allocator="omq-paper", smooth=True)),
    "mpq-dm+all": Recipe(
        spec=MethodSpec(name="mpq-dm", allocator="omq-paper", smooth=True), trainable="all", relation=True
    ),
    "mpq-dm+inputs": Recipe(
        spec=MethodSpec(name="mpq-dm", allocator="omq-paper", smooth=True),
        trainable="lora",
        relation=True,
        own_inputs=True,
    ),
    "ours+gentle": OURS,
    "mpq-dm+gentle": Recipe(
        spec=MethodSpec(name="mpq-dm", allocator="omq-paper", smooth=True), trainable="lora", relation=True
    ),
    "mpq-dm+checked": Recipe(
        spec=MethodSpec(name="mpq-dm", allocator="omq-paper", smooth=True), trainable="lora", relation=True
    ),
    "ours-untrained": replace(OURS, trainable=None, relation=False),
    "ours-nearest": replace(OURS, gptq=False),
    "ours-gptq": OURS,
    "uniform+trd": Recipe(spec=MethodSpec(name="uniform+trd", allocator="uniform"), trainable="lora", relation=True),
    "omq-released": Recipe(
        spec=MethodSpec(name="omq-released", allocator="omq-released", smooth=True),
        trainable="lora",
        relation=True,
        as_released=True,
    ),
}
LATER = (
    "mpq-dm+checked",
    "mpq-dm+gentle",
    "mpq-dm+inputs",
    "ours-untrained",
    "ours-nearest",
    "ours-gptq",
    "mpq-dm+all",
    "uniform+trd",
    "omq-released",
)
"""Methods whose rows come after those of the others for the same seed."""


def recipe_of(method: str, setting: str) -> Recipe:
    """What a method does at a setting. Where weights have as many bits as inputs `ours` and ``mpq-dm+checked`` end at
    the step that development noise chooses, `ours` with the rounding too; and the methods ``+gentle`` are trained
    gently there."""
    recipe = METHODS.get(method, FULL_PRECISION)
    weight_bits, act_bits = SETTINGS.get(setting, (16, 16))
    if weight_bits < act_bits:
        return recipe
    if method == "ours":
        return replace(recipe, **CHECKED, both_roundings=True)
    if method == "mpq-dm+checked":
        return replace(recipe, **CHECKED)
    return replace(recipe, **GENTLE) if method.endswith("+gentle") else recipe


TWINS = {
    "ours-nearest": "ours",
    "ours-gptq": "ours",
    "ours+gentle": "ours",
    "mpq-dm+gentle": "mpq-dm",
    "mpq-dm+checked": "mpq-dm",
}


def is_own(method: str, setting: str) -> bool:
    """False where a method is the very recipe of another name: that has no row of its own."""
    return method not in TWINS or recipe_of(method, setting) != recipe_of(TWINS[method], setting)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What all rows share; how the learning rates were chosen is in the README."""

    steps: int = 100
    batch: int = 4
    trajectories: int = 20
    samples: int = 128
    sampler: SamplerSpec = field(default_factory=lambda: SamplerSpec(steps=10, guidance=2.0, batch=32))
    calibration: CalibrationSpec = field(
        default_factory=lambda: CalibrationSpec(smooth=True, activation_bits=(4, 6), sampler_seeds=0)
    )
    relation: TRDSpec = field(default_factory=lambda: TRDSpec(window=2, temperature=0.1, weight=0.1, pooled_size=14))
    lora_lr: float = 0.04
    weight_lr: float = 0.008
    weight_scale_lr: float = 1e-3
    activation_scale_lr: float = 5e-3
    rank: int = 32

    def facts(self) -> dict[str, Any]:
        """What all rows share, in words of this study."""
        own = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("sampler", "calibration", "relation")
        }
        return own | {
            "sampler": [self.sampler.name, self.sampler.steps, self.sampler.guidance],
            "calibration_trajectories": [self.calibration.first_seed, self.calibration.samples],
            "probes": [self.calibration.probe_inputs, self.calibration.probes, self.calibration.sampler_seeds],
            "input_widths": list(self.calibration.activation_bits),
            "relation": [
                self.relation.window,
                self.relation.temperature,
                self.relation.weight,
                self.relation.pooled_size,
            ],
        }


def commit() -> str:
    """The commit of this code, with ``-dirty`` where files were changed; empty outside a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


FULL_PRECISION = Recipe(spec=MethodSpec(name="full-precision", allocator="uniform"))
"""Stands for the model itself in the digest of its rows."""


def digest_of_row(method: str, setting: str, schedule: Schedule) -> str:
    """What the column ``schedule`` should say."""
    return recipe_of(method, setting).digest(schedule)


class Model:
    """A model with what its rows share: profile, activation histograms, full-precision samples, teacher
    trajectories."""

    def __init__(self, name: str, schedule: Schedule, work: Path) -> None:
        self.name, self.schedule, self.work = name, schedule, work / name
        self.policy, self.format = Policy(), QuantFormat()
        self.denoiser: Denoiser = load_model(name, sampler=schedule.sampler)
        self.table: LayerTable = discover(self.denoiser)
        self.extractor: FeatureExtractor = load_extractor("fmnist-cnn" if name in MODELS else "fmnist-judge")
        self._ranges: dict[tuple[tuple[str, float], ...], RangeCollector] = {}
        self._maps: dict[tuple[Any, ...], BitMap] = {}
        self._references: dict[int, Reference] = {}
        self._teachers: dict[int, Trajectories] = {}

    @cached_property
    def profile(self) -> SensitivityProfile:
        """Measured once and kept in ``profile.json``."""
        path, spec = self.work / "profile.json", self.schedule.calibration
        asked = [spec.to_data(), self.schedule.sampler.to_data(), sorted(formats_of(spec, self.format))]
        inputs = {"model": self.table.digest, "calibration": artifacts.digest_of(asked)}
        if not artifacts.is_current(path, "mpqsearch/profile", inputs):
            made = profile_model(self.denoiser, self.table, self.policy, spec, self.format)
            artifacts.save_profile(path, made, inputs)
        return artifacts.load_profile(path)

    @cached_property
    def statistics(self) -> Mapping[str, RowStatistics]:
        """Second moments and means of the inputs of all layers."""
        first = self.schedule.calibration.first_seed
        return input_statistics(self.denoiser, self.table, range(first, first + MOMENT_SAMPLES))

    def rounds_by_gptq(self, spec: MethodSpec) -> SensitivityProfile:
        """The profile with the output errors of a method's format under GPTQ, kept in a file of its own."""
        path = self.work / f"profile-gptq-{spec.format_name}.json"
        asked = [
            self.schedule.sampler.to_data(),
            self.schedule.calibration.first_seed,
            MOMENT_SAMPLES,
            spec.format_name,
        ]
        inputs = {"profile": artifacts.digest_file(self.work / "profile.npz"), "moments": artifacts.digest_of(asked)}
        if not artifacts.is_current(path, "mpqsearch/profile", inputs):
            fmt = replace(self.format, scheme=spec.scheme, smooth=spec.smooth)
            made = gptq_profile(self.denoiser, self.table, self.profile, self.statistics, fmt)
            artifacts.save_profile(path, made, inputs)
        return artifacts.load_profile(path)

    @cached_property
    def known(self) -> dict[str, RowStatistics]:
        """What the profile knows of the inputs of layers."""
        return statistics_of(self.profile)

    def rounded(self, recipe: Recipe, bit_map: BitMap) -> tuple[BitMap, Mapping[str, RowStatistics]]:
        """A map with the rounding of a recipe, and what its quantizers know of the inputs. Smoothing follows the
        largest magnitudes of the profile."""
        if not recipe.gptq:
            return bit_map, self.known
        formats = {n: replace(f, rounding="gptq") for n, f in bit_map.formats.items()}
        known = {n: replace(s, input_max=self.known[n].input_max) for n, s in self.statistics.items()}
        return replace(bit_map, format=replace(bit_map.format, rounding="gptq"), formats=formats), known

    def ranges(self, bit_map: BitMap) -> RangeCollector:
        """Histograms of layer inputs by timestep, smoothed as the map has it; any width is searched on them."""
        key = bit_map.scaled_inputs
        if key not in self._ranges:
            factors = smooth_inputs(self.denoiser.module, self.table, bit_map, self.known)
            self._ranges[key] = collect_ranges(
                self.denoiser, self.table, seeds=self.seeds, per_timestep=True, factors=factors
            )
        return self._ranges[key]

    @property
    def seeds(self) -> range:
        """Of the calibration trajectories."""
        spec = self.schedule.calibration
        return range(spec.first_seed, spec.first_seed + spec.samples)

    def bit_map(self, recipe: Recipe, setting: str) -> BitMap:
        """What a method allocates, with the alphas of smoothing that it chooses."""
        key = (
            setting,
            recipe.spec,
            recipe.size_of,
            recipe.operations_of,
            recipe.own_inputs,
            recipe.token_scales,
            recipe.gptq,
        )
        if key not in self._maps:
            self._maps[key] = self._allocate(recipe, setting)
        return self._maps[key]

    def _allocate(self, recipe: Recipe, setting: str) -> BitMap:
        weight_bits, act_bits = SETTINGS[setting]
        budget = Budget.parse(f"uniform:{weight_bits}")
        if recipe.size_of:
            budget = Budget(
                quantity="bytes", limit=size_bytes(self.table, self.bit_map(METHODS[recipe.size_of], setting))
            )
        within = []
        if recipe.spec.act_choices:
            operations = bops(self.table, self.bit_map(METHODS[recipe.operations_of], setting))
            within = [Budget(quantity="bops", limit=operations)]
        scales = "token" if recipe.token_scales else "timestep"
        spec = replace(recipe.spec, act_bits=act_bits, act_scales=scales)
        profile = self.profile
        if recipe.gptq:
            profile = self.rounds_by_gptq(spec)
        made = (
            Programs(table=self.table, profile=profile, policy=self.policy, format=self.format)
            .allocate(spec, budget, within)
            .bit_map
        )
        if not (recipe.own_inputs and made.format.smooth):
            return made
        return choose_alphas(
            self.denoiser,
            self.table,
            made,
            statistics=self.known,
            seeds=self.seeds,
            zero_points=True,
        )

    def student(self, recipe: Recipe, bit_map: BitMap, seed: int) -> torch.nn.Module:
        """The quantized model of a method, ready to train."""
        rounded, known = self.rounded(recipe, bit_map)
        activations = None
        static = bit_map.static_inputs(self.table)
        if static:
            activations = self.ranges(bit_map).table(static, zero_points=recipe.own_inputs)
        return build_student(
            self.denoiser.module,
            self.table,
            rounded,
            statistics=known,
            bias_correction=recipe.spec.bias_correction,
            activations=activations,
            trainable=recipe.trainable or "none",  # type: ignore[arg-type]
            rank=self.schedule.rank,
            seed=seed,
        )

    def reference(self, seed: int, n_samples: int = 0) -> Reference:
        """Full-precision samples of the evaluation noise of ``seed``: ``10,000 seed`` and onwards, ``n_samples`` or
        those of the schedule."""
        if seed not in self._references:
            seeds = tuple(range(10_000 * seed, 10_000 * seed + (n_samples or self.schedule.samples)))
            made_from = {
                "model": self.table.digest,
                "sampler": artifacts.digest_of(self.schedule.sampler.to_data()),
            }
            store = SampleStore(self.work / "full-precision" / f"{seed}-{len(seeds)}", seeds, made_from)
            store.fill(samples(self.denoiser, store.missing))
            data = load_reference(None, self.extractor)
            self._references[seed] = Reference.of(store, self.extractor, data)
        return self._references[seed]

    def teacher(self, seed: int) -> Trajectories:
        """Trajectories that all rows of a seed are trained on, in the same order."""
        s = self.schedule
        if seed not in self._teachers:
            self._teachers = {
                seed: Repeated(self.denoiser, batch=s.batch, seed=seed, count=s.trajectories, relation=s.relation)
            }
        return self._teachers[seed]


class Repeated(Trajectories):
    """The first ``count`` trajectories, over and over: run once, with features, and kept for all rows of a seed."""

    def __init__(self, *args: Any, count: int, relation: TRDSpec, **options: Any) -> None:
        super().__init__(*args, **options)
        self.count, self.relation = count, relation
        self._kept: dict[int, list[TeacherCall]] = {}

    def run(self, index: int, relation: TRDSpec | None = None) -> list[TeacherCall]:  # noqa: ARG002
        """The calls of trajectory ``index`` modulo ``count``; a training without a relation loss ignores features."""
        index %= self.count
        calls = self._kept.get(index) or super().run(index, self.relation)
        if len(self._kept) < KEPT:
            self._kept[index] = calls
        return calls


def run_row(model: Model, setting: str, method: str, seed: int, recipe: Recipe | None = None) -> dict[str, Any]:
    """Allocate, train if the method trains, sample and measure; ``recipe`` in place of the study's own."""
    began = time.perf_counter()
    s, recipe = model.schedule, recipe or recipe_of(method, setting)
    row: dict[str, Any] = {
        "model": model.name,
        "setting": setting,
        "method": method,
        "seed": seed,
        "n_samples": s.samples,
    }
    row |= {"train_steps": s.steps if recipe.trainable else 0, "schedule": recipe.digest(s), "commit": commit()}
    tried = (
        [replace(recipe, both_roundings=False, gptq=c) for c in (True, False)] if recipe.both_roundings else [recipe]
    )
    trained: list[Trained] = []
    folders: list[Path] = []
    for one in tried:
        folders.append(folder := model.work / f"{setting}-{method}-{'gptq' if one.gptq else 'nearest'}-{seed}")
        bit_map = model.bit_map(one, setting)
        student = model.student(one, bit_map, seed)
        try:
            distance, step = (
                train(model, one, student, seed, folder, {"bit_map": bit_map.digest}) if one.trainable else (0.0, 0)
            )
        except NumericsError as error:  # a method that diverges has a row that says so
            print(f"{method}: {error}", file=sys.stderr)
            continue
        name = f"{'gptq' if one.gptq else 'nearest'} step {step}, {distance:.3f}" if one.check_every else ""
        trained.append(Trained(distance, bit_map, student, name))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    if not trained:
        return row | {"seconds": round(time.perf_counter() - began, 1)}
    best = min(trained, key=lambda t: t.distance)
    row |= {
        "average_bits": round(average_bits(model.table, best.bit_map), 4),
        "size_bytes": size_bytes(model.table, best.bit_map),
    }
    row |= {"chosen": "; ".join(t.name for t in sorted(trained, key=lambda t: t.distance))}
    measured = measure(model, convert(best.student).module, seed)
    return row | measured | {"seconds": round(time.perf_counter() - began, 1)}


@dataclass(frozen=True)
class Trained:
    """A student, its distance on development noise (0 where it is not checked), and what the row says of it."""

    distance: float
    bit_map: BitMap
    student: torch.nn.Module
    name: str


def train(
    model: Model,
    recipe: Recipe,
    student: torch.nn.Module,
    seed: int,
    folder: Path,
    inputs: Mapping[str, str],
    watch: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Train a student as the recipe has it, on the teacher's trajectories of ``seed``; returns the least distance on
    development noise and its step, or 0 and the number of steps of a recipe that does not check. ``watch`` is told
    every step that is done."""
    s = model.schedule
    groups = param_groups(
        student,
        lora_lr=s.lora_lr,
        weight_lr=s.weight_lr,
        weight_scale_lr=s.weight_scale_lr,
        activation_scale_lr=s.activation_scale_lr,
        lr_factor=recipe.lr_factor,
    )
    relation = recipe.relation and not recipe.as_released
    training = DistillSpec(
        steps=s.steps,
        relation=replace(s.relation, weight=s.relation.weight if relation else 0.0),
        timestep_weights=recipe.timestep_weights,
        clip_norm=recipe.clip_norm,
        ema=recipe.ema,
        check_every=recipe.check_every,
        checkpoint_every=50,
    )
    inputs = {**inputs, "recipe": recipe.digest(s)}

    def check(student: torch.nn.Module) -> float:
        base = model.reference(CHECK_SEED, recipe.check_samples)
        made = samples(model.denoiser.with_module(convert(student).module), base.seeds)
        return distance_to_full_precision(made, FeatureStatistics.of(base.features), model.extractor)

    state = None
    for state in distill(student, groups, model.teacher(seed), training, folder=folder, inputs=inputs, measure=check):
        if state.interrupted:
            raise SystemExit("interrupted: the running row is saved; the same command continues")
        if watch is not None:
            watch(state.step)
    if not recipe.check_every:
        return 0.0, s.steps
    if (
        state is None or state.best is None
    ):  # training was over when the study was interrupted; the student is the best one
        return check(student), -1
    return state.best[1], state.best[0]


def measure(model: Model, module: torch.nn.Module | None, seed: int) -> dict[str, float]:
    """Metrics of a quantized module, or of full precision itself (None), on the evaluation noise of ``seed``."""
    base = model.reference(seed)
    if module is None:
        found = base.evaluation().metrics
    else:
        made = samples(model.denoiser.with_module(module), base.seeds)
        found = evaluate(made, base).metrics
    out: dict[str, float] = {}
    for key in ("fd_data", "fd_fp", "paired_psnr", "paired_mse"):
        if key in found:
            out[key] = round(found[key].value, 5)
            out[f"{key}_spread"] = round((found[key].high - found[key].low) / 2, 5)
    for key in ("class_accuracy", "attributes_recognised"):
        if key in found:
            out[key] = round(found[key].value, 4)
    return out


def full_precision_row(model: Model, seed: int) -> dict[str, Any]:
    """Full precision against data: what excess distances are measured from."""
    full = BitMap(
        model_digest=model.table.digest, weights={la.name: np.array(16, dtype=np.uint8) for la in model.table}
    )
    return {
        "model": model.name,
        "setting": "full",
        "method": "full-precision",
        "seed": seed,
        "average_bits": round(average_bits(model.table, full), 4),
        "size_bytes": size_bytes(model.table, full),
        "n_samples": model.schedule.samples,
        "train_steps": 0,
        "seconds": 0.0,
        "schedule": digest_of_row("full-precision", "full", model.schedule),
        "commit": commit(),
        **measure(model, None, seed),
    }


def plan(args: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Rows in the order in which they tell most: seed 0 first, the main methods first, the lowest bits first."""
    for seed in range(args.from_seed, args.seeds):
        for model in args.models:
            yield model, "full", "full-precision", seed
        for tier in ([m for m in METHODS if m not in LATER], list(LATER)):
            for setting in args.settings:
                for model in args.models:
                    for method in tier:
                        if method in args.methods and is_own(method, setting):
                            yield model, setting, method, seed


def read_results(path: Path, schedule: Schedule, *, overwrite: bool) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """Finished rows by key. Rows of another schedule or recipe cannot be compared: they are refused, or dropped with
    ``overwrite``."""
    if not path.is_file():
        return {}
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(path.read_text())))
    other = [r for r in rows if r["schedule"] != digest_of_row(r["method"], r["setting"], schedule)]
    if other and not overwrite:
        first = other[0]
        raise SystemExit(
            f"{path} holds {len(other)} rows of another schedule, the first {first['method']} with "
            f"{first['schedule']}, which is "
            f"{digest_of_row(first['method'], first['setting'], schedule)} now. Give another --results, or "
            "--overwrite to drop them."
        )
    return {(r["model"], r["setting"], r["method"], int(r["seed"])): r for r in rows if r not in other}


def write_results(
    path: Path, rows: Mapping[tuple[str, str, str, int], Mapping[str, Any]], columns: Sequence[str] = COLUMNS
) -> None:
    """All rows, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows.values())
    artifacts.write_text(path, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--settings", nargs="+", default=tuple(SETTINGS), choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds, from 0")
    parser.add_argument("--from-seed", type=int, default=0, help="leave out the seeds before this one")
    parser.add_argument("--steps", type=int, help="optimiser steps of two timesteps each (another schedule)")
    parser.add_argument("--samples", type=int, help="evaluation samples (another schedule)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after this time")
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/mpq_dm"))
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--overwrite", action="store_true", help="drop rows of another schedule")
    args = parser.parse_args()
    changes = {k: v for k, v in (("steps", args.steps), ("samples", args.samples)) if v is not None}
    schedule = replace(Schedule(), **changes)
    done = read_results(args.results, schedule, overwrite=args.overwrite)
    rows = list(plan(args))
    began = time.perf_counter()
    models: dict[str, Model] = {}
    for n, key in enumerate(rows, start=1):
        if key in done or args.report_only:
            continue
        if time.perf_counter() - began > 60 * args.minutes:
            print(f"the time is up; {sum(k in done for k in rows)} of {len(rows)} rows are there", file=sys.stderr)
            break
        name, setting, method, seed = key
        if name not in models:
            models[name] = Model(name, schedule, args.work)
        model = models[name]
        made = full_precision_row(model, seed) if setting == "full" else run_row(model, setting, method, seed)
        done[key] = made
        write_results(args.results, done)
        print(
            f"{n}/{len(rows)} {name} {setting} {method} seed {seed}: {made['size_bytes']} bytes, FD to FP "
            f"{made.get('fd_fp', '-')}, "
            f"to data {made.get('fd_data', '-')}, PSNR {made.get('paired_psnr', '-')} dB, {made['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    if done:
        write_report(
            HERE if args.results.parent == HERE else args.results.parent,
            args.results,
            asdict(schedule),
            len({*rows, *done}),
        )


if __name__ == "__main__":
    main()
