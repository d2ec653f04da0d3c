"""What a model is made of, as far as bits are concerned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpqsearch.core.formats import FULL_PRECISION
from mpqsearch.core.shown import Shown, short_list
from mpqsearch.errors import ConfigError, LayerMismatchError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

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
    "text",
    "autoencoder",
    "unused",
)
"""What a layer does. ``norm`` is the projection of an adaptive norm; ``skip`` takes a stream joined with one that
skipped over layers, two ranges in one input; ``text`` is any layer of a text encoder, ``autoencoder`` of an
autoencoder; ``unused`` did not run on the examples, so nothing is known of its errors; ``conv`` and ``linear`` are what
is left over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One weight layer.

    ``name`` is the module path and the only key anywhere. ``weight_shape`` is the stored shape, ``channel_axis`` the
    axis of the output channels in it. ``macs`` counts multiply-accumulates of one forward pass on one sample (0 when
    not measured). Layers with the same non-empty ``fuse`` see one input and are joined into one layer by consumers that
    fuse projections (q, k and v of one attention, as in ``fuse_qkv_projections``); the word ``qkv`` in `Policy.groups`
    gives them equal widths.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    channel_axis: int = 0
    groups: int = 1
    macs: int = 0
    role: str = "linear"
    has_bias: bool = False
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
        """Number of output channels, each of which gets a scale and may get a width of its own."""
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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LayerTable(Shown):
    """All weight layers of one model in forward order, and everything stored that is not a weight layer."""

    digest: str
    layers: tuple[LayerSpec, ...]
    kept: tuple[KeptParameter, ...] = ()
    model: str = ""
    by_name: Mapping[str, LayerSpec] = field(init=False, compare=False)
    """Name to layer."""
    index: Mapping[str, int] = field(init=False, compare=False)
    """Name to position."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {layer.name: layer for layer in self.layers})
        object.__setattr__(self, "index", {layer.name: i for i, layer in enumerate(self.layers)})
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

    @property
    def n_kept(self) -> int:
        """Values outside weight layers."""
        return sum(k.n_values for k in self.kept)

    @property
    def n_weights(self) -> int:
        """Weights in weight layers."""
        return sum(layer.n_weights for layer in self.layers)

    @property
    def n_parameters(self) -> int:
        """All stored values of the model: the denominator of every average."""
        return self.n_weights + self.n_kept

    @property
    def size_bytes(self) -> int:
        """Stored bytes of the model at full precision (16-bit floats)."""
        return self.n_parameters * FULL_PRECISION // 8

    @property
    def n_channels(self) -> int:
        """Output channels over all layers."""
        return sum(layer.n_channels for layer in self.layers)

    def part(self, name: str) -> LayerTable:
        """The layers and parameters of one part of a model of several."""
        layers = tuple(la for la in self.layers if la.name.startswith(f"{name}."))
        return replace(self, layers=layers, kept=tuple(k for k in self.kept if k.name.startswith(f"{name}.")))

    def require_same_names(self, names: set[str], what: str) -> None:
        """Raise `LayerMismatchError` unless ``names`` are exactly this table's layers."""
        missing = [n for n in self.by_name if n not in names]
        unexpected = sorted(names - set(self.by_name))
        if missing or unexpected:
            raise LayerMismatchError(
                f"{what} does not fit the model {self.model or self.digest[:12]!r}: "
                f"missing {short_list(missing, 5) or 'none'}, unexpected {short_list(unexpected, 5) or 'none'}. Was "
                "it made for another model?"
            )

    def facts(self) -> dict[str, Any]:
        """Sizes, roles and what is kept at full precision."""
        roles = Counter(la.role for la in self.layers)
        return {
            "model": f"{self.model or 'unnamed'} ({self.digest[:12]})",
            "layers": f"{len(self.layers)} with {self.n_channels:,} output channels: "
            + ", ".join(f"{n} {role}" for role, n in roles.most_common()),
            "parameters": f"{self.n_weights:,} in weight layers, {self.n_kept:,} kept at full precision",
        }

    def to_frame(self) -> pd.DataFrame:
        """One row a layer, with the columns of `LayerSpec`, ``n_weights`` and ``n_channels``."""
        import pandas as pd

        rows = [asdict(la) | {"n_weights": la.n_weights, "n_channels": la.n_channels} for la in self.layers]
        return pd.DataFrame(rows)

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data, from which `mpqsearch.untrusted.build` makes it again."""
        return {
            "digest": self.digest,
            "model": self.model,
            "layers": [{**asdict(la), "weight_shape": list(la.weight_shape)} for la in self.layers],
            "kept": [{"name": k.name, "n_values": k.n_values, "reason": k.reason} for k in self.kept],
        }
