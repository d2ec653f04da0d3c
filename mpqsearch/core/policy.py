"""Which layers the search may touch: data in the configuration, printed, and counted in the size."""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpqsearch.core.formats import FULL_PRECISION, WIDTHS, check_width
from mpqsearch.core.layers import ROLES, LayerSpec, LayerTable
from mpqsearch.errors import ConfigError, UnknownNameError

DEFAULT_ROLES = {"first": 8, "last": 8, "unused": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Widths that are fixed by role or by name; every other layer is searched over ``widths``.

    ``roles`` maps a role to a width (1..8, or 16 for full precision); roles that are not named are searched.
    ``overrides`` maps a layer name or a shell pattern to a width and wins over the role. Default: first and last layer
    at 8 bits, as in MPQ-DM, and so are layers that did not run while the model was measured: their errors seem to cost
    nothing, and would get the fewest bits.

    ``activations`` maps a role, a layer name or a pattern to the width of that layer's input where a method quantizes
    activations, and wins over the rule: searched layers the width of the method, fixed ones 8 bits (MPQ-DM), those at
    full precision none.

    ``tie_qkv`` gives the projections that consumers fuse (`LayerSpec.fuse`) the same widths, row for row. Off by
    default: codes, scales and width tags are stored by row, so rows of different widths can be stacked as they are;
    engines whose fused layer has one width need it.
    """

    widths: tuple[int, ...] = WIDTHS
    roles: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_ROLES))
    overrides: Mapping[str, int] = field(default_factory=dict)
    activations: Mapping[str, int] = field(default_factory=dict)
    tie_qkv: bool = False

    def __post_init__(self) -> None:
        if not self.widths or any(w not in WIDTHS for w in self.widths) or len(set(self.widths)) != len(self.widths):
            raise ConfigError(f"policy.widths must be distinct widths of {WIDTHS}, got {self.widths}")
        for role, bits in self.roles.items():
            if role not in ROLES:
                raise UnknownNameError("layer role", role, ROLES, "(policy.roles)")
            check_width(bits, f"policy.roles.{role}")
        for pattern, bits in self.overrides.items():
            check_width(bits, f"policy.overrides.{pattern}")
        for key, bits in self.activations.items():
            check_width(bits, f"policy.activations.{key}")

    @property
    def key(self) -> Hashable:
        """The same for policies that hold every layer at the same widths, by the same rules in the same order."""
        rules = (self.roles, self.overrides, self.activations)
        return (self.widths, *(tuple(r.items()) for r in rules), self.tie_qkv)

    def activations_of(self, table: LayerTable, act_bits: int) -> dict[str, int]:
        """Width of the input of every layer whose activations are quantized when searched layers take ``act_bits`` (16:
        nothing is)."""
        if act_bits == FULL_PRECISION:
            return {}
        widths = {layer.name: self._activation_width(layer, act_bits) for layer in table}
        return {name: bits for name, bits in widths.items() if bits != FULL_PRECISION}

    def _activation_width(self, layer: LayerSpec, act_bits: int) -> int:
        for key, bits in self.activations.items():
            if layer.name == key or fnmatch.fnmatchcase(layer.name, key):
                return bits
        if layer.role in self.activations:
            return self.activations[layer.role]
        fixed = self.fixed_width(layer)
        return act_bits if fixed is None else FULL_PRECISION if fixed == FULL_PRECISION else 8

    def fixed_width(self, layer: LayerSpec) -> int | None:
        """The width at which ``layer`` is held, or None when it is searched."""
        for pattern, bits in self.overrides.items():
            if layer.name == pattern or fnmatch.fnmatchcase(layer.name, pattern):
                return bits
        return self.roles.get(layer.role)

    def tie_of(self, layer: LayerSpec) -> str:
        """The name of the group whose layers share their widths with ``layer``; empty when it is free."""
        return layer.tie or (layer.fuse if self.tie_qkv else "")

    def check(self, table: LayerTable) -> None:
        """Raise when a pin matches no layer of the model, or nothing is left to search."""
        for pattern in self.overrides:
            if not fnmatch.filter(table.by_name, pattern) and pattern not in table.by_name:
                raise UnknownNameError(
                    "layer", pattern, table.by_name, "(policy.overrides matches no layer of the model)"
                )
        for key in self.activations:
            if key not in ROLES and not fnmatch.filter(table.by_name, key) and key not in table.by_name:
                raise UnknownNameError(
                    "layer or role", key, (*ROLES, *table.by_name), "(policy.activations matches nothing)"
                )
        if all(self.fixed_width(layer) is not None for layer in table):
            raise ConfigError("the policy fixes every layer: nothing is left to allocate")

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "widths": list(self.widths),
            "roles": dict(self.roles),
            "overrides": dict(self.overrides),
            "activations": dict(self.activations),
            "tie_qkv": self.tie_qkv,
        }

    def describe(self) -> str:
        """One line for people."""
        fixed = [
            f"{k} at {'full precision' if v == FULL_PRECISION else f'{v} bits'}"
            for k, v in {**self.roles, **self.overrides}.items()
        ]
        return f"searched widths {', '.join(map(str, self.widths))}; fixed: {'; '.join(fixed) or 'nothing'}" + (
            "; q, k and v tied" if self.tie_qkv else ""
        )
