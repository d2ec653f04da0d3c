"""What the outer search may change: parameters with a meaning, a default and a range, declared in TOML.

In the table ``[search.space]`` a list makes a parameter active and a single value freezes it::

    [search.space]
    mix_final = [0.0, 1.0]              # a range: low and high
    role_attention = [0.25, 4.0]
    granularity = ["layer", "channel"]  # choices
    scheme = "auto"                   # frozen

Whatever is not named stays at its default. With every parameter at its default the search solves the plain integer
program, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from mpqsearch.core import ROLES, SCHEMES
from mpqsearch.core.formats import CRITERIA, ROUNDINGS
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.methods import LOSSES

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = float | int | str
Theta = Mapping[str, Value]
"""Values of parameters by name; what is missing has its default."""

MAX_ACTIVE = 16
"""More active parameters than this are refused: a study of a few hundred trials cannot tell what so many do (a dozen is
plenty)."""

BASE = "base"
"""The value that stands for "as in the method that is searched around"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One thing that may be searched.

    ``kind``: ``float``, ``log`` (a positive number, sampled by its logarithm), ``int`` or ``choice``. ``low`` and
    ``high`` are the widest range that makes sense, ``choices`` the allowed values (empty: checked where it is used).
    ``default`` reproduces the plain integer program.
    """

    name: str
    kind: Literal["float", "log", "int", "choice"]
    default: Value
    meaning: str
    low: float = 0.0
    high: float = 1.0
    choices: tuple[Value, ...] = ()


def _catalogue() -> dict[str, Parameter]:
    made = [
        *(
            Parameter(
                name=f"mix_{loss}",
                kind="float",
                default=0.0,
                low=-1.0,
                high=2.0,
                meaning=f"Weight of the layer totals of the loss '{loss}' in a geometric mean with those of the method's own loss: "
                "totals become T**(1 - w) * T_k**w, summed over all mixed losses. 1 takes that loss alone between "
                "layers.",
            )
            for loss in LOSSES
        ),
        Parameter(
            name="exponent",
            kind="float",
            default=1.0,
            low=0.25,
            high=3.0,
            meaning="Exponent of the layer totals: above 1 the large losses count more (errors that interact), below 1 less.",
        ),
        Parameter(
            name="row_exponent",
            kind="float",
            default=1.0,
            low=0.0,
            high=3.0,
            meaning="Exponent of a channel's share in its layer at each width: 0 spreads a layer's loss evenly over its channels.",
        ),
        Parameter(
            name="low_bits",
            kind="float",
            default=0.0,
            low=-3.0,
            high=3.0,
            meaning="Losses at width b are multiplied by 2**(low_bits * (4 - b)): above 0 few bits cost more than the first-order "
            "prediction says.",
        ),
        Parameter(
            name="kurtosis",
            kind="float",
            default=0.0,
            low=-2.0,
            high=2.0,
            meaning="Losses of a channel are multiplied by (its kurtosis / 3)**kurtosis: above 0 heavy-tailed rows get more bits, as in MPQ-DM.",
        ),
        Parameter(
            name="depth",
            kind="float",
            default=0.0,
            low=-3.0,
            high=3.0,
            meaning="Losses are multiplied by 2**(depth * (position - 1/2)), position 0..1 in forward order.",
        ),
        *(
            Parameter(
                name=f"role_{role}",
                kind="log",
                default=1.0,
                low=0.01,
                high=100.0,
                meaning=f"Multiplier of the losses of all layers with the role '{role}'.",
            )
            for role in ROLES
        ),
        Parameter(
            name="timestep",
            kind="float",
            default=0.0,
            low=-4.0,
            high=4.0,
            meaning="Gains of the timestep buckets are weighted by exp(timestep * (bucket - 1/2)), bucket 0 clean samples, 1 noise. Needs a "
            "profile with gains by timestep.",
        ),
        Parameter(
            name="pairwise",
            kind="float",
            default=0.0,
            low=0.0,
            high=2.0,
            meaning="Strength of the pairwise terms between layers (granularity 'layer' only). Needs measured interactions.",
        ),
        Parameter(
            name="rounds",
            kind="int",
            default=0,
            low=0,
            high=3,
            meaning="Times that gains are measured again at the present solution and the program solved again (iterated linearization).",
        ),
        Parameter(
            name="granularity",
            kind="choice",
            default=BASE,
            choices=(BASE, "layer", "channel"),
            meaning="Widths by layer or by output channel.",
        ),
        Parameter(
            name="scheme",
            kind="choice",
            default=BASE,
            choices=(BASE, *SCHEMES),
            meaning="What a width means; the profile must have priced it.",
        ),
        Parameter(
            name="smooth",
            kind="choice",
            default=BASE,
            choices=(BASE, 0.0, 0.5, "layers"),
            meaning="Strength of smoothing: 0 none, 0.5 as in MPQ-DM and SmoothQuant (factors are stored and counted); 'layers': the "
            "one that suits each layer whose input is quantized (mpqsearch.profile.choose_alphas), 0.5 in the others.",
        ),
        Parameter(
            name="act_timesteps",
            kind="choice",
            default=BASE,
            choices=(BASE, "on", "off"),
            meaning="Whether quantized inputs have a scale for each timestep; the budget pays for them.",
        ),
        Parameter(
            name="bias_correction",
            kind="choice",
            default=BASE,
            choices=(BASE, "on", "off"),
            meaning="Whether the mean shift of a layer's output is taken off its bias.",
        ),
        Parameter(
            name="rounding",
            kind="choice",
            default=BASE,
            choices=(BASE, *ROUNDINGS),
            meaning="Codes nearest to the weights, or chosen for the output of the layer (compensated) and priced with the errors that this leaves.",
        ),
        Parameter(
            name="criterion",
            kind="choice",
            default=BASE,
            choices=(BASE, *CRITERIA),
            meaning="Range search of the quantizer in the measured maps; the loss tables stay those of the profile's own criterion.",
        ),
        Parameter(
            name="range_p",
            kind="float",
            default=0.0,
            low=0.0,
            high=8.0,
            meaning="Exponent p of the range search 'lp' in the measured maps; 0 keeps the configured one.",
        ),
        Parameter(
            name="widths",
            kind="choice",
            default=BASE,
            meaning="Allowed widths as text, such as '2,3,4,6,8'; 'base' keeps the policy's.",
        ),
        Parameter(
            name="min_bits",
            kind="int",
            default=1,
            low=1,
            high=8,
            meaning="Widths below this are not allowed.",
        ),
        *(
            Parameter(
                name=f"act_{role}",
                kind="choice",
                default=BASE,
                choices=(BASE, 4, 6, 8, 16),
                meaning=f"Activation width of all searched layers with the role '{role}'; 'base' keeps the method's.",
            )
            for role in ROLES
        ),
    ]
    return {p.name: p for p in made}


CATALOGUE: Mapping[str, Parameter] = _catalogue()
"""Every parameter by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """An active parameter with the range or the choices of this study."""

    parameter: Parameter
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.parameter.name

    def suggest(self, trial: Trial) -> Value:
        """Ask an Optuna trial."""
        if self.choices:
            return cast(Value, trial.suggest_categorical(self.name, self.choices))
        if self.parameter.kind == "int":
            return trial.suggest_int(self.name, int(self.low), int(self.high))
        return trial.suggest_float(self.name, self.low, self.high, log=self.parameter.kind == "log")

    def holds(self, value: Value) -> bool:
        """Whether a value lies in this dimension."""
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Space:
    """Active dimensions in the order of the catalogue, and frozen values that differ from the defaults."""

    active: tuple[Dimension, ...]
    frozen: Mapping[str, Value]

    def theta(self, active: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Values of all parameters that are active or frozen; active ones that are not given have their defaults."""
        values = {d.name: d.parameter.default for d in self.active}
        return {**values, **self.frozen, **dict(active or {})}

    def suggest(self, trial: Trial) -> dict[str, Value]:
        """A point of the space, asked from an Optuna trial."""
        return self.theta({d.name: d.suggest(trial) for d in self.active})

    def default_point(self) -> dict[str, Value]:
        """The active parameters at their defaults, for a warm start; those whose range leaves the default out take the
        nearest end."""
        return {d.name: _nearest_in(d, d.parameter.default) for d in self.active}

    def starts(self) -> list[dict[str, Value]]:
        """Points to try first: the plain program, then each with one of the choices or mixed losses taken alone."""
        base = self.default_point()
        points = [base]
        for d in self.active:
            if d.name.startswith("mix_") and d.holds(1.0):
                points.append({**base, d.name: 1.0})
            elif d.choices:
                points += [{**base, d.name: c} for c in d.choices if c != base[d.name]]
        return points

    def to_data(self) -> dict[str, Any]:
        """As plain data: what `parse_space` reads."""
        active: dict[str, Any] = {d.name: list(d.choices) or [d.low, d.high] for d in self.active}
        return {**active, **self.frozen}


def parse_space(declared: Mapping[str, Any]) -> Space:
    """Read the table ``[search.space]``.

    Raises `UnknownNameError` for a parameter that does not exist, `ConfigError` for a range or a value that it cannot
    have or for more than `MAX_ACTIVE` active parameters.
    """
    active: dict[str, Dimension] = {}
    frozen: dict[str, Value] = {}
    for name, value in declared.items():
        if name not in CATALOGUE:
            raise UnknownNameError("search parameter", name, CATALOGUE, "(search.space)")
        parameter = CATALOGUE[name]
        if isinstance(value, (list, tuple)):
            dimension = _dimension(parameter, value)
            if dimension.choices and len(dimension.choices) == 1:
                frozen[name] = dimension.choices[0]
            else:
                active[name] = dimension
        else:
            frozen[name] = _checked(parameter, value)
    if len(active) > MAX_ACTIVE:
        raise ConfigError(
            f"search.space makes {len(active)} parameters active; at most {MAX_ACTIVE} are allowed. Freeze some: a "
            "single value "
            "instead of a list."
        )
    return Space(
        active=tuple(active[n] for n in CATALOGUE if n in active),
        frozen={n: frozen[n] for n in CATALOGUE if n in frozen},
    )


def value_of(theta: Theta, name: str) -> Any:
    """The value of a parameter, or its default."""
    return theta.get(name, CATALOGUE[name].default)


def is_default(theta: Theta, names: Callable[[str], bool] | None = None) -> bool:
    """True when every parameter (that ``names`` accepts) has its default."""
    return all(v == CATALOGUE[n].default for n, v in theta.items() if names is None or names(n))


def _dimension(parameter: Parameter, value: list[Any] | tuple[Any, ...]) -> Dimension:
    if parameter.kind == "choice":
        if not value or len(set(value)) != len(value):
            raise ConfigError(f"search.space.{parameter.name} needs distinct choices, got {list(value)}")
        return Dimension(parameter=parameter, choices=tuple(_checked(parameter, v) for v in value))
    if len(value) != 2:
        raise ConfigError(f"search.space.{parameter.name} is a range [low, high], got {list(value)}")
    low, high = (_checked(parameter, v) for v in value)
    assert not isinstance(low, str)
    assert not isinstance(high, str)
    if not low < high:
        raise ConfigError(f"search.space.{parameter.name}: low must be below high, got [{low}, {high}]")
    return Dimension(parameter=parameter, low=low, high=high)


def _checked(parameter: Parameter, value: Any) -> Value:
    where = f"search.space.{parameter.name}"
    if parameter.kind == "choice":
        if parameter.choices and value not in parameter.choices:
            raise UnknownNameError(f"value of {where}", str(value), [str(c) for c in parameter.choices])
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ConfigError(f"{where} should be text or a number, got {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} should be a number, got {value!r}. {parameter.meaning}")
    if parameter.kind == "int" and value != int(value):
        raise ConfigError(f"{where} should be a whole number, got {value!r}")
    if not parameter.low <= value <= parameter.high:
        raise ConfigError(
            f"{where} must lie in {parameter.low:g}..{parameter.high:g}, got {value}. {parameter.meaning}"
        )
    return int(value) if parameter.kind == "int" else float(value)


def _nearest_in(dimension: Dimension, value: Value) -> Value:
    if dimension.choices:
        return value if value in dimension.choices else dimension.choices[0]
    assert not isinstance(value, str)
    clipped = min(max(value, dimension.low), dimension.high)
    return int(clipped) if dimension.parameter.kind == "int" else clipped
