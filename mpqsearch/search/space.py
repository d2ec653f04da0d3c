"""What the outer search may change: parameters with a meaning, a default and a range, declared in TOML.

In the table ``[search.space]`` a list makes a parameter active and a single value freezes it::

    [search.space]
    exponent = [0.5, 2.0]               # a range: low and high
    granularity = ["layer", "channel"]  # choices
    scheme = "auto"                     # frozen

Whatever is not named stays at its default. With every parameter at its default the search solves the plain integer
program, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from mpqsearch.core import ROLES, SCHEMES
from mpqsearch.core.formats import ACT_SCALES, ROUNDINGS
from mpqsearch.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = float | int | str
Theta = Mapping[str, Value]
"""Values of parameters by name; a missing one has its default."""

MAX_ACTIVE = 16
"""More active parameters are refused: a study of a few hundred trials cannot tell what so many do."""

BASE = "base"
"""The choice that stands for "as in the method that is searched around"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of the search.

    ``kind`` is ``float``, ``log`` (a positive number, sampled by its logarithm) or ``choice``. ``low`` and ``high`` are
    the range of a number, ``choices`` the values of a choice. ``default`` reproduces the plain integer program.
    """

    name: str
    kind: Literal["float", "log", "choice"]
    default: Value
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Value, ...] = ()
    meaning: str

    def suggest(self, trial: Trial) -> Value:
        """Ask an Optuna trial for a value."""
        if self.kind == "choice":
            return cast(Value, trial.suggest_categorical(self.name, self.choices))
        return trial.suggest_float(self.name, self.low, self.high, log=self.kind == "log")

    def nearest_default(self) -> Value:
        """The default, or the value of this range that is nearest to it."""
        if self.kind == "choice":
            return self.default if self.default in self.choices else self.choices[0]
        assert not isinstance(self.default, str)
        return min(max(self.default, self.low), self.high)


def _number(name: str, default: float, low: float, high: float, meaning: str) -> Parameter:
    return Parameter(name=name, kind="float", default=default, low=low, high=high, meaning=meaning)


def _choice(name: str, choices: Sequence[Value], meaning: str) -> Parameter:
    return Parameter(name=name, kind="choice", default=BASE, choices=(BASE, *choices), meaning=meaning)


def _role(role: str) -> Parameter:
    meaning = f"Factor of the losses of all layers with the role '{role}'."
    return Parameter(name=f"role_{role}", kind="log", default=1.0, low=0.01, high=100.0, meaning=meaning)


ON_OFF = ("on", "off")

PARAMETERS: Mapping[str, Parameter] = {
    p.name: p
    for p in (
        # How the losses are built.
        _choice("loss", ("weight", "output", "probe", "sampler", "final"), "Sensitivity that prices the widths."),
        _number("exponent", 1, 0.25, 3, "Exponent of the layer totals: above 1 large losses count more."),
        _choice("shrinkage", (0.0, 0.1, 0.3, 1.0), "Of the sensitivities of channels towards the mean of their layer."),
        _number("low_bits", 0, -3, 3, "Losses at b bits times 2**(low_bits * (4 - b)): above 0 few bits cost more."),
        _number("kurtosis", 0, -2, 2, "Losses of a channel times (kurtosis / 3)**kurtosis: above 0 heavy tails count."),
        _number("depth", 0, -3, 3, "Losses times 2**(depth * (position - 1/2)), position 0..1 in forward order."),
        *map(_role, ROLES),
        # What is quantized, and how.
        _choice("granularity", ("layer", "channel"), "Widths by layer or by output channel."),
        _choice("scheme", SCHEMES, "Quantizer scheme; the profile must have priced it."),
        _choice("rounding", ROUNDINGS, "Nearest or GPTQ rounding, priced with the errors that it leaves."),
        _choice("bias_correction", ON_OFF, "Whether the mean shift of a layer's output is taken off its bias."),
        _choice("smooth", ON_OFF, "Smoothing with alpha 1/2; its factors are stored and counted."),
        _choice(
            "act_scales", ACT_SCALES, "Scales of quantized inputs: a layer, a timestep (the budget pays) or a token."
        ),
        _choice("end_bits", (4, 6, 8), "Width of the first and the last layer; the budget stays the same."),
    )
}
"""Every parameter by name."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Active parameters, each with the range of this study, and frozen values by name."""

    active: tuple[Parameter, ...]
    frozen: Theta

    def suggest(self, trial: Trial) -> dict[str, Value]:
        """A point of the space, asked from an Optuna trial."""
        return {**self.frozen, **{p.name: p.suggest(trial) for p in self.active}}

    def theta(self, active: Theta) -> dict[str, Value]:
        """A point of the space from the values of its active parameters."""
        return {**self.frozen, **active}

    def starts(self) -> list[dict[str, Value]]:
        """Points to try first: the plain program, then each choice by itself."""
        plain = {p.name: p.nearest_default() for p in self.active}
        others = [{**plain, p.name: c} for p in self.active for c in p.choices if c not in (plain[p.name], BASE)]
        return [plain, *others]

    def to_data(self) -> dict[str, Any]:
        """As plain data that `parse_space` reads."""
        return {p.name: list(p.choices) or [p.low, p.high] for p in self.active} | dict(self.frozen)


