"""What a model is made of, as far as bits are concerned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpqsearch.errors import ConfigError, LayerMismatchError, UnknownNameError

ROLES = (
    "conv",
    "shortcut",
    "skip",
    "resample",
    "attention",
    "feed-forward",
    "norm",
    "time",
    "class",
    "linear",
    "first",
    "last",
    "unused",
)
"""What a layer does. ``norm`` is the projection of an adaptive norm; ``skip`` takes a stream joined with one that
skipped over layers, two ranges in one input; ``unused`` did not run on the examples, so nothing is known of its errors;
``conv`` and ``linear`` are what is left over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One weight layer.

    ``name`` is the module path and the only key anywhere. ``weight_shape`` is the stored shape, ``channel_axis`` the
    axis of the output channels in it. ``macs`` counts multiply-accumulates of one forward pass on one sample (0 when
    not measured). Layers with the same non-empty ``tie`` must share their widths. Those with the same non-empty
    ``fuse`` see one input and are joined into one layer by consumers that fuse projections (q, k and v of one
    attention, as in ``fuse_qkv_projections``); `Policy.tie_qkv` ties them.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    channel_axis: int = 0
    groups: int = 1
    macs: int = 0
    role: str = "linear"
    has_bias: bool = False
    tie: str = ""
    fuse: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a layer needs a name: the module path")
        if self.role not in ROLES:
            raise UnknownNameError("layer role", self.role, ROLES)
        if not self.weight_shape or min(self.weight_shape) < 1:
            raise ConfigError(f"layer {self.name!r}: weight_shape must be positive, got {self.weight_shape}")
        if not 0 <= self.channel_axis < len(self.weight_shape):
            raise ConfigError(f"layer {self.name!r}: channel_axis {self.channel_axis} is outside {self.weight_shape}")

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.weight_shape)

    @property
    def n_channels(self) -> int:
        """Number of output channels, the rows that get a scale and may get a width of their own."""
        outputs = self.weight_shape[self.channel_axis]
        return outputs * self.groups if self.kind.startswith("ConvTranspose") else outputs

    @property
    def weights_per_channel(self) -> int:
        """Weights behind one output channel (the fan-in)."""
        return self.n_weights // self.n_channels

    @property
    def n_inputs(self) -> int:
        """Number of input channels, which is how many smoothing factors the layer would carry."""
        if self.kind.startswith("ConvTranspose"):
            return self.weight_shape[0]
        return self.weight_shape[1] * self.groups


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptParameter:
    """A parameter that stays at full precision, with the reason: nothing is skipped in silence."""

    name: str
    n_values: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """All weight layers of one model in forward order, and all parameters that are not weight layers."""

    digest: str
    layers: tuple[LayerSpec, ...]
    kept: tuple[KeptParameter, ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        if len(self.by_name) != len(self.layers):
            names = [layer.name for layer in self.layers]
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ConfigError(f"layer names must be unique, found twice: {twice}")

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerSpec:
        try:
            return self.by_name[name]
        except KeyError:
            raise UnknownNameError("layer", name, self.by_name) from None

    @cached_property
    def by_name(self) -> dict[str, LayerSpec]:
        """Name to layer."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def index(self) -> dict[str, int]:
        """Name to position."""
        return {layer.name: i for i, layer in enumerate(self.layers)}

    @cached_property
    def channels(self) -> dict[str, int]:
        """Name to number of output channels."""
        return {layer.name: layer.n_channels for layer in self.layers}

    @cached_property
    def ties(self) -> dict[str, str]:
        """Name to tie, of the layers that have one."""
        return {layer.name: layer.tie for layer in self.layers if layer.tie}

    @cached_property
    def n_kept(self) -> int:
        """Values outside weight layers."""
        return sum(k.n_values for k in self.kept)

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was computed from this table before, by keys of those who computed it: an outer search asks the same of
        one table for hours."""
        return {}

    @cached_property
    def n_weights(self) -> int:
        """Weights in weight layers."""
        return sum(layer.n_weights for layer in self.layers)

    @cached_property
    def n_parameters(self) -> int:
        """All parameters of the model: the denominator of every average."""
        return self.n_weights + self.n_kept

    @property
    def n_channels(self) -> int:
        """Output channels over all layers."""
        return sum(layer.n_channels for layer in self.layers)

    def require_same_names(self, names: set[str], what: str) -> None:
        """Raise `LayerMismatchError` unless ``names`` are exactly this table's layers."""
        missing = [n for n in self.by_name if n not in names]
        unexpected = sorted(names - set(self.by_name))
        if missing or unexpected:
            raise LayerMismatchError(
                f"{what} does not fit the model {self.model or self.digest[:12]!r}: "
                f"missing {_short(missing)}, unexpected {_short(unexpected)}. Was it made for another model?"
            )

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "digest": self.digest,
            "model": self.model,
            "layers": [
                {
                    "name": la.name,
                    "kind": la.kind,
                    "weight_shape": list(la.weight_shape),
                    "channel_axis": la.channel_axis,
                    "groups": la.groups,
                    "macs": la.macs,
                    "role": la.role,
                    "has_bias": la.has_bias,
                    "tie": la.tie,
                    "fuse": la.fuse,
                }
                for la in self.layers
            ],
            "kept": [{"name": k.name, "n_values": k.n_values, "reason": k.reason} for k in self.kept],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> LayerTable:
        """Back from `to_data`."""
        return cls(
            digest=data["digest"],
            model=data["model"],
            layers=tuple(LayerSpec(**{**la, "weight_shape": tuple(la["weight_shape"])}) for la in data["layers"]),
            kept=tuple(KeptParameter(**k) for k in data["kept"]),
        )


def _short(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
