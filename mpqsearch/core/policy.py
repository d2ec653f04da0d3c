"""Which layers the search may touch, and within which bounds: data in the configuration, printed, and counted in the
size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mpqsearch.core.formats import FULL_PRECISION, WIDTHS, check_width
from mpqsearch.core.layers import ROLES, LayerSpec, LayerTable
from mpqsearch.core.shown import Shown, short_list
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.untrusted import fits

DEFAULT_ROLES = {"first": 8, "last": 8, "unused": 8}

FUSED = "qkv"
"""The word among the patterns of a group that stands for the projections that consumers fuse."""

HELD_BITS = 8
"""Width of layers of which the measurements say too little to choose one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRules:
    """A policy applied to the layers of one model; every layer is in ``fixed`` or in ``searched``.

    Attributes:
        fixed: Width at which each layer that is not searched is held.
        searched: Names of the searched layers, in the order of the table.
        bounds: Smallest and largest width that each searched layer may take.
        groups: Searched layers that share their widths, two or more in each.
    """

    fixed: Mapping[str, int]
    searched: tuple[str, ...]
    bounds: Mapping[str, tuple[int, int]]
    groups: tuple[tuple[str, ...], ...]

    def nearest(self, name: str, bits: int) -> int:
        """The width nearest to ``bits`` within the bounds of a searched layer."""
        low, high = self.bounds[name]
        return min(max(bits, low), high)

    def allows(self, name: str, bits: int) -> bool:
        """Whether a searched layer may take a width."""
        low, high = self.bounds[name]
        return low <= bits <= high

    def units(self) -> list[tuple[str, ...]]:
        """The searched layers by group, those that are free by themselves; in the order of their first layers."""
        group_of = {name: group for group in self.groups for name in group}
        return list(dict.fromkeys(group_of.get(name, (name,)) for name in self.searched))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Policy(Shown):
    """Widths that are fixed by role or by name; every other layer is searched over ``widths`` within its bounds.

    Patterns are layer names or shell patterns (``down_blocks.*``).

    widths [bits]
        Widths that may be chosen, 1..8.
    roles [bits]
        From a role to a width (1..8, or 16 for full precision); roles that are not named are searched. Default: first
        and last layer at 8 bits, as in MPQ-DM, and so are layers that did not run while the model was measured: their
        errors seem to cost nothing, and would get the fewest bits.
    overrides [bits]
        From a pattern to a width, which wins over the role; the first pattern that matches counts. Example:
        ``{conv_in = 16}``.
    min_bits [bits]
        From a pattern to the least width of the *searched* layers that match; all bounds hold. Example:
        ``{"up_blocks.*" = 4}``.
    max_bits [bits]
        From a pattern to the largest width of the *searched* layers that match; all bounds hold. Example:
        ``{"mid_block.*" = 4}``.
    groups
        From a name to patterns: the layers that match any of them share their widths, output channel by output channel
        where they have equally many, else with one width for all. The word ``qkv`` among the patterns stands for the
        projections that consumers fuse (`LayerSpec.fuse`), each attention by itself: engines whose fused layer has one
        width need it. Groups that overlap are one group; a group with a fixed layer takes its width. Example:
        ``{fused = ["qkv"]}``.
    max_formats [widths]
        Most different widths (or pairs of weight and input widths) among all searched layers; 0: any number.
    max_formats_per_layer [widths]
        Most different widths inside each searched layer; 0: any number.
    activations [bits]
        From a role or a pattern to the width of that layer's input where a method quantizes activations. It wins over
        the rule: searched layers the width of the method, fixed ones 8 bits (MPQ-DM), those at full precision none.
        Example: ``{time = 8}``.
    """

    widths: tuple[int, ...] = WIDTHS
    roles: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_ROLES))
    overrides: Mapping[str, int] = field(default_factory=dict)
    min_bits: Mapping[str, int] = field(default_factory=dict)
    max_bits: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_formats: int = 0
    max_formats_per_layer: int = 0
    activations: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for bits in self.widths:
            check_width(bits, "policy.widths")
        if not self.widths or set(self.widths) - set(WIDTHS) or len(set(self.widths)) != len(self.widths):
            raise ConfigError(f"policy.widths must be distinct widths of {WIDTHS}, got {self.widths}")
        for role in self.roles:
            if role not in ROLES:
                raise UnknownNameError("layer role", role, ROLES, "(policy.roles)")
        for what in ("roles", "overrides", "min_bits", "max_bits", "activations"):
            for key, bits in getattr(self, what).items():
                check_width(bits, f"policy.{what}.{key}")
        for what in ("max_formats", "max_formats_per_layer"):
            most = getattr(self, what)
            if not isinstance(most, int) or isinstance(most, bool) or most < 0:
                raise ConfigError(f"policy.{what} must be a whole number of at least 0 (0: any number), got {most!r}")
        for name, patterns in self.groups.items():
            if not isinstance(patterns, (list, tuple)) or not patterns:
                raise ConfigError(f"policy.groups.{name} must be a list of patterns, got {patterns!r}")

    def activations_of(self, table: LayerTable, act_bits: int) -> dict[str, int]:
        """Width of the input of every layer whose activations are quantized when searched layers take ``act_bits`` (16:
        nothing is)."""
        if act_bits == FULL_PRECISION:
            return {}
        widths = {layer.name: self._activation_width(layer, act_bits) for layer in table}
        return {name: bits for name, bits in widths.items() if bits != FULL_PRECISION}

    def _activation_width(self, layer: LayerSpec, act_bits: int) -> int:
        for key, bits in self.activations.items():
            if _matches(layer.name, key):
                return bits
        if layer.role in self.activations:
            return self.activations[layer.role]
        fixed = self.fixed_width(layer)
        return act_bits if fixed is None else FULL_PRECISION if fixed == FULL_PRECISION else 8

    def fixed_width(self, layer: LayerSpec) -> int | None:
        """The width at which the role or the name of ``layer`` holds it, or None when it is searched."""
        for pattern, bits in self.overrides.items():
            if _matches(layer.name, pattern):
                return bits
        return self.roles.get(layer.role)

    def holding(self, table: LayerTable, names: Iterable[str], bits: int = HELD_BITS) -> Policy:
        """This policy with those of some layers fixed at ``bits`` that it leaves to the search."""
        held = {n: bits for n in names if n in table.by_name and self.fixed_width(table[n]) is None}
        return replace(self, overrides={**self.overrides, **held}) if held else self

    def groups_of(self, table: LayerTable) -> list[tuple[str, ...]]:
        """Layers that share their widths, two or more in each group: those of ``groups``."""
        members: dict[tuple[str, str], list[str]] = {}
        for layer in table:
            for label in self._labels(layer):
                members.setdefault(label, []).append(layer.name)
        joined: list[set[str]] = []
        for names in members.values():
            touching = [group for group in joined if group & set(names)]
            joined = [group for group in joined if group not in touching] + [set(names).union(*touching)]
        groups = [tuple(n for n in table.by_name if n in group) for group in joined if len(group) > 1]
        return sorted(groups, key=lambda group: table.index[group[0]])

    def _labels(self, layer: LayerSpec) -> list[tuple[str, str]]:
        fused = any(FUSED in patterns for patterns in self.groups.values())
        labels = [("fuse", layer.fuse)] * bool(layer.fuse and fused)
        asked = ((n, p) for n, patterns in self.groups.items() for p in patterns if p != FUSED)
        return labels + [("group", name) for name, pattern in asked if _matches(layer.name, pattern)]

    def resolve(self, table: LayerTable) -> LayerRules:
        """What the policy says of every layer of one model.

        Raises `ConfigError` when a group holds layers that are fixed at different widths, or no width is left for a
        layer.
        """
        fixed = {la.name: bits for la in table if (bits := self.fixed_width(la)) is not None}
        groups = self.groups_of(table)
        for group in groups:
            held = {fixed[n] for n in group if n in fixed}
            if len(held) > 1:
                raise ConfigError(
                    f"the layers {short_list(group)} share their widths (policy.groups), but are "
                    f"fixed at {' and '.join(map(str, sorted(held)))} bits"
                )
            fixed |= {n: bits for bits in held for n in group}
        searched = tuple(n for n in table.by_name if n not in fixed)
        free = tuple(group for group in groups if group[0] not in fixed)
        bounds = {n: self._bounds((n,)) for n in searched} | {n: self._bounds(group) for group in free for n in group}
        return LayerRules(fixed=fixed, searched=searched, bounds=bounds, groups=free)

    def _bounds(self, names: tuple[str, ...]) -> tuple[int, int]:
        """Smallest and largest width that some layers may take together; 1 and 16 where nothing bounds them."""
        least, most = (
            [bits for pattern, bits in rules.items() if any(_matches(n, pattern) for n in names)]
            for rules in (self.min_bits, self.max_bits)
        )
        low, high = max(least, default=1), min(most, default=FULL_PRECISION)
        within = [bits for bits in self.widths if low <= bits <= high]
        if not within:
            raise ConfigError(
                f"no width is left for {short_list(names)}: min_bits and max_bits allow {low}..{high}, policy.widths "
                f"{', '.join(map(str, sorted(self.widths)))}"
            )
        return min(within) if least else low, max(within) if most else high

    def check(self, table: LayerTable) -> None:
        """Raise when a pattern matches no layer of the model, or nothing is left to search."""
        named = [(what, p) for what in ("overrides", "min_bits", "max_bits") for p in getattr(self, what)]
        named += [(f"groups.{name}", p) for name, patterns in self.groups.items() for p in patterns if p != FUSED]
        for what, pattern in named:
            if not any(_matches(name, pattern) for name in table.by_name):
                raise UnknownNameError("layer", pattern, table.by_name, f"(policy.{what} matches no layer)")
        for key in self.activations:
            if key not in ROLES and not any(_matches(name, key) for name in table.by_name):
                raise UnknownNameError(
                    "layer or role", key, (*ROLES, *table.by_name), "(policy.activations matches nothing)"
                )
        if not self.resolve(table).searched:
            raise ConfigError("the policy fixes every layer: nothing is left to allocate")

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v for k, v in data.items()
        }

    def describe(self) -> str:
        """One line for people."""
        parts = [f"searched widths {', '.join(map(str, self.widths))}"]
        fixed = [f"{k} at {_bits(v)}" for k, v in {**self.roles, **self.overrides}.items()]
        parts.append(f"fixed: {'; '.join(fixed) or 'nothing'}")
        for what, sign in (("min_bits", ">="), ("max_bits", "<=")):
            parts += [f"{pattern} {sign} {_bits(bits)}" for pattern, bits in getattr(self, what).items()]
        parts += [f"{name} share their widths" for name in self.groups]
        parts += [f"at most {self.max_formats} widths"] * bool(self.max_formats)
        parts += [f"at most {self.max_formats_per_layer} widths a layer"] * bool(self.max_formats_per_layer)
        return "; ".join(parts)

    def facts(self) -> dict[str, str]:
        """What is searched, and what is not."""
        return {"policy": self.describe()}


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fits(name, pattern)


def _bits(bits: int) -> str:
    return "full precision" if bits == FULL_PRECISION else f"{bits} bits"
