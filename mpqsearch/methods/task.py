"""One method at its budgets: what its maps and its choices cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import FULL_PRECISION, BitMap, Budget, LayerSpec, QuantFormat, bops, size_bits, uniform_map
from mpqsearch.core.stored import input_bits, layer_bits
from mpqsearch.errors import ConfigError
from mpqsearch.methods.losses import BEST_LOSS, channel_losses
from mpqsearch.methods.spec import PROGRAMS, MethodSpec

if TYPE_CHECKING:
    from mpqsearch.methods.programs import Programs

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Choice(NamedTuple):
    """Width of a layer's weights; that of its input and its format (an index into `Task.formats`) where these are
    chosen too."""

    bits: int
    input: int | None = None
    format: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A budget on the whole model as a whole number in its unit."""

    budget: Budget
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One method at some budgets, the main one first.

    ``formats``: those of which each searched layer gets one, the first for all others. ``chosen_inputs`` and
    ``chosen_formats``: widths of inputs, and formats by number, of searched layers that a program has chosen already.
    """

    programs: Programs
    method: MethodSpec
    formats: tuple[QuantFormat, ...]
    limits: tuple[Limit, ...]
    activation_steps: int = 1
    token_scales: bool = False
    losses: Floats | None = None
    chosen_inputs: Mapping[str, int] | None = None
    chosen_formats: Mapping[str, int] | None = None

    @property
    def format(self) -> QuantFormat:
        """The format of layers for which none is chosen."""
        return self.formats[0]

    def format_of(self, name: str) -> QuantFormat:
        """The format of one layer: the chosen one, or the first."""
        return self.formats[(self.chosen_formats or {}).get(name, 0)]

    def without_smoothing(self) -> Task:
        """For OMQ, which starts from the uniform map of the budget whatever its smoothing factors cost."""
        return replace(self, formats=(replace(self.format, smooth=False),))

    def inputs(self, act_bits: int) -> dict[str, int]:
        """Width of every quantized input when those of searched layers have ``act_bits``, or what was chosen."""
        return {**self.programs.policy.activations_of(self.programs.table, act_bits), **(self.chosen_inputs or {})}

    @property
    def widest_input(self) -> int:
        """Width of the inputs of searched layers before any is chosen."""
        return max(self.method.act_choices, default=self.method.act_bits)

    def map_of(self, widths: Mapping[str, Any]) -> BitMap:
        """The map with some widths, the other searched layers at the smallest."""
        base = uniform_map(
            self.programs.table,
            self.programs.policy,
            min(self.programs.policy.widths),
            self.format,
            act_bits=self.widest_input,
            activation_steps=self.activation_steps,
            token_scales=self.token_scales,
        )
        inputs = {n: a for n, a in self.inputs(self.widest_input).items() if a != FULL_PRECISION}
        formats = {n: self.formats[f] for n, f in (self.chosen_formats or {}).items() if f}
        return replace(base, weights={**base.weights, **widths}, activations=inputs, formats=formats)

    def cost(self, budget: Budget, bit_map: BitMap) -> int:
        """What a whole map costs under a budget."""
        table, costs = self.programs.table, self.programs.costs
        if budget.quantity == "bops":
            return bops(table, bit_map)
        if budget.quantity != "latency" or costs is None:
            return size_bits(table, bit_map)
        if bit_map.granularity == "channel":
            raise whole_layers_only(self.method, budget)
        asked = [(n, int(w), bit_map.activations.get(n, FULL_PRECISION)) for n, w in bit_map.weights.items()]
        costs.require(asked)
        return sum(costs.of(*a) for a in asked)

    def fits(self, bit_map: BitMap) -> bool:
        """Whether a map keeps to every budget."""
        return all(self.cost(li.budget, bit_map) <= li.limit for li in self.limits)

    def layer_costs(
        self, budget: Budget, names: Sequence[str], choices: Sequence[Choice], inputs: Mapping[str, int]
    ) -> Integers:
        """Cost ``[n, k]`` of whole layers at each choice, their quantized inputs included; ``inputs`` are those that no
        choice names."""
        asked = [
            [(n, c.bits, inputs.get(n, FULL_PRECISION) if c.input is None else c.input) for c in choices] for n in names
        ]
        costs = self.programs.costs
        if budget.quantity == "latency" and costs is not None:
            rules = self.programs.rules
            costs.require(cell for row in asked for cell in row if rules.allows(cell[0], cell[1]))
            table = [[costs.of(*c) if rules.allows(c[0], c[1]) else 0 for c in row] for row in asked]
        elif budget.quantity == "bops":
            table = [[self.programs.table[n].macs * w * a for n, w, a in row] for row in asked]
        else:
            table = [[self._stored(*cell, c.format) for cell, c in zip(row, choices, strict=True)] for row in asked]
        return np.array(table, dtype=np.int64).reshape(len(names), len(choices))

    def unit_costs(self, choices: Sequence[Choice]) -> tuple[list[Integers], list[int], NDArray[np.bool_]]:
        """Of the layers that share their widths: costs ``[u, k]`` and what is left for them, under every budget, and
        which choices ``[u, k]`` they may take."""
        rules, inputs, units = self.programs.rules, self.inputs(self.widest_input), self.programs.rules.units()
        starts, names = np.cumsum([0, *map(len, units)])[:-1], [name for unit in units for name in unit]
        costs = [np.add.reduceat(self.layer_costs(li.budget, names, choices, inputs), starts) for li in self.limits]
        rooms = [li.limit - self.fixed_cost(li.budget, inputs) for li in self.limits]
        allowed = [[rules.allows(unit[0], c.bits) for c in choices] for unit in units]
        return costs, rooms, np.array(allowed, dtype=bool)

    def _stored(self, name: str, bits: int, act_bits: int, fmt: int | None = None) -> int:
        layer = self.programs.table[name]
        own = self.format_of(name) if fmt is None else self.formats[fmt]
        weights = layer_bits(layer, np.array(bits, dtype=np.uint8), own).total
        return weights + self.input_bits(layer, act_bits)

    def input_bits(self, layer: LayerSpec, act_bits: int) -> int:
        """Stored bits of the scales of a layer's input."""
        return input_bits(layer, act_bits, self.activation_steps, token_scales=self.token_scales)

    def fixed_cost(self, budget: Budget, inputs: Mapping[str, int]) -> int:
        """What a budget pays for all that is not searched: fixed layers, and what is no weight layer."""
        rules = self.programs.rules
        asked = [(n, b, inputs.get(n, FULL_PRECISION)) for n, b in rules.fixed.items()]
        if budget.quantity == "latency" and self.programs.costs is not None:
            self.programs.costs.require(asked)
            return sum(self.programs.costs.of(*a) for a in asked)
        if budget.quantity == "bops":
            return sum(self.programs.table[n].macs * b * a for n, b, a in asked)
        return FULL_PRECISION * self.programs.table.n_kept + sum(self._stored(*a) for a in asked)

    def channel_losses(self, fmt: int | None = None) -> Floats:
        """Losses ``[C, W]`` of every output channel at every width of the profile, in the format of that number, or
        each layer in its own."""
        if self.losses is not None:
            return self.losses
        if fmt is None and self.chosen_formats:
            profile, chosen = self.programs.profile, self.chosen_formats
            number = np.repeat([chosen.get(n, 0) for n in profile.names], profile.channels)
            tables = {f: self.channel_losses(f) for f in np.unique(number).tolist()}
            return np.select([(number == f)[:, None] for f in tables], list(tables.values()))
        m, programs = self.method, self.programs
        # Errors of quantized inputs were measured on one prediction; they may be added to losses of that unit only.
        loss = "probe" if m.act_choices and m.loss == BEST_LOSS else m.loss
        if m.act_choices and loss != "probe":
            raise ConfigError(f"method {m.name!r}: act_choices go with the loss 'probe', got {loss!r}")
        return channel_losses(
            programs.profile,
            programs.table,
            m.format_names[fmt or 0],
            loss,
            bias_correction=m.bias_correction,
            shrinkage=m.shrinkage,
            effects_of=m.format_name,
            rounding=m.rounding if m.allocator in PROGRAMS else "",
        )


def whole_layers_only(method: MethodSpec, budget: Budget) -> ConfigError:
    """The error of a latency asked for widths inside layers."""
    return ConfigError(
        f"method {method.name!r} mixes widths inside a layer, and the latencies behind {budget.label()} were measured "
        "for whole layers; use the allocator ilp-layer"
    )
