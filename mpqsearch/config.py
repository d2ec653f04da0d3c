"""TOML into frozen dataclasses. Unknown keys are an error that names the nearest one; nothing here imports torch."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpqsearch.core import Budget, Policy, QuantFormat
from mpqsearch.core.budget import parse_size
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.methods import MethodSpec
from mpqsearch.prompts import band_of
from mpqsearch.search.space import parse_space
from mpqsearch.sources import kind_of
from mpqsearch.specs import CalibrationSpec, DistillSpec, PromptsSpec, SamplerSpec, SearchSpec
from mpqsearch.specs.distill import TRAINED
from mpqsearch.specs.targets import check_targets
from mpqsearch.toml_text import dump_toml, toml_value
from mpqsearch.untrusted import build, read_toml


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is made smaller, and where it runs.

    source
        An embedded name, a diffusers folder, ``owner/name`` of a hub, or ``package.module:function``, which returns the
        model (`mpqsearch.sampling.load_model`).
    revision
        Branch, tag or commit of a model of a hub. Example: ``"main"``.
    device
        ``auto`` (the fastest here), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
    dtype
        What the model computes in: ``float32``, ``bfloat16``, ``float16``, or ``stored``: as the files have it.
    component
        Which part of a pipeline. Empty: its denoisers. Example: ``"transformer_2"``.
    memory_limit [bytes]
        Memory for measuring, in addition to the model; empty: no limit. It changes how, not what is measured. Example:
        ``"6GB"``.
    """

    source: str = "fmnist-unet"
    revision: str | None = None
    device: str = "auto"
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
    """How the range of each output channel is searched; scheme and rounding belong to each method.

    criterion
        ``lp`` minimises the sum of ``|w - w_q|**p``, ``minmax`` takes the full range.
    p
        The exponent of ``lp``; MPQ-DM's code has 2.4, the squared error 2.
    n_candidates [ranges]
        Ranges that ``lp`` tries for each channel.
    moment_samples [samples]
        Samples whose trajectories give the input statistics of GPTQ rounding.
    gradient_samples [samples]
        Samples whose gradients say what the outputs of layers do, for KFAC rounding.
    """

    criterion: str = "lp"
    p: float = 2.4
    n_candidates: int = 80
    moment_samples: int = 40
    gradient_samples: int = 32

    def __post_init__(self) -> None:
        for name in ("moment_samples", "gradient_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"quantizer.{name} must be at least 1, got {getattr(self, name)}")

    def format(self) -> QuantFormat:
        """The format without a scheme of its own."""
        return QuantFormat(criterion=self.criterion, p=self.p, n_candidates=self.n_candidates)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(CalibrationSpec):
    """What the sensitivity profile is measured on, and where its inputs come from.

    captured
        File of recorded calls (``mpqsearch record``), which take the place of a pipeline that cannot be run where the
        study runs. Example: ``"calls.safetensors"``.
    weights_only
        Run nothing: the weights are read from disk, one layer at a time, and only ``schemes`` counts.
    reuse
        Run folder of another model of the same structure, such as the base of a fine-tune: its sensitivities are taken,
        and only inputs and errors are measured. Example: ``"runs/base"``.
    """

    captured: str = ""
    weights_only: bool = False
    reuse: str = ""

    def __post_init__(self) -> None:
        CalibrationSpec.__post_init__(self)
        if self.weights_only and self.granularity == "layer":
            raise ConfigError(
                "calibration.weights_only runs nothing, calibration.granularity runs the sampler: set one of them"
            )
        if self.reuse and (self.weights_only or self.granularity == "layer"):
            raise ConfigError(
                "calibration.reuse takes sensitivities of channels, which calibration.weights_only and granularity = "
                '"layer" do not use: leave one of them out'
            )


@dataclass(frozen=True, kw_only=True)
class ActivationsConfig:
    """The range search of quantized activations (`mpqsearch.quant.RangeCollector`), for methods with ``act_bits``.

    samples [samples]
        Trajectories of the sampler whose inputs are measured.
    first_seed
        Seed of the first of them.
    zero_points
        Search zero points, too.
    """

    samples: int = 8
    first_seed: int = 1_000_000
    zero_points: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"activations.samples must be at least 1, got {self.samples}")


