"""The single place where bits are counted: weights, scales, zero points, channel tags, 8-bit and full-precision
leftovers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core.bitmap import BitMap
from mpqsearch.core.formats import FULL_PRECISION, WIDTHS, QuantFormat
from mpqsearch.core.layers import LayerSpec, LayerTable
from mpqsearch.core.policy import Policy
from mpqsearch.errors import ConfigError

QUANTITIES = ("average_bits", "bytes", "bops", "uniform_bits")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageModel:
    """Bits that are stored beside the codes.

    ``tag_bits`` a channel say the width of each channel, in layers whose channels differ (widths 1..8 take 3 bits).
    ``layer_bits`` a quantized layer hold the shared exponent of its scales, and as many those of its activations, whose
    scales take ``activation_scale_bits`` each beside a zero point. Parameters outside weight layers (norms, biases,
    embeddings) and unquantized layers take ``full_precision_bits`` a value.
    """

    tag_bits: int = 3
    layer_bits: int = 8
    full_precision_bits: int = FULL_PRECISION
    activation_scale_bits: int = 16

    def activation_bits(self, bits: int, steps: int) -> int:
        """Stored bits of the scales and zero points of one layer's input at width ``bits``, with ``steps`` of each."""
        return 0 if bits == FULL_PRECISION else steps * (self.activation_scale_bits + bits) + self.layer_bits

    def channel_bits(self, layer: LayerSpec, bits: int, fmt: QuantFormat, *, mixed: bool) -> int:
        """Stored bits of one output channel of ``layer`` at width ``bits``; ``mixed`` when the layer carries channel
        tags."""
        tag = self.tag_bits if mixed else 0
        if bits == FULL_PRECISION:
            return layer.weights_per_channel * self.full_precision_bits + tag
        return layer.weights_per_channel * bits + fmt.scale_bits + fmt.zero_point_bits(bits) + tag

    def fixed_bits(self, layer: LayerSpec, fmt: QuantFormat) -> int:
        """Stored bits of a quantized layer that no width changes: the shared exponent and smoothing factors."""
        return self.layer_bits + (fmt.scale_bits * layer.n_inputs if fmt.smooth else 0)

    def layer_total(self, layer: LayerSpec, widths: NDArray[np.uint8], fmt: QuantFormat) -> int:
        """Stored bits of a whole layer. ``widths`` is one width (shape ``()``) or one a channel."""
        if widths.ndim == 0:
            bits = int(widths)
            fixed = 0 if bits == FULL_PRECISION else self.fixed_bits(layer, fmt)
            return layer.n_channels * self.channel_bits(layer, bits, fmt, mixed=False) + fixed
        counts: list[int] = np.bincount(widths).tolist()
        channels = sum(n * self.channel_bits(layer, bits, fmt, mixed=True) for bits, n in enumerate(counts) if n)
        return channels + self.fixed_bits(layer, fmt)

    def kept_bits(self, table: LayerTable) -> int:
        """Stored bits of everything that is not a weight layer."""
        return self.full_precision_bits * table.n_kept


DEFAULT_STORAGE = StorageModel()


def size_bits(table: LayerTable, bit_map: BitMap, storage: StorageModel = DEFAULT_STORAGE) -> int:
    """Stored bits of the whole model under ``bit_map``: everything counted."""
    bit_map.validate(table)
    whole, channel, fixed = _prices(table, bit_map.format, storage)
    mixed = bit_map.mixed_layers
    rows = [table.index[name] for name in mixed.names]
    paid: list[int] = ((mixed.counts * channel[rows]).sum(axis=1) + fixed[rows]).tolist()
    layers = sum(paid)
    for layer, prices in zip(table, whole, strict=True):
        widths = bit_map.weights[layer.name]
        if not widths.ndim:
            layers += prices[int(widths)]
    for name, fmt in bit_map.formats.items():
        layer, widths = table[name], bit_map.weights[name]
        known = whole[table.index[name]][int(widths)] if not widths.ndim else paid[mixed.names.index(name)]
        layers += storage.layer_total(layer, widths, fmt) - known
    inputs = sum(storage.activation_bits(bits, bit_map.activation_steps) for bits in bit_map.activations.values())
    return layers + inputs + storage.kept_bits(table)


def _prices(
    table: LayerTable, fmt: QuantFormat, storage: StorageModel
) -> tuple[list[list[int]], NDArray[np.int64], NDArray[np.int64]]:
    """Of each layer, by width: stored bits with one width, those of a channel of a mixed layer, and what a mixed one
    has beside its channels.

    Made once for what of a format is stored: a search over its ranges has another one each trial.
    """
    key = ("stored bits", fmt.scheme, fmt.smooth, fmt.scale_bits, storage)
    if key not in table.memo:
        every = range(FULL_PRECISION + 1)
        table.memo[key] = (
            [[storage.layer_total(layer, np.array(bits, dtype=np.uint8), fmt) for bits in every] for layer in table],
            np.array([[storage.channel_bits(layer, bits, fmt, mixed=True) for bits in every] for layer in table]),
            np.array([storage.fixed_bits(layer, fmt) for layer in table]),
        )
    prices: tuple[list[list[int]], NDArray[np.int64], NDArray[np.int64]] = table.memo[key]
    return prices


