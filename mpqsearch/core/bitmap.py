"""The bit map: which layer, or which output channel, gets how many bits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core.formats import FULL_PRECISION, WIDTHS, QuantFormat, check_width
from mpqsearch.core.layers import LayerTable
from mpqsearch.errors import ArtifactError, ConfigError, LayerMismatchError

Widths = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedLayers:
    """The layers of a map whose channels differ, in its order: what is asked of every channel is asked of all of them
    at once.

    Attributes:
        names: ``[m]`` names.
        widths: ``[c]`` widths of their channels, one layer after another.
        sizes: ``[m]`` number of channels of each.
        counts: ``[m, 17]`` number of channels of each that have each width.
    """

    names: tuple[str, ...]
    widths: Widths
    sizes: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """``[m]``: where the channels of each begin."""
        return np.cumsum(self.sizes) - self.sizes


def _one(bits: int) -> Widths:
    array = np.array(bits, dtype=np.uint8)
    array.setflags(write=False)
    return array


_ONE: Mapping[int, Widths] = {bits: _one(bits) for bits in (*WIDTHS, FULL_PRECISION)}
"""The width of a whole layer as maps hold it, made once: an outer search makes thousands of maps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitMap:
    """Widths of every weight layer of one model.

    ``weights`` maps a layer name to one width (array of shape ``()``) or to a width per output channel (shape
    ``[channels]``); 16 means full precision. ``activations`` maps a layer name to the width of its input; layers that
    are not named keep full-precision activations. Quantized activations have ``activation_steps`` scales a layer: 1
    when static, else one for each of that many timesteps. ``format`` says what a width means, ``formats`` overrides it
    for single layers.
    """

    model_digest: str
    weights: Mapping[str, Widths]
    activations: Mapping[str, int] = field(default_factory=dict)
    activation_steps: int = 1
    format: QuantFormat = field(default_factory=QuantFormat)
    formats: Mapping[str, QuantFormat] = field(default_factory=dict)
    _memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        clean: dict[str, Widths] = {}
        vectors: dict[str, Widths] = {}
        for name, widths in self.weights.items():
            small = isinstance(widths, (np.uint8, np.ndarray)) and widths.dtype == np.uint8
            if small and not widths.ndim and int(widths) in _ONE:  # most maps hold one width a layer
                clean[name] = _ONE[int(widths)]
            elif small and widths.ndim == 1 and len(widths):
                clean[name] = vectors[name] = widths
            else:
                clean[name] = _checked(name, widths)
        object.__setattr__(self, "weights", clean | _checked_together(vectors))
        if not 1 <= self.activation_steps <= 1000:
            raise ConfigError(f"bit map: activation_steps must lie in 1..1000, got {self.activation_steps}")
        for name, bits in self.activations.items():
            check_width(bits, f"bit map, activations of {name!r}")
            if name not in clean:
                raise ConfigError(f"bit map: activations name {name!r}, which has no weight width")

    def format_of(self, name: str) -> QuantFormat:
        """The quantizer settings of one layer."""
        return self.formats.get(name, self.format)

    def channel_widths(self, name: str, n_channels: int) -> Widths:
        """The widths of one layer as a vector of length ``n_channels``."""
        widths = self.weights[name]
        return widths if widths.ndim else np.full(n_channels, widths, dtype=np.uint8)

    def is_mixed(self, name: str) -> bool:
        """True when the channels of a layer have different widths."""
        return self.weights[name].ndim == 1

    @property
    def scaled_inputs(self) -> tuple[tuple[str, float], ...]:
        """Layers whose quantized inputs are smoothed, with the alpha: beside their widths, what the ranges of inputs
        depend on."""
        formats = ((n, self.format_of(n)) for n, bits in sorted(self.activations.items()) if bits != FULL_PRECISION)
        return tuple((n, f.alpha) for n, f in formats if f.smooth)

    @property
    def mixed_layers(self) -> MixedLayers:
        """The layers whose channels differ, put together once."""
        if "mixed" not in self._memo:
            vectors = {n: w for n, w in self.weights.items() if w.ndim}
            n, k = len(vectors), FULL_PRECISION + 1
            widths = np.concatenate([*vectors.values(), np.empty(0, dtype=np.uint8)])
            sizes = np.fromiter(map(len, vectors.values()), np.int64, n)
            counts = np.bincount(np.repeat(np.arange(0, n * k, k), sizes) + widths, minlength=n * k).reshape(n, k)
            for array in (widths, sizes, counts):
                array.setflags(write=False)
            self._memo["mixed"] = MixedLayers(names=tuple(vectors), widths=widths, sizes=sizes, counts=counts)
        mixed: MixedLayers = self._memo["mixed"]
        return mixed

    @property
    def granularity(self) -> str:
        """``channel`` when any layer is mixed inside, else ``layer``."""
        return "channel" if any(w.ndim for w in self.weights.values()) else "layer"

    def validate(self, table: LayerTable) -> None:
        """Raise `LayerMismatchError` unless the map covers exactly the layers of ``table``, with vectors of the right
        length."""
        if self._memo.get("fits") is table:
            return
        if self.model_digest != table.digest:
            raise LayerMismatchError(
                f"the bit map was made for the model {self.model_digest[:12]}, but this model is {table.digest[:12]}. "
                "Allocate again for this model."
            )
        table.require_same_names(set(self.weights), "the bit map")
        tied: dict[str, str] = {}
        for name, tie in table.ties.items():
            mate = tied.setdefault(tie, name)
            if mate != name and not np.array_equal(self.weights[name], self.weights[mate]):
                raise LayerMismatchError(
                    f"the bit map gives {name!r} and {mate!r} different widths, but they are tied ({tie!r})"
                )
        mixed = self.mixed_layers
        for name, size in zip(mixed.names, mixed.sizes.tolist(), strict=True):
            if size != table.channels[name]:
                raise LayerMismatchError(
                    f"the bit map has {size} widths for {name!r}, which has {table.channels[name]} output channels"
                )
        self._memo["fits"] = table

    @property
    def digest(self) -> str:
        """SHA-256 of the content, as `to_data` has it: equal maps have equal digests, wherever they came from."""
        if "digest" not in self._memo:
            self._memo["digest"] = hashlib.sha256(self._as_json().encode()).hexdigest()
        digest: str = self._memo["digest"]
        return digest

    def _as_json(self) -> str:
        """`to_data` as JSON with sorted keys and no spaces. Run lengths are spelled for all layers at once: a search
        digests every map it makes."""
        mixed = self.mixed_layers
        is_last = np.ones(len(mixed.widths), dtype=bool)  # of its run
        is_last[:-1] = mixed.widths[1:] != mixed.widths[:-1]
        stops = np.cumsum(mixed.sizes)
        is_last[stops - 1] = True
        ends = np.flatnonzero(is_last) + 1
        codes = mixed.widths[ends - 1] + (FULL_PRECISION + 1) * np.diff(ends, prepend=0)
        runs = list(map(_RUNS.__getitem__, codes.tolist()))
        cuts = [0, *(np.searchsorted(ends, stops) + 1).tolist()]
        spelled = {name: ",".join(runs[a:b]) for name, a, b in zip(mixed.names, cuts, cuts[1:], strict=False)}
        layers = []
        for name in sorted(self.weights):
            inputs = f'"activation_bits":{self.activations[name]},' if name in self.activations else ""
            own = f',"quantizer":{_compact(self.formats[name].to_data())}' if name in self.formats else ""
            runs_of = spelled.get(name)
            bits = (
                f'"bits":{self.weights[name]}'
                if runs_of is None
                else f'"channel_bits":{{"data":[{runs_of}],"encoding":"rle"}}'
            )
            layers.append(f"{_quoted(name)}:{{{inputs}{bits}{own}}}")
        steps = f'"activation_steps":{self.activation_steps},' if self.activation_steps != 1 else ""
        defaults, digest = _compact(self.format.to_data()), _quoted(self.model_digest)
        return f'{{{steps}"defaults":{defaults},"layers":{{{",".join(layers)}}},"model_digest":{digest}}}'

    def diff(self, other: BitMap) -> dict[str, tuple[str, str]]:
        """Layers whose widths differ, as ``name -> (mine, theirs)`` in short form."""
        names = [*self.weights, *(n for n in other.weights if n not in self.weights)]
        pairs = {n: (_spell(self.weights.get(n)), _spell(other.weights.get(n))) for n in names}
        same = {
            n
            for n in names
            if n in self.weights and n in other.weights and np.array_equal(self.weights[n], other.weights[n])
        }
        return {n: p for n, p in pairs.items() if n not in same}

    def summary(self) -> str:
        """The map in a few lines: neighbours with the same last name and the same widths are folded."""
        rows = [(name.rsplit(".", 1)[0], name.rsplit(".", 1)[-1], _spell(w)) for name, w in self.weights.items()]
        lines = []
        for (stem, widths), group in groupby(rows, key=lambda r: (r[0], r[2])):
            lines.append(f"{stem}.{{{','.join(r[1] for r in group)}}}: {widths}")
        return "\n".join(lines)

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data; vectors as run lengths ``[[width, count], ...]``."""
        data: dict[str, Any] = {
            "model_digest": self.model_digest,
            "defaults": self.format.to_data(),
            "layers": {},
        }
        if self.activation_steps != 1:
            data["activation_steps"] = self.activation_steps
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
    def from_data(cls, data: Mapping[str, Any], vectors: Mapping[str, Widths] | None = None) -> BitMap:
        """Back from `to_data`; ``vectors`` holds channel widths that were stored beside the JSON."""
        weights: dict[str, Widths] = {}
        for name, entry in data["layers"].items():
            if "bits" in entry:
                weights[name] = np.array(entry["bits"], dtype=np.uint8)
                continue
            coded = entry["channel_bits"]
            if coded["encoding"] == "rle":
                pairs = np.array(coded["data"], dtype=np.int64).reshape(-1, 2)
                weights[name] = np.repeat(pairs[:, 0], pairs[:, 1]).astype(np.uint8)
            elif vectors is not None and coded["tensor"] in vectors:
                weights[name] = vectors[coded["tensor"]]
            else:
                raise ArtifactError(
                    f"bit map: the channel widths of {name!r} should be in the sidecar as {coded['tensor']!r}, and "
                    "are not"
                )
        return cls(
            model_digest=data["model_digest"],
            weights=weights,
            activations={n: e["activation_bits"] for n, e in data["layers"].items() if "activation_bits" in e},
            activation_steps=data.get("activation_steps", 1),
            format=QuantFormat(**data["defaults"]),
            formats={n: QuantFormat(**e["quantizer"]) for n, e in data["layers"].items() if "quantizer" in e},
        )


def _checked(name: str, widths: Any) -> Widths:
    """The width or the widths of one layer, whatever they came as; of a vector of one width that width."""
    array = np.array(widths)
    if array.ndim > 1 or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(
            f"bit map, layer {name!r}: one integer width or a vector of them is needed, got shape {array.shape}"
        )
    found = np.unique(array)
    for bits in found.tolist():
        check_width(bits, f"bit map, layer {name!r}")
    if array.ndim == 1 and len(found) == 1:
        array = array[0]  # one spelling for one meaning, so that equal maps have equal digests
    array = np.asarray(array, dtype=np.uint8).copy()
    array.setflags(write=False)
    return array


def _checked_together(vectors: Mapping[str, Widths]) -> dict[str, Widths]:
    """`_checked` of all vectors of small integers at once, as parts of one array; none of them is empty."""
    if not vectors:
        return {}
    every = np.concatenate(list(vectors.values()))
    every.setflags(write=False)
    if set(np.flatnonzero(np.bincount(every)).tolist()) - set(_ONE):
        return {name: _checked(name, widths) for name, widths in vectors.items()}
    ends = np.cumsum([len(widths) for widths in vectors.values()])
    starts = np.concatenate([[0], ends[:-1]])
    least, most = (f.reduceat(every, starts).tolist() for f in (np.minimum, np.maximum))
    parts = zip(vectors, least, most, starts.tolist(), ends.tolist(), strict=True)
    return {name: _ONE[low] if low == high else every[start:end] for name, low, high, start, end in parts}


class _Runs(dict[int, str]):
    """Spelling of a run of channels, by 17 times their number plus their width."""

    def __missing__(self, code: int) -> str:
        count, width = divmod(code, FULL_PRECISION + 1)
        self[code] = f"[{width},{count}]"
        return self[code]


_RUNS = _Runs()

_quoted = lru_cache(maxsize=100_000)(json.dumps)
"""A name as JSON."""


def _compact(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def run_lengths(widths: Widths) -> list[list[int]]:
    """``[[width, count], ...]`` of a vector."""
    ends = [*(np.flatnonzero(widths[1:] != widths[:-1]) + 1).tolist(), len(widths)]
    starts = [0, *ends[:-1]]
    return [[width, end - start] for width, start, end in zip(widths[starts].tolist(), starts, ends, strict=True)]


def _spell(widths: Widths | None) -> str:
    if widths is None:
        return "absent"
    if widths.ndim == 0:
        return "full precision" if int(widths) == FULL_PRECISION else f"{int(widths)} bits"
    counts = Counter(widths.tolist())
    return " ".join(f"{b}b x{c}" for b, c in sorted(counts.items()))