COMBINED = ("sum", "max")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Which parts of a pipeline are quantized, and share every budget.

    parts
        Denoisers, text encoders and the autoencoder (``vae``) by their names in ``model_index.json``; empty: the
        denoisers. All else stays as it is and is not counted. With the autoencoder, errors are those of decoded
        pictures. Example: ``["transformer", "text_encoder"]``.
    combine
        ``sum``: a budget is for all parts together. ``max``: for each by itself, as for parts that are never in memory
        at the same time.
    """

    parts: tuple[str, ...] = ()
    combine: str = "sum"

    def __post_init__(self) -> None:
        if self.combine not in COMBINED:
            raise UnknownNameError("way to combine parts", self.combine, COMBINED, "(budget.combine)")
        if len(set(self.parts)) < len(self.parts) or not all(self.parts):
            raise ConfigError(f"budget.parts must be different names, got {list(self.parts)}")
        if self.combine == "max" and len(self.parts) == 1:
            raise ConfigError(
                'budget.combine = "max" compares several parts, budget.parts names one: name another, or leave combine '
                "out"
            )


SELECTIONS = ("measured", "none")


@dataclass(frozen=True, kw_only=True)
class AllocateConfig:
    """How large the model may be, and how a map is chosen.

    budgets
        Sizes of the whole model, a map each: ``uniform:3`` (the bytes of 3 bits everywhere), ``3bit`` (a parameter),
        ``450kB``, ``2e9bops`` (bit operations), ``12ms`` (`Budget.parse`).
    within
        Further budgets that hold at the same time as each of these. Example: ``["2e9bops"]``.
    select
        How a method of the allocator ``measured``, and the map of an export target, are chosen among maps that differ
        in kind: ``measured``, by samples of each (of what the target's consumer decodes from its file), or ``none``:
        the plain integer program, unmeasured.
    select_samples [samples]
        At most so many samples of each map.
    costs
        CSV of latencies that you measured, which budgets in milliseconds need (`mpqsearch.methods.CostTable`). Example:
        ``"latency.csv"``.
    targets
        Export targets for which maps over their own formats are solved, too, at their true stored cost; an export for
        such a target takes its own map. Example: ``["gguf"]``.
    target_probes [trajectories]
        Trajectories through which a target's own errors are probed, with the interactions of layers
        (`mpqsearch.export.allocation.probed_losses`), and its map is solved with these alone where nothing is measured.
        0: as many as ``calibration.sampler_seeds``, for one of the maps that are measured.
    maps
        Maps from elsewhere, by name: files that ``mpqsearch import`` wrote or can read. Each is a method of that name
        (allocator ``map``). Example: ``{theirs = "runs/mine/imports/theirs/bitmap.json"}``.
    """

    budgets: tuple[str, ...] = ("uniform:3",)
    within: tuple[str, ...] = ()
    select: str = "measured"
    select_samples: int = 16
    costs: str = ""
    targets: tuple[str, ...] = ()
    target_probes: int = 0
    maps: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_targets(self.targets, "allocate.targets")
        if self.select not in SELECTIONS:
            raise UnknownNameError("selection", self.select, SELECTIONS, "(allocate.select)")
        if self.select_samples < 2:
            raise ConfigError(f"allocate.select_samples must be at least 2, got {self.select_samples}")
        if self.target_probes < 0:
            raise ConfigError(f"allocate.target_probes must be at least 0, got {self.target_probes}")
        if self.within and self.targets:
            raise ConfigError(
                "allocate.within does not go with allocate.targets: their one budget is their file's size"
            )
        labels = [b.label() for b in (*self.parsed(), *self.parsed_within())]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise ConfigError(f"allocate.budgets and allocate.within name the budget {twice} twice")
        needs = [b.label() for b in (*self.parsed(), *self.parsed_within()) if b.quantity == "latency"]
        if needs and not self.costs:
            raise ConfigError(
                f"the budget {needs[0]} needs measured latencies: name a CSV with the columns layer, bits, cost "
                "(--latency FILE, or allocate.costs)"
            )

    def parsed(self) -> tuple[Budget, ...]:
        """The budgets."""
        return tuple(Budget.parse(text) for text in self.budgets)

    def parsed_within(self) -> tuple[Budget, ...]:
        """The budgets that hold beside each of them."""
        return tuple(Budget.parse(text) for text in self.within)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which samples are compared, and with which features.

    samples [samples]
        Samples of each map.
    first_seed
        Seed of the first sample; the others follow.
    extractor
        Network whose features are compared: ``auto`` (by the pictures), ``fmnist-cnn``, ``fmnist-judge``,
        ``random-conv``, ``inception`` (FID), ``dinov2`` (FD-DINOv2) or ``clip`` (CMMD).
    extractor_weights
        File with the weights of ``inception`` (empty: those that torch-fidelity brings), or the folder of transformers
        of ``dinov2`` and ``clip``. Example: ``"inception.pth"``.
    reference
        File of data statistics, for distances to data. Empty: the embedded ones of the extractor, if it has any.
        Example: ``"my-images.safetensors"``.
    scorers
        Scores of single pictures in addition to PSNR: ``ssim``, ``lpips:FILE``, ``clip:FOLDER``, ``clip-iqa:FOLDER``,
        ``pickscore:FOLDER``, or ``package.module:function`` of your own (`mpqsearch.metrics.load_scorer`). Files are
        local ones; ``mpqsearch doctor`` says which. Example: ``["ssim", "clip:fmnist-clip"]``.
    """

    samples: int = 128
    first_seed: int = 0
    extractor: str = "auto"
    extractor_weights: str = ""
    reference: str = ""
    scorers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ConfigError(f"evaluate.samples must be at least 2, got {self.samples}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(DistillSpec):
    """How a quantized model is trained against full precision, its data and its checks.

    The student is `mpqsearch.quant.build_student`. The defaults are for a few hundred steps; the released codes of
    EfficientDM and MPQ-DM train 16,000 with ``lora_lr`` = 1/2500.

    trainable
        ``scales``, ``lora`` or ``all``.
    rank
        Rank of the low-rank updates that ``lora`` trains.
    batch [samples]
        Samples of one training step.
    seed
        Chooses the training noise.
    lora_lr, weight_lr [quantization steps of each row]
        Learning rates of low-rank updates and of weights.
    lr_factor
        Multiplies these and the learning rate of the scales.
    check_samples [samples]
        With ``check_every``: samples on which the student's Fréchet distance to full precision is measured. The student
        of the least is the result.
    check_seed
        Seed of the first of them.
    methods
        Methods of the study that ``mpqsearch run`` trains; empty: none. Example: ``["measured"]``.
    budgets
        Budgets at which it trains them; empty: all of ``[allocate]``. Example: ``["uniform:2"]``.
    """

    trainable: str = "lora"
    rank: int = 32
    batch: int = 8
    seed: int = 0
    lora_lr: float = 0.02
    weight_lr: float = 0.004
    lr_factor: float = 1.0
    check_samples: int = 128
    check_seed: int = 3_000_000
    methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        DistillSpec.__post_init__(self)
        for text in self.budgets:
            Budget.parse(text)
        if self.trainable not in TRAINABLE:
            raise UnknownNameError("choice of what is trainable", self.trainable, TRAINABLE, "(distill.trainable)")
        if any(not rate >= 0 for rate in self.rates.values()):
            raise ConfigError("distill: learning rates and lr_factor must be at least 0")
        if self.check_every and self.check_samples < 2:
            raise ConfigError(
                f"distill.check_samples must be at least 2, the least that has a covariance, got {self.check_samples}"
            )

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates as `mpqsearch.quant.param_groups` takes them."""
        names = ("lora_lr", "weight_lr", "lr_factor")
        return {name: getattr(self, name) for name in names}

    @property
    def check_seeds(self) -> range:
        """Seeds of the samples on which the student is checked."""
        return range(self.check_seed, self.check_seed + self.check_samples)


TRAINABLE = ("scales", "lora", "all")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report page shows.

    title
        Heading of the page; empty: one with the model's name. Example: ``"Our model at 3 bits"``.
    chosen
        The method whose maps are drawn and exported, with ``+trd`` appended for its trained models. Empty: the one
        with the best front. Example: ``"measured"``.
    """

    title: str = ""
    chosen: str = ""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written for other quantizers.

    targets
        Names of exporters, see `mpqsearch doctor`.
    budget
        Which budget's map. Empty: the first; ``mpqsearch run``: all. Example: ``"uniform:3"``.
    measure
        Evaluate every file with the weights that its consumer decodes.
    """

    targets: tuple[str, ...] = ("neutral",)
    budget: str = ""
    measure: bool = True

    def __post_init__(self) -> None:
        check_targets(self.targets, "export.targets")


DEFAULT_METHODS = (
    MethodSpec(name="uniform", allocator="uniform"),
    MethodSpec(name="measured", allocator="measured", scheme="auto", bias_correction=True, rounding="kfac"),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole study."""

    model: ModelConfig = field(default_factory=ModelConfig)
    policy: Policy = field(default_factory=Policy)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    prompts: PromptsSpec = field(default_factory=PromptsSpec)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    allocate: AllocateConfig = field(default_factory=AllocateConfig)
    methods: tuple[MethodSpec, ...] = DEFAULT_METHODS
    search: SearchSpec = field(default_factory=SearchSpec)
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
        if self.report.chosen and self.report.chosen.removesuffix(TRAINED) not in names:
            raise UnknownNameError("method", self.report.chosen, names, "(report.chosen)")
        self.allocate.parsed()
        if self.search.trials and self.allocate.within:
            raise ConfigError(
                "the outer search keeps to one budget at a time: leave out allocate.within or search.trials"
            )
        if self.search.method and self.search.method not in names:
            raise UnknownNameError("method", self.search.method, names, "(search.method)")
        for name in self.distill.methods:
            if name not in names:
                raise UnknownNameError("method", name, names, "(distill.methods)")
        self._check_search()
        self._check_seeds()
        self._check_parts()
        if self.export.budget:
            Budget.parse(self.export.budget)

    def method(self, name: str) -> MethodSpec:
        """The method of that name. Raises `UnknownNameError` when the study has none."""
        by_name = {m.name: m for m in self.methods}
        if name not in by_name:
            raise UnknownNameError("method", name, by_name)
        return by_name[name]

    def chosen_method(self, name: str | None) -> str:
        """``name`` when the study has such a method; without one the method of the report, else the last."""
        return self.method(name or self.report.chosen.removesuffix(TRAINED) or self.methods[-1].name).name

    def _check_search(self) -> None:
        parse_space(self.search.space)
        searched = [m.name for m in self.methods if m.allocator == "search"]
        if searched and not self.search.trials:
            raise ConfigError(
                f"the method {searched[0]!r} is what the outer search finds; set search.trials to run one"
            )

    @property
    def component(self) -> str | tuple[str, ...]:
        """The parts of the pipeline that are quantized; empty: its denoisers."""
        return self.budget.parts or self.model.component

    def _check_parts(self) -> None:
        """Raise `ConfigError` for what does not go with the parts of the budget."""
        b = self.budget
        if b.combine == "max" and (self.allocate.targets or self.search.trials):
            raise ConfigError(
                'budget.combine = "max" solves for each part by itself, which allocate.targets and search.trials do '
                "not: leave them out, or combine"
            )
        if b.parts and self.model.component:
            raise ConfigError("model.component and budget.parts both say what is quantized: leave model.component out")
        if self.distill.methods:
            self.check_trainable()

    def check_trainable(self) -> None:
        """Raise `ConfigError` where parts of the model cannot be trained."""
        if any(map(kind_of, self.budget.parts)):
            raise ConfigError(
                "training (distill) changes denoisers alone: leave it out, or all other parts out of budget.parts"
            )

    def _check_seeds(self) -> None:
        """Raise `ConfigError` for seeds outside the band of their purpose: something would be judged on the noise, or
        shown on the prompts, that chose it."""
        c, a, e, s, d = self.calibration, self.activations, self.evaluate, self.search, self.distill
        moments = max(self.quantizer.moment_samples, self.quantizer.gradient_samples)
        most = max(c.samples, c.final_seeds, c.sampler_seeds, c.context_seeds, moments)
        for key, first, n, split in (
            ("calibration.first_seed", c.first_seed, most, "calibration"),
            ("activations.first_seed", a.first_seed, a.samples, "calibration"),
            ("evaluate.first_seed", e.first_seed, e.samples, "report"),
            ("search.first_seed", s.first_seed, s.seeds, "search"),
            ("distill.check_seed", d.check_seed, d.check_samples, "development"),
        ):
            low, end = band_of(split)
            if first < low or first + n > end:
                raise ConfigError(
                    f"the seeds {first}..{first + n - 1} from {key} on must lie in {low}..{end - 1}, those of the "
                    f"{split}: what is judged shares no noise and no prompt with what it was made from. Move {key}."
                )

    def to_data(self) -> dict[str, Any]:
        """As plain data, defaults filled in."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: _plain(v) for k, v in data.items()}

    def to_toml(self) -> str:
        """As TOML text that `load_config` reads back to the same configuration."""
        return dump_toml(self.to_data())


def load_config(
    path: Path | None, overrides: Sequence[str] = (), settings: Mapping[str, Any] = types.MappingProxyType({})
) -> Config:
    """Read a TOML study and apply ``table.key=value`` overrides (values in TOML notation; bare words are strings), then
    ``settings``: values by ``table.key``.

    Raises `ConfigError` for a missing or malformed file, an unknown key (naming the nearest) or a value of the wrong
    type.
    """
    if path is not None and not path.exists():
        raise ConfigError(f"the configuration {path} does not exist. Presets are in the folder studies/.")
    data = read_toml(path) if path is not None else {}
    for text in overrides:
        _override(data, text)
    for key, value in settings.items():
        _put(data, key.split("."), value, key)
    return config_from(data, "" if path is None else str(path))


def config_from(data: Mapping[str, Any], where: str = "") -> Config:
    """A configuration from nested plain data, which ``where`` holds."""
    return build(Config, data, where, ConfigError)


def _override(data: dict[str, Any], text: str) -> None:
    key, sign, raw = text.partition("=")
    path = key.strip().split(".")
    if not sign or len(path) < 2 or not all(path):
        raise ConfigError(f"--set takes table.key=value, got {text!r}. Example: --set evaluate.samples=64")
    _put(data, path, toml_value(raw), f"--set {text!r}")


def _put(data: dict[str, Any], path: Sequence[str], value: Any, what: str) -> None:
    table = data
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{what}: {part!r} is no table; edit the TOML file instead")
    table[path[-1]] = value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
