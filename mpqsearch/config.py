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
from mpqsearch.errors import ConfigError, UnknownNameError, nearest
from mpqsearch.methods import MethodSpec


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """``source``: an embedded name, a diffusers folder, or ``owner/name`` of a hub. ``device``: ``cpu``, ``cuda``, ``mps``.

    ``memory_limit``: what measuring may take beside the model, such as ``6GB``; empty for no limit. It changes how, not what is measured.
    """

    source: str = "fmnist-unet"
    revision: str | None = None
    device: str = "cpu"
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
    """How ranges are searched; the codebook belongs to each method."""

    criterion: str = "lp"
    p: float = 2.4
    n_candidates: int = 80

    def format(self) -> QuantFormat:
        """The format without a codebook of its own."""
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

    With ``weights_only`` nothing runs: the weights are read from disk, one layer at a time, and only ``codebooks`` counts.
    """

    samples: int = 8
    first_seed: int = 1_000_000
    probe_inputs: int = 40
    probes: int = 2
    codebooks: tuple[str, ...] = ("affine", "auto")
    prescale: bool = False
    final_widths: tuple[int, ...] = ()
    final_seeds: int = 8
    seed: int = 0
    weights_only: bool = False


@dataclass(frozen=True, kw_only=True)
class AllocateConfig:
    """``budgets`` in the notation of `Budget.parse`, such as ``"uniform:3"``, ``"3bit"`` or ``"450kB"``."""

    budgets: tuple[str, ...] = ("uniform:3",)

    def parsed(self) -> tuple[Budget, ...]:
        """The budgets."""
        return tuple(Budget.parse(text) for text in self.budgets)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which samples are compared, and with which features.

    Seeds ``first_seed .. first_seed + samples - 1``. ``extractor``: ``fmnist-cnn``, ``random-conv`` or ``inception``; the last may read
    ``extractor_weights``. ``reference``: file of data statistics; empty: the embedded ones of the extractor, if it has any.
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
class ReportConfig:
    """``chosen``: the method whose maps are drawn and exported (empty: the one with the best front)."""

    title: str = ""
    chosen: str = ""
    grid_columns: int = 10


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """``targets``: names of exporters. ``budget``: which budget's map (empty: the first). ``rounding``: for widths a target lacks."""

    targets: tuple[str, ...] = ("neutral",)
    budget: str = ""
    rounding: str = "resolve"


DEFAULT_METHODS = (
    MethodSpec(name="uniform", allocator="uniform"),
    MethodSpec(name="ilp-channel", allocator="ilp-channel", codebook="auto", bias_correction=True),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole study."""

    model: ModelConfig = field(default_factory=ModelConfig)
    policy: Policy = field(default_factory=Policy)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    allocate: AllocateConfig = field(default_factory=AllocateConfig)
    methods: tuple[MethodSpec, ...] = DEFAULT_METHODS
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        names = [m.name for m in self.methods]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"methods need distinct names and at least one entry, got {names}")
        if self.report.chosen and self.report.chosen not in names:
            raise UnknownNameError("method", self.report.chosen, names, "(report.chosen)")
        self.allocate.parsed()
        if self.export.budget:
            Budget.parse(self.export.budget)

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

    Raises `ConfigError` for a missing or malformed file, an unknown key (naming the nearest) or a value of the wrong type.
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