def parse_space(declared: Mapping[str, Any]) -> Space:
    """Read the table ``[search.space]``.

    Raises `UnknownNameError` for a parameter that does not exist, `ConfigError` for a range or a value that it cannot
    have or for more than `MAX_ACTIVE` active parameters.
    """
    active: list[Parameter] = []
    frozen: dict[str, Value] = {}
    for name, value in declared.items():
        if name not in PARAMETERS:
            raise UnknownNameError("search parameter", name, PARAMETERS, "(search.space)")
        if isinstance(value, (list, tuple)):
            active.append(_narrowed(PARAMETERS[name], value))
        else:
            frozen[name] = _checked(PARAMETERS[name], value)
    if len(active) > MAX_ACTIVE:
        raise ConfigError(
            f"search.space makes {len(active)} parameters active; at most {MAX_ACTIVE} are allowed. Freeze some: a "
            "single value instead of a list."
        )
    order = list(PARAMETERS)
    return Space(active=tuple(sorted(active, key=lambda p: order.index(p.name))), frozen=frozen)


def value_of(theta: Theta, name: str) -> Any:
    """The value of a parameter, or its default."""
    return theta.get(name, PARAMETERS[name].default)


def _narrowed(parameter: Parameter, values: Sequence[Any]) -> Parameter:
    """The parameter with the range or the choices of this study."""
    checked = tuple(_checked(parameter, v) for v in values)
    where = f"search.space.{parameter.name}"
    if parameter.kind == "choice":
        if not checked or len(set(checked)) != len(checked):
            raise ConfigError(f"{where} needs distinct choices, got {list(values)}")
        return replace(parameter, choices=checked)
    if len(checked) != 2 or not checked[0] < checked[1]:  # type: ignore[operator]
        raise ConfigError(f"{where} is a range [low, high], low must be below high; got {list(values)}")
    return replace(parameter, low=float(checked[0]), high=float(checked[1]))


def _checked(parameter: Parameter, value: Any) -> Value:
    where = f"search.space.{parameter.name}"
    if parameter.kind == "choice":
        if isinstance(value, bool) or value not in parameter.choices:
            raise UnknownNameError(f"value of {where}", str(value), [str(c) for c in parameter.choices])
        return cast(Value, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} should be a number, got {value!r}. {parameter.meaning}")
    if not parameter.low <= value <= parameter.high:
        raise ConfigError(
            f"{where} must lie in {parameter.low:g}..{parameter.high:g}, got {value}. {parameter.meaning}"
        )
    return float(value)