def size_bytes(table: LayerTable, bit_map: BitMap, storage: StorageModel = DEFAULT_STORAGE) -> int:
    """Stored bytes of the whole model, rounded up."""
    return -(-size_bits(table, bit_map, storage) // 8)


def average_bits(table: LayerTable, bit_map: BitMap, storage: StorageModel = DEFAULT_STORAGE) -> float:
    """Stored bits of the whole model over *all* its parameters."""
    return size_bits(table, bit_map, storage) / table.n_parameters


def bops(table: LayerTable, bit_map: BitMap) -> int:
    """Bit operations of one forward pass on one sample: MACs x weight width x activation width, channel by channel."""
    total = 0
    mixed = bit_map.mixed_layers
    sums = dict(zip(mixed.names, (mixed.counts @ np.arange(FULL_PRECISION + 1)).tolist(), strict=True))
    for layer in table:
        name, n = layer.name, table.channels[layer.name]
        bits = sums[name] if name in sums else int(bit_map.weights[name]) * n
        # MACs spread evenly over output channels, so the sum over channels is the mean width times the layer's MACs.
        total += layer.macs * bits * bit_map.activations.get(name, FULL_PRECISION) // n
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit on the *whole* model.

    ``average_bits``: stored bits over all parameters. ``bytes``: stored size. ``bops``: bit operations of a forward
    pass. ``uniform_bits``: the stored size that the uniform map of that width has under the same policy, in the
    asymmetric format; the fair budget for comparing methods, since the uniform map then meets it exactly.
    """

    quantity: str
    limit: float

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise ConfigError(f"unknown budget quantity {self.quantity!r}. Allowed: {', '.join(QUANTITIES)}.")
        if not self.limit > 0 or not np.isfinite(self.limit):
            raise ConfigError(f"a budget must be positive and finite, got {self.limit}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"3bit"`` (average of the whole model), ``"uniform:3"``, ``"450kB"``, ``"1.5MiB"`` or ``"2e9bops"``."""
        match = re.fullmatch(r"\s*(uniform:)?\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text.lower())
        if match:
            prefix, number, unit = match.groups()
            try:
                value = float(number)
            except ValueError:
                value = float("nan")
            if prefix and unit in ("", "bit", "bits"):
                return cls(quantity="uniform_bits", limit=value)
            if not prefix and unit in ("bit", "bits"):
                return cls(quantity="average_bits", limit=value)
            if not prefix and unit == "bops":
                return cls(quantity="bops", limit=value)
            if not prefix and unit in _UNITS:
                return cls(quantity="bytes", limit=value * _UNITS[unit])
        raise ConfigError(
            f"cannot read the budget {text!r}. Write '3bit' (average bits of the whole model), 'uniform:3' (the size "
            "of the "
            "uniform 3-bit map), a size such as '450kB' or '1.5MiB', or '2e9bops'."
        )

    def label(self) -> str:
        """Short text that `parse` reads back."""
        number = f"{self.limit:g}"
        return {
            "average_bits": f"{number}bit",
            "uniform_bits": f"uniform:{number}",
            "bytes": f"{self.limit:.0f}B",
            "bops": f"{number}bops",
        }[self.quantity]

    def limit_bits(
        self,
        table: LayerTable,
        policy: Policy,
        storage: StorageModel = DEFAULT_STORAGE,
        *,
        act_bits: int = FULL_PRECISION,
        activation_steps: int = 1,
    ) -> int:
        """The limit as stored bits of the whole model (not for ``bops``); a uniform budget is that of the same
        activations."""
        if self.quantity == "average_bits":
            return int(np.floor(self.limit * table.n_parameters + 1e-9))
        if self.quantity == "bytes":
            return int(self.limit * 8)
        if self.quantity == "bops":
            raise ConfigError("a budget in BOPs has no size in bits")
        low, high = int(np.floor(self.limit)), int(np.ceil(self.limit))
        if low not in WIDTHS or high not in WIDTHS:
            raise ConfigError(f"a uniform budget must lie in {WIDTHS[0]}..{WIDTHS[-1]} bits, got {self.limit:g}")
        key = ("uniform size", policy.key, storage, act_bits, activation_steps)
        known = table.memo.setdefault(key, {})
        for w in {low, high} - known.keys():
            known[w] = size_bits(
                table, uniform_map(table, policy, w, act_bits=act_bits, activation_steps=activation_steps), storage
            )
        sizes = (known[low], known[high])
        return int(np.floor(sizes[0] + (self.limit - low) * (sizes[1] - sizes[0]) + 1e-9))


def parse_size(text: str) -> int:
    """Bytes of a size such as ``"6GB"``, ``"1.5GiB"`` or ``"800 MB"``. Raises `ConfigError` when it is none."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*", text.lower())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(
            f"cannot read the size {text!r}. Write a positive number and a unit, such as '6GB', '800MB' or '1.5GiB'."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def uniform_map(
    table: LayerTable,
    policy: Policy,
    bits: int,
    fmt: QuantFormat | None = None,
    *,
    act_bits: int = FULL_PRECISION,
    activation_steps: int = 1,
) -> BitMap:
    """Every searched layer at ``bits`` with inputs at ``act_bits``, fixed layers as the policy says."""
    weights: dict[str, NDArray[np.uint8]] = {}
    for layer in table:
        fixed = policy.fixed_width(layer)
        weights[layer.name] = np.array(bits if fixed is None else fixed, dtype=np.uint8)
    activations = policy.activations_of(table, act_bits)
    return BitMap(
        model_digest=table.digest,
        weights=weights,
        activations=activations,
        activation_steps=activation_steps if activations else 1,
        format=fmt or QuantFormat(),
    )
