"""TOML into frozen dataclasses. Unknown keys are an error that names the nearest one; nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpqsearch.core import Budget, Policy, QuantFormat
from mpqsearch.core.budget import parse_size
from mpqsearch.core.formats import check_width
from mpqsearch.errors import ConfigError, UnknownNameError, nearest
from mpqsearch.export import EXPORTERS, ROUNDINGS
from mpqsearch.methods import MethodSpec
from mpqsearch.search.space import parse_space
from mpqsearch.search.study import MODES, PRUNERS, SAMPLERS


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """``source``: an embedded name, a diffusers folder, or ``owner/name`` of a hub. ``device``: ``cpu``, ``cuda``,
    ``mps``.

    ``dtype``: ``float32``, ``bfloat16``, ``float16``, or ``stored``. ``component``: which part of a pipeline (empty:
    its denoiser). ``memory_limit``: what measuring may take beside the model, such as ``6GB``; empty for no limit. It
    changes how, not what is measured.
    """

    source: str = "fmnist-unet"
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    component: str = ""
    memory_limit: str = ""

    def __post_init__(self) -> None:
        if self.memory_limit:
            parse_size(self.memory_limit)

    @property
    def limit_bytes(self) -> int | None:
        """The memory limit in bytes; None without one."""
        return parse_size(self.memory_limit) if self.memory_limit else None


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """How ranges are searched; scheme and rounding belong to each method.

    ``moment_samples``: samples from whose trajectories GPTQ rounding learns what inputs are like.
    """

    criterion: str = "lp"
    p: float = 2.4
    n_candidates: int = 80
    moment_samples: int = 40

    def __post_init__(self) -> None:
        if self.moment_samples < 1:
            raise ConfigError(f"quantizer.moment_samples must be at least 1, got {self.moment_samples}")

    def format(self) -> QuantFormat:
        """The format without a scheme of its own."""
        return QuantFormat(criterion=self.criterion, p=self.p, n_candidates=self.n_candidates)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """See `mpqsearch.sampling.SamplerSpec`."""

    name: str = "ddim"
    steps: int = 10
    guidance: float = 1.0
    batch: int = 32


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """See `mpqsearch.profile.CalibrationSpec`.

    With ``weights_only`` nothing runs: the weights are read from disk, one layer at a time, and only ``schemes``
    counts. With ``prediction_only`` only what predicts the loss of given maps is measured.

    ``at``: file of a bit map at which gains are measured again (`mpqsearch.profile.remeasure`), on the trajectories of
    ``samples``: the losses ``operating`` that a method can then take.

    ``captured``: file of recorded calls (`mpqsearch.models.save_calls`), which take the place of our own sampler: for
    denoisers that need prompt embeddings or anything else that a pipeline gives.
    """

    captured: str = ""
    samples: int = 8
    first_seed: int = 1_000_000
    probe_inputs: int = 40
    probes: int = 2
    buckets: int = 5
    sampler_seeds: int = 8
    sampler_probes: int = 4
    context_seeds: int = 12
    context_widths: tuple[int, ...] = (2, 3, 4)
    schemes: tuple[str, ...] = ("asymmetric", "auto")
    smooth: bool = False
    activation_bits: tuple[int, ...] = ()
    final_widths: tuple[int, ...] = ()
    final_seeds: int = 8
    target_error: float = 0.0
    race: float = 0.0
    checkpoint: bool = False
    seed: int = 0
    prediction_only: bool = False
    weights_only: bool = False
    at: str = ""

    def __post_init__(self) -> None:
        for name in ("weights_only", "captured"):
            if self.at and getattr(self, name):
                raise ConfigError(
                    f"calibration.at = {self.at!r} measures gains at a bit map with the sampler, which "
                    f"calibration.{name} does without: set "
                    "one of them"
                )
        if self.weights_only and self.prediction_only:
            raise ConfigError(
                "calibration.weights_only runs nothing and calibration.prediction_only runs the sampler: set one of "
                "them"
            )


@dataclass(frozen=True, kw_only=True)
class ActivationsConfig:
    """How scales of quantized activations are calibrated, for methods with ``act_bits``: trajectories of the sampler
    with seeds ``first_seed .. first_seed + samples - 1``, and the range search of
    `mpqsearch.quant.ActivationSearch`."""

    samples: int = 8
    first_seed: int = 1_000_000
    p: float = 2.4
    n_candidates: int = 80
    zero_points: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"activations.samples must be at least 1, got {self.samples}")


@dataclass(frozen=True, kw_only=True)
class AllocateConfig:
    """``budgets`` in the notation of `Budget.parse`, such as ``"uniform:3"``, ``"3bit"`` or ``"450kB"``.

    ``targets``: export targets for which maps over their own formats are solved, too, at their true stored cost; an
    export for such a target takes its own map. ``maps``: maps from elsewhere, by name: files that ``mpqsearch import``
    wrote or can read. Each is a method of that name (allocator ``map``). ``target_probes``: trajectories through which
    a target's own errors are probed, with the interactions of layers (`mpqsearch.export.allocation.probed_losses`; 128
    in studies/gguf); 0: they are priced with the profile, and nothing runs.
    """

    budgets: tuple[str, ...] = ("uniform:3",)
    targets: tuple[str, ...] = ()
    target_probes: int = 0
    maps: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_targets(self.targets, "allocate.targets")
        if self.target_probes < 0:
            raise ConfigError(f"allocate.target_probes must be at least 0, got {self.target_probes}")

    def parsed(self) -> tuple[Budget, ...]:
        """The budgets."""
        return tuple(Budget.parse(text) for text in self.budgets)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which samples are compared, and with which features.

    Seeds ``first_seed .. first_seed + samples - 1``. ``extractor``: ``fmnist-cnn``, ``random-conv`` or ``inception``;
    the last may read ``extractor_weights``. ``reference``: file of data statistics; empty: the embedded ones of the
    extractor, if it has any.
    """

    samples: int = 128
    first_seed: int = 0
    extractor: str = "fmnist-cnn"
    extractor_weights: str = ""
    reference: str = ""

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ConfigError(f"evaluate.samples must be at least 2, got {self.samples}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a quantized student is trained; see `mpqsearch.distill.DistillSpec`, `TRDSpec` and
    `mpqsearch.quant.param_groups`.

    ``trainable``: ``scales``, ``lora`` or ``all``. ``lora_lr``, ``weight_lr``, ``weight_scale_lr`` and
    ``activation_scale_lr`` are learning rates in units of the mean quantization step of a layer; ``lr_factor``
    multiplies all of them. The defaults are for a few hundred steps; the released codes of EfficientDM and MPQ-DM train
    16,000 with ``lora_lr`` = 1/2500. ``cached``: number of teacher trajectories that are kept in files and repeat (0:
    run online, never repeated). ``seed`` chooses the training noise. ``check_every``: every so many steps, and before
    the first, the student's Fréchet distance to full precision is measured on ``check_samples`` samples of the seeds
    from ``check_seed`` on, and the student of the least is what comes out (0: that of the last step). ``methods`` are
    trained by ``mpqsearch run`` at ``budgets`` (empty: all of ``[allocate]``).
    """

    trainable: str = "lora"
    rank: int = 32
    steps: int = 400
    batch: int = 8
    seed: int = 0
    cached: int = 0
    window: int = 2
    temperature: float = 0.1
    weight: float = 0.1
    pooled_size: int = 16
    truncate: bool = False
    queue: int = 0
    as_released: bool = False
    feature: str = ""
    lora_lr: float = 0.04
    weight_lr: float = 0.04
    weight_scale_lr: float = 1e-3
    activation_scale_lr: float = 5e-3
    lr_factor: float = 1.0
    weight_decay: float = 0.01
    ema: float = 0.0
    timestep_weights: str = "uniform"
    clip_norm: float = 1.0
    accumulate: int = 1
    precision: str = "float32"
    explosion: float = 20.0
    check_every: int = 0
    check_samples: int = 128
    check_seed: int = 3_000_000
    checkpoint_every: int = 100
    keep_last: int = 2
    tensorboard: bool = False
    methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in self.budgets:
            Budget.parse(text)
        if self.trainable not in TRAINABLE:
            raise UnknownNameError("choice of what is trainable", self.trainable, TRAINABLE, "(distill.trainable)")
        rates = (self.lora_lr, self.weight_lr, self.weight_scale_lr, self.activation_scale_lr, self.lr_factor)
        if any(not rate >= 0 for rate in rates):
            raise ConfigError("distill: learning rates and lr_factor must be at least 0")
        if self.cached < 0:
            raise ConfigError(f"distill.cached must be at least 0, got {self.cached}")
        if self.check_every and self.check_samples < 2:
            raise ConfigError(
                f"distill.check_samples must be at least 2, the least that has a covariance, got {self.check_samples}"
            )


TRAINABLE = ("scales", "lora", "all")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """``chosen``: the method whose maps are drawn and exported (empty: the one with the best front)."""

    title: str = ""
    chosen: str = ""
    grid_columns: int = 10


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """``targets``: names of exporters. ``budget``: which budget's map (empty: the first).

    ``rounding``: what happens where a target cannot hold the map: ``resolve`` solves again over the target's formats at
    the size of the map, ``up`` and ``down`` take the next width, ``error`` refuses.
    """

    targets: tuple[str, ...] = ("neutral",)
    budget: str = ""
    rounding: str = "resolve"

    def __post_init__(self) -> None:
        _check_targets(self.targets, "export.targets")
        if self.rounding not in ROUNDINGS:
            raise UnknownNameError("rounding", self.rounding, ROUNDINGS, "(export.rounding)")


def _check_targets(names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in EXPORTERS:
            raise UnknownNameError("export target", name, EXPORTERS, f"({where})")


DEFAULT_SPACE: Mapping[str, Any] = {
    "exponent": [0.5, 2.0],
    "row_exponent": [0.5, 2.0],
    "low_bits": [-1.0, 2.0],
    "kurtosis": [-1.0, 1.0],
    "depth": [-3.0, 3.0],
    "role_conv": [0.2, 5.0],
    "role_shortcut": [0.2, 5.0],
    "role_attention": [0.2, 5.0],
    "role_time": [0.2, 5.0],
    "role_resample": [0.2, 5.0],
    "granularity": ["channel", "layer"],
}
"""The space of a search that declares none."""


INPUT_SEEDS = 4
"""Trajectories from which the inputs of the search's cheap rung come; their seeds follow the search seeds, the final
seeds theirs, and the seeds of the refinement those."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The outer search around one method; ``trials`` 0: none.

    ``method``: the method whose integer program is searched around (empty: the last one with an integer program).
    ``mode``: ``front`` (one value over the budgets) or ``pareto`` (bits and error, budgets between ``low_bits`` and
    ``high_bits``). ``sampler``: tpe, gp, nsga2, cmaes, random, qmc. ``pruner``: wilcoxon, median, none. ``budgets``:
    the grid (empty: those of ``[allocate]``). ``samples`` search seeds from ``first_seed``, ``chunk`` at a time; they
    are not those of ``[evaluate]``, on which the winners are judged. ``inputs`` denoiser inputs for the cheap rung (0:
    none). ``error``: what is minimized, ``features`` (squared distance of the extractor's features of a sample to those
    of the full-precision one) or ``pixels``. ``finalists``: maps a budget that run again on ``final_samples`` further
    seeds, which choose the one handed out (0 samples: the search seeds choose); only what beats the plain program's map
    there by more than a standard error takes its place. ``refine``: rounds of measured descent from the best finalist
    of each budget (`mpqsearch.search.refine`; 0: none), with ``refine_samples`` seeds for the slopes and as many for
    choosing steps in each round. ``top``: maps a budget that are measured on the report seeds. ``repeats``: draws of
    the random arms. ``act_bits``: activation width of searched layers. ``refit``: correct the loss table by what was
    measured, solve again and say whether it pays. ``study``: its name in the storage (empty: that of the run folder).
    ``space``: what may change, see `mpqsearch.search.space`. ``start_from``: a map from elsewhere, or its name in
    ``[allocate.maps]``; the point nearest to it is tried first, and it is measured beside the winners.
    """

    method: str = ""
    mode: str = "front"
    trials: int = 0
    sampler: str = "tpe"
    pruner: str = "wilcoxon"
    seed: int = 0
    budgets: tuple[str, ...] = ()
    low_bits: float = 2.0
    high_bits: float = 4.0
    samples: int = 16
    first_seed: int = 2_000_000
    chunk: int = 4
    inputs: int = 32
    error: str = "features"
    finalists: int = 4
    final_samples: int = 48
    refine: int = 0
    refine_samples: int = 16
    top: int = 2
    repeats: int = 3
    act_bits: int = 16
    refit: bool = False
    study: str = ""
    start_from: str = ""
    space: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_SPACE))

    @property
    def seeds(self) -> int:
        """All seeds from ``first_seed`` that something is chosen on: search seeds, those of the cheap rung, final and
        refinement seeds."""
        return self.samples + INPUT_SEEDS + self.final_samples + 2 * self.refine * self.refine_samples

    def __post_init__(self) -> None:
        least = {
            "trials": 0,
            "top": 1,
            "repeats": 1,
            "samples": 2,
            "inputs": 0,
            "finalists": 1,
            "final_samples": 0,
            "refine": 0,
            "refine_samples": 8,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"search.{name} must be at least {low}, got {getattr(self, name)}")
        if not 1 <= self.chunk <= self.samples:
            raise ConfigError(f"search.chunk must lie in 1..{self.samples} (search.samples), got {self.chunk}")
        if not 1 <= self.low_bits < self.high_bits <= 8:
            raise ConfigError(f"search needs 1 <= low_bits < high_bits <= 8, got {self.low_bits} and {self.high_bits}")
        check_width(self.act_bits, "search.act_bits")
        parse_space(self.space)
        for text in self.budgets:
            Budget.parse(text)


DEFAULT_METHODS = (
    MethodSpec(name="uniform", allocator="uniform"),
    MethodSpec(name="ilp-channel", allocator="ilp-channel", scheme="auto", bias_correction=True),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole study."""

    model: ModelConfig = field(default_factory=ModelConfig)
    policy: Policy = field(default_factory=Policy)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    allocate: AllocateConfig = field(default_factory=AllocateConfig)
    methods: tuple[MethodSpec, ...] = DEFAULT_METHODS
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        named = [m.name for m in self.methods]
        maps = tuple(MethodSpec(name=n, allocator="map") for n in self.allocate.maps if n not in named)
        object.__setattr__(self, "methods", (*self.methods, *maps))
        names = [m.name for m in self.methods]
        for method in self.methods:
            if (method.allocator == "map") != (method.name in self.allocate.maps):
                raise ConfigError(
                    f"the method {method.name!r} needs the allocator 'map' and a file in [allocate.maps], both or "
                    "neither"
                )
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"methods need distinct names and at least one entry, got {names}")
        if self.report.chosen and self.report.chosen not in names:
            raise UnknownNameError("method", self.report.chosen, names, "(report.chosen)")
        self.allocate.parsed()
        if self.search.method and self.search.method not in names:
            raise UnknownNameError("method", self.search.method, names, "(search.method)")
        for name in self.distill.methods:
            if name not in names:
                raise UnknownNameError("method", name, names, "(distill.methods)")
        self._check_search()
        self._check_training()
        if self.export.budget:
            Budget.parse(self.export.budget)

    def method(self, name: str) -> MethodSpec:
        """The method of that name. Raises `UnknownNameError` when the study has none."""
        by_name = {m.name: m for m in self.methods}
        if name not in by_name:
            raise UnknownNameError("method", name, by_name)
        return by_name[name]

    def _check_search(self) -> None:
        for what, value, known in (
            ("sampler", self.search.sampler, SAMPLERS),
            ("mode", self.search.mode, MODES),
            ("pruner", self.search.pruner, PRUNERS),
        ):
            if value not in known:
                raise UnknownNameError(f"{what} of the search", value, known, f"(search.{what})")
        searched = [m.name for m in self.methods if m.allocator == "search"]
        if searched and not self.search.trials:
            raise ConfigError(
                f"the method {searched[0]!r} is what the outer search finds; set search.trials to run one"
            )
        c, e = self.search, self.evaluate
        if c.trials and c.first_seed < e.first_seed + e.samples and e.first_seed < c.first_seed + c.seeds:
            raise ConfigError(
                f"the seeds of the search {c.first_seed}..{c.first_seed + c.seeds - 1} and the report seeds "
                f"{e.first_seed}.."
                f"{e.first_seed + e.samples - 1} overlap: a map would be judged on the noise that chose it. Move "
                "search.first_seed."
            )

    def _check_training(self) -> None:
        c, e = self.distill, self.evaluate
        if c.check_every and c.check_seed < e.first_seed + e.samples and e.first_seed < c.check_seed + c.check_samples:
            raise ConfigError(
                f"the seeds that choose the trained model {c.check_seed}..{c.check_seed + c.check_samples - 1} and "
                "the report seeds "
                f"{e.first_seed}..{e.first_seed + e.samples - 1} overlap: it would be judged on the noise that chose "
                "it. Move distill.check_seed."
            )

    def to_data(self) -> dict[str, Any]:
        """As plain data, defaults filled in."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: _plain(v) for k, v in data.items()}

    def to_toml(self) -> str:
        """As TOML text that `load_config` reads back to the same configuration."""
        lines: list[str] = []
        for section, value in self.to_data().items():
            for table in value if isinstance(value, list) else [value]:
                lines.append(f"[[{section}]]" if isinstance(value, list) else f"[{section}]")
                nested = {k: v for k, v in table.items() if isinstance(v, dict)}
                lines += [f"{k} = {json.dumps(v)}" for k, v in table.items() if v is not None and k not in nested]
                for key, inner in nested.items():
                    lines.append(f"[{section}.{key}]")
                    lines += [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in inner.items()]
                lines.append("")
        return "\n".join(lines)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML study and apply ``table.key=value`` overrides (values in TOML notation; bare words are strings).

    Raises `ConfigError` for a missing or malformed file, an unknown key (naming the nearest) or a value of the wrong
    type.
    """
    data: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"the configuration {path} does not exist. Presets are in the folder studies/.")
        try:
            data = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no valid TOML: {error}") from error
    for text in overrides:
        _override(data, text)
    return config_from(data)


def config_from(data: Mapping[str, Any]) -> Config:
    """A configuration from nested plain data."""
    config: Config = _build(Config, data, "")
    return config


def _override(data: dict[str, Any], text: str) -> None:
    key, sign, raw = text.partition("=")
    path = key.strip().split(".")
    if not sign or len(path) < 2 or not all(path):
        raise ConfigError(f"--set takes table.key=value, got {text!r}. Example: --set evaluate.samples=64")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    table = data
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text!r}: {part!r} is no table; edit the TOML file instead")
    table[path[-1]] = value


def _build(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"[{where}] should be a table, got {data!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            near = nearest(key, known)
            raise ConfigError(
                f"unknown key {(where + '.' if where else '') + key!r}"
                + (f" (did you mean {near!r}?)" if near else "")
                + f". Known here: {', '.join(sorted(known))}."
            )
    try:
        return cls(**{k: _convert(hints[k], v, f"{where}.{k}".lstrip(".")) for k, v in data.items()})
    except TypeError as error:
        raise ConfigError(f"[{where}]: {str(error).split('__init__() ')[-1]}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} should be a list, got {value!r}")
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None:  # a mapping from names to values
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} should be a table, got {value!r}")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} should be {hint.__name__}, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
