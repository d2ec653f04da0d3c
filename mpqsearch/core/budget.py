"""Limits on the whole model, and what a forward pass takes. Stored bits are counted in `mpqsearch.core.stored`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mpqsearch.core.bitmap import BitMap
from mpqsearch.core.formats import FULL_PRECISION, WIDTHS, QuantFormat
from mpqsearch.core.layers import LayerTable
from mpqsearch.core.policy import Policy
from mpqsearch.core.shown import Shown
from mpqsearch.core.stored import size_bits
from mpqsearch.errors import ConfigError

QUANTITIES = ("average_bits", "bytes", "bops", "uniform_bits", "latency")
_SPELLINGS = {
    "average_bits": ("", "bit"),
    "bytes": ("", "B"),
    "bops": ("", "bops"),
    "uniform_bits": ("uniform:", ""),
    "latency": ("", "ms"),
}
MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}
"""Units of time, in milliseconds."""
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bops(table: LayerTable, bit_map: BitMap) -> int:
    """Bit operations of one forward pass on one sample: MACs x weight width x activation width, channel by channel.

    MACs spread evenly over the output channels of a layer; what is left of the division is dropped layer by layer.
    """
    total = 0
    for layer in table:
        bits = int(bit_map.channel_widths(layer.name, layer.n_channels).sum(dtype=np.int64))
        total += layer.macs * bits * bit_map.activations.get(layer.name, FULL_PRECISION) // layer.n_channels
    return total


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Budget(Shown):
    """A limit on the *whole* model.

    ``average_bits``: stored bits over all parameters. ``bytes``: stored size. ``bops``: bit operations of a forward
    pass. ``uniform_bits``: the stored size that the uniform map of that width has under the same policy, in the
    asymmetric format; the fair budget for comparing methods, since the uniform map then meets it exactly.
    ``latency``: milliseconds, by costs that the user measured (`mpqsearch.methods.CostTable`).
    """

    quantity: str
    limit: float

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise ConfigError(f"unknown budget quantity {self.quantity!r}. Allowed: {', '.join(QUANTITIES)}.")
        if isinstance(self.limit, bool) or not self.limit > 0 or not np.isfinite(self.limit):
            raise ConfigError(f"a budget must be positive and finite, got {self.limit}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"3bit"`` (average of the whole model), ``"uniform:3"``, ``"450kB"``, ``"1.5MiB"``, ``"2e9bops"`` or
        ``"12ms"``."""
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
            if not prefix and unit in MILLISECONDS:
                return cls(quantity="latency", limit=value * MILLISECONDS[unit])
        raise ConfigError(
            f"cannot read the budget {text!r}. Write '3bit' (average bits of the whole model), 'uniform:3' (the size "
            "of the uniform 3-bit map), a size such as '450kB' or '1.5MiB', '2e9bops', or a latency such as '12ms'."
        )

    def label(self) -> str:
        """Short text that `parse` reads back exactly."""
        number = f"{self.limit:g}"
        if float(number) != self.limit:
            number = repr(float(self.limit)).removesuffix(".0")
        prefix, unit = _SPELLINGS[self.quantity]
        return f"{prefix}{number}{unit}"

    def facts(self) -> dict[str, str]:
        """The label and what it limits."""
        return {self.label(): self.unit}

    @property
    def unit(self) -> str:
        """What limits and costs are counted in: ``bits stored``, ``BOPs`` or ``ns``."""
        return {"bops": "BOPs", "latency": "ns"}.get(self.quantity, "bits stored")

    def amount(self, cost: int) -> str:
        """A cost in `unit` as people write it: bytes, BOPs or milliseconds."""
        if self.quantity == "latency":
            return f"{cost * MILLISECONDS['ns']:g} ms"
        return f"{cost:,} BOPs" if self.quantity == "bops" else f"{-(-cost // 8):,} bytes"

    def limit_bits(
        self,
        table: LayerTable,
        policy: Policy,
        *,
        act_bits: int = FULL_PRECISION,
        activation_steps: int = 1,
        token_scales: bool = False,
    ) -> int:
        """The limit as stored bits of the whole model; a uniform budget is that of the same activations.

        Raises `ConfigError` for a budget that is no size, and for a uniform one outside 1..8 bits.
        """
        if self.quantity == "average_bits":
            return int(np.floor(self.limit * table.n_parameters + 1e-9))
        if self.quantity == "bytes":
            return int(self.limit * 8)
        if self.quantity != "uniform_bits":
            raise ConfigError(f"a budget in {self.unit} has no size in bits")
        low, high = int(np.floor(self.limit)), int(np.ceil(self.limit))
        if low not in WIDTHS or high not in WIDTHS:
            raise ConfigError(f"a uniform budget must lie in {WIDTHS[0]}..{WIDTHS[-1]} bits, got {self.limit:g}")
        small, large = (
            size_bits(
                table,
                uniform_map(
                    table,
                    policy,
                    w,
                    act_bits=act_bits,
                    activation_steps=activation_steps,
                    token_scales=token_scales,
                ),
            )
            for w in (low, high)
        )
        return int(np.floor(small + (self.limit - low) * (large - small) + 1e-9))


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
    token_scales: bool = False,
) -> BitMap:
    """Every searched layer at ``bits``, or the nearest width within its bounds, with inputs at ``act_bits``; fixed
    layers as the policy says."""
    rules = policy.resolve(table)
    weights = {n: np.array(rules.fixed[n] if n in rules.fixed else rules.nearest(n, bits)) for n in table.by_name}
    activations = policy.activations_of(table, act_bits)
    return BitMap(
        model_digest=table.digest,
        weights=weights,
        activations=activations,
        activation_steps=activation_steps if activations else 1,
        token_scales=token_scales and bool(activations),
        format=fmt or QuantFormat(),
    )
