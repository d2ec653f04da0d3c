"""The bit map: which layer, or which output channel, gets how many bits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core.formats import FULL_PRECISION, TERNARY_WIDTH, TRITS, QuantFormat, check_width
from mpqsearch.core.layers import LayerTable
from mpqsearch.core.shown import Shown
from mpqsearch.errors import ArtifactError, ConfigError, LayerMismatchError
from mpqsearch.untrusted import build

if TYPE_CHECKING:
    import pandas as pd

Widths = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BitMap(Shown):
    """Widths of every weight layer of one model.

    ``weights`` maps a layer name to one width (array of shape ``()``) or to a width per output channel (shape
    ``[channels]``); 16 means full precision. ``activations`` maps a layer name to the width of its input; layers that
    are not named keep full-precision activations. Quantized activations have ``activation_steps`` scales a layer: 1
    when static, else one for each of that many timesteps. With ``token_scales`` linear layers store none: each token's
    is found as it comes. ``format`` says what a width means, ``formats`` overrides it for single layers.
    Raises `ConfigError` for anything that is no whole supported width.
    """

    model_digest: str
    weights: Mapping[str, Widths]
    activations: Mapping[str, int] = field(default_factory=dict)
    activation_steps: int = 1
    token_scales: bool = False
    format: QuantFormat = field(default_factory=QuantFormat)
    formats: Mapping[str, QuantFormat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", {name: _checked(name, widths) for name, widths in self.weights.items()})
        steps = self.activation_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= 1000:
            raise ConfigError(f"bit map: activation_steps must be a whole number in 1..1000, got {steps!r}")
        for name, bits in self.activations.items():
            check_width(bits, f"bit map, activations of {name!r}")
        for what, names in (("activations", self.activations), ("formats", self.formats)):
            stray = next((name for name in names if name not in self.weights), None)
            if stray is not None:
                raise ConfigError(f"bit map: {what} name {stray!r}, which has no weight width")

    def format_of(self, name: str) -> QuantFormat:
        """The quantizer settings of one layer."""
        return self.formats.get(name, self.format)

    def channel_widths(self, name: str, n_channels: int) -> Widths:
        """The widths of one layer as a vector of length ``n_channels``."""
        widths = self.weights[name]
        return widths if widths.ndim else np.full(n_channels, widths, dtype=np.uint8)

    def code_widths(self, name: str) -> NDArray[np.float64]:
        """The widths of one layer as codes are stored, of the same shape: 1.6 where 2 bits stand for three levels."""
        widths, fmt = self.weights[name].astype(np.float64), self.format_of(name)
        return np.where(widths == TERNARY_WIDTH, 8 / TRITS, widths) if fmt.ternary else widths

    def only(self, names: Collection[str]) -> BitMap:
        """The widths of some layers."""
        return replace(
            self,
            weights={n: w for n, w in self.weights.items() if n in names},
            activations={n: bits for n, bits in self.activations.items() if n in names},
            formats={n: fmt for n, fmt in self.formats.items() if n in names},
        )

    def static_inputs(self, table: LayerTable) -> dict[str, int]:
        """Widths of the quantized inputs whose scales are stored."""
        dynamic = {la.name for la in table if self.token_scales and la.kind == "Linear"}
        return {n: b for n, b in self.activations.items() if b != FULL_PRECISION and n not in dynamic}

    @property
    def scaled_inputs(self) -> tuple[tuple[str, float], ...]:
        """Layers whose quantized inputs are smoothed, with the alpha: beside their widths, what the ranges of inputs
        depend on."""
        formats = ((n, self.format_of(n)) for n, bits in sorted(self.activations.items()) if bits != FULL_PRECISION)
        return tuple((n, f.alpha) for n, f in formats if f.smooth)

    @property
    def rounds_to_nearest(self) -> bool:
        """False when some layer is rounded otherwise."""
        return not self.rounds_by("gptq", "kfac")

    def rounds_by(self, *roundings: str) -> bool:
        """Whether some layer has one of these roundings."""
        return any(f.rounding in roundings for f in (self.format, *self.formats.values()))

    @property
    def granularity(self) -> str:
        """``channel`` when any layer is mixed inside, else ``layer``."""
        return "channel" if any(w.ndim for w in self.weights.values()) else "layer"

    def validate(self, table: LayerTable) -> None:
        """Raise `LayerMismatchError` unless the map covers exactly the layers of ``table``, with vectors of the right
        length."""
        if self.model_digest != table.digest:
            raise LayerMismatchError(
                f"the bit map was made for the model {self.model_digest[:12]}, but this model is {table.digest[:12]}. "
                "Allocate again for this model."
            )
        table.require_same_names(set(self.weights), "the bit map")
        for layer in table:
            widths = self.weights[layer.name]
            if widths.ndim and len(widths) != layer.n_channels:
                raise LayerMismatchError(
                    f"the bit map has {len(widths)} widths for {layer.name!r}, which has {layer.n_channels} output "
                    "channels"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of `to_data` as JSON: equal maps have equal digests, wherever they came from."""
        text = json.dumps(self.to_data(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def summary(self) -> str:
        """The map in a few lines: neighbours with the same last name and the same widths are folded."""
        rows = [
            (*name.rpartition(".")[::2], _spell(self.code_widths(name)) + self._format_text(name))
            for name in self.weights
        ]
        lines = []
        for (stem, widths), group in groupby(rows, key=lambda r: (r[0], r[2])):
            last = [r[1] for r in group]
            names = last[0] if len(last) == 1 else f"{{{','.join(last)}}}"
            lines.append(f"{stem}.{names}: {widths}" if stem else f"{names}: {widths}")
        return "\n".join(lines)

    def _format_text(self, name: str) -> str:
        """The format of one layer, where layers differ in theirs."""
        return f", {self.format_of(name).name}" if self.formats else ""

    def facts(self) -> dict[str, Any]:
        """Number of layers, granularity, how often each width occurs, the format."""
        entries = Counter(bits for name in self.weights for bits in self.code_widths(name).reshape(-1).tolist())
        counted = ", ".join(f"{n} x {_bits(bits)}" for bits, n in sorted(entries.items()))
        unit = "channels or whole layers" if self.granularity == "channel" else "layers"
        rest = f", inputs of {len(self.activations)} layers quantized" if self.activations else ""
        used = Counter(self.format_of(name).name for name in self.weights)
        formats = ", ".join(f"{name} x {n}" if self.formats else name for name, n in used.most_common())
        return {
            "layers": f"{len(self.weights)}, widths by {self.granularity}",
            unit: counted,
            "format": f"{formats}, {self.format.rounding} rounding{rest}",
            "digest": f"{self.digest[:12]} for the model {self.model_digest[:12]}",
        }

    def to_frame(self) -> pd.DataFrame:
        """One row a layer: ``layer``, ``mean_bits`` (of stored codes), ``min_bits``, ``max_bits`` (widths), ``mixed``,
        ``activation_bits`` (None: full precision), ``format`` (its name)."""
        import pandas as pd

        rows = [
            {
                "layer": name,
                "mean_bits": float(self.code_widths(name).mean()),
                "min_bits": int(widths.min()),
                "max_bits": int(widths.max()),
                "mixed": bool(widths.ndim),
                "activation_bits": self.activations.get(name),
                "format": self.format_of(name).name,
            }
            for name, widths in self.weights.items()
        ]
        return pd.DataFrame(rows)

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data; vectors as run lengths ``[[width, count], ...]``."""
        data: dict[str, Any] = {
            "model_digest": self.model_digest,
            "defaults": self.format.to_data(),
            "layers": {},
        }
        if self.activation_steps != 1:
            data["activation_steps"] = self.activation_steps
        if self.token_scales:
            data["token_scales"] = True
        for name, widths in self.weights.items():
            entry: dict[str, Any] = {}
            if widths.ndim:
                entry["channel_bits"] = {"encoding": "rle", "data": run_lengths(widths)}
            else:
                entry["bits"] = int(widths)
            if name in self.activations:
                entry["activation_bits"] = self.activations[name]
            if name in self.formats:
                entry["quantizer"] = self.formats[name].to_data()
            data["layers"][name] = entry
        return data

    @classmethod
    def from_data(cls, data: Any, vectors: Mapping[str, NDArray[Any]] | None = None) -> BitMap:
        """Back from `to_data`; ``vectors`` holds channel widths that were stored beside the JSON. Keys that it does not
        know may say more.

        Raises `ConfigError` for what is no supported width.
        """
        stored = build(_StoredMap, data, "bit map", ConfigError)
        layers = stored["layers"]
        runs: Iterator[Any] = (e["channel_bits"].get("data", ()) for e in layers.values() if "channel_bits" in e)
        if sum(max(count, 0) for data in runs for _, count in data) > MAX_CHANNELS:
            raise ConfigError(f"bit map: its run lengths are of more than {MAX_CHANNELS} channels")
        return cls(
            model_digest=stored["model_digest"],
            weights={name: _decoded(name, entry, vectors or {}) for name, entry in layers.items()},
            activations={n: e["activation_bits"] for n, e in layers.items() if "activation_bits" in e},
            activation_steps=stored.get("activation_steps", 1),
            token_scales=stored.get("token_scales", False),
            format=QuantFormat.from_data(stored["defaults"]),
            formats={n: QuantFormat.from_data(e["quantizer"]) for n, e in layers.items() if "quantizer" in e},
        )


class _Coded(TypedDict):
    """Widths of the channels of one layer: run lengths in ``data``, or the name of a ``tensor`` beside the JSON."""

    encoding: Literal["rle", "safetensors"]
    data: NotRequired[tuple[tuple[int, int], ...]]
    tensor: NotRequired[str]


class _StoredLayer(TypedDict, total=False):
    """One layer of `BitMap.to_data`: ``bits``, or ``channel_bits``."""

    bits: int
    channel_bits: _Coded
    activation_bits: int
    quantizer: Mapping[str, Any]


class _StoredMap(TypedDict):
    model_digest: str
    defaults: Mapping[str, Any]
    layers: Mapping[str, _StoredLayer]
    activation_steps: NotRequired[int]
    token_scales: NotRequired[bool]


def _decoded(name: str, entry: _StoredLayer, vectors: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The width or widths of one entry, as they are written: what is no whole width is refused, never rounded."""
    if "bits" in entry:
        return np.array(entry["bits"])
    coded = entry.get("channel_bits", _Coded(encoding="rle"))
    if coded["encoding"] == "safetensors":
        if coded.get("tensor") not in vectors:
            raise ArtifactError(
                f"bit map: the channel widths of {name!r} should be in the sidecar as {coded.get('tensor')!r}, and are "
                "not"
            )
        return vectors[coded["tensor"]]
    pairs = np.array(coded.get("data", ()), dtype=np.int64).reshape(-1, 2)
    widths, counts = pairs.T
    if not len(pairs) or counts.min() < 1:
        raise ConfigError(f"bit map, layer {name!r}: runs of at least 1 channel are needed")
    for bits in np.unique(widths).tolist():
        check_width(bits, f"bit map, layer {name!r}")
    return np.repeat(widths.astype(np.uint8), counts)


MAX_CHANNELS = 2**24
"""Channels that the run lengths of a file may have in all; more is a damaged file, and would take all memory."""


def _checked(name: str, widths: Any) -> Widths:
    """The width or the widths of one layer, checked before they are cast; of a vector of one width that width."""
    array = np.asarray(widths)
    truths = isinstance(widths, (list, tuple)) and any(isinstance(bits, bool) for bits in widths)
    if array.ndim > 1 or not array.size or not np.issubdtype(array.dtype, np.integer) or truths:
        raise ConfigError(
            f"bit map, layer {name!r}: one integer width or a vector of them is needed, got {array.dtype} of shape "
            f"{array.shape}"
        )
    counted = array.dtype == np.uint8  # in a sixth of the time
    found = np.flatnonzero(np.bincount(array.reshape(-1))) if counted else np.unique(array)
    for bits in found.tolist():
        check_width(bits, f"bit map, layer {name!r}")
    if len(found) == 1:
        array = found[0]  # one spelling for one meaning, so that equal maps have equal digests
    array = np.array(array, dtype=np.uint8)
    array.setflags(write=False)
    return array


def run_lengths(widths: Widths) -> list[list[int]]:
    """``[[width, count], ...]`` of a vector."""
    ends = [*(np.flatnonzero(widths[1:] != widths[:-1]) + 1).tolist(), len(widths)]
    starts = [0, *ends[:-1]]
    return [[width, end - start] for width, start, end in zip(widths[starts].tolist(), starts, ends, strict=True)]


def _bits(bits: float) -> str:
    return "full precision" if bits == FULL_PRECISION else f"{bits:g} bit{'s' * (bits > 1)}"


def _spell(widths: NDArray[np.float64]) -> str:
    if widths.ndim == 0:
        return _bits(float(widths))
    counts = Counter(widths.tolist())
    return " ".join(f"{b:g}b x{c}" for b, c in sorted(counts.items()))
