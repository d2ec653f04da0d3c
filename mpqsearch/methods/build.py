"""The numbers of an integer program over layers or output channels, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import AllocationProblem, CostBudget
from mpqsearch.core import FULL_PRECISION, BitMap, Budget, LayerSpec, QuantFormat
from mpqsearch.core.stored import TAG_BITS, channel_bits, fixed_bits
from mpqsearch.errors import ConfigError
from mpqsearch.methods.task import Choice, Floats, Integers, Task, whole_layers_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An integer program: its numbers, and what they stand for.

    Attributes:
        problem: The numbers. An item is a layer or an output channel.
        layers: Names of the searched layers.
        item_layer: ``[n]``: to which of ``layers`` each item belongs.
        widths: Bits of every choice.
        inputs: Bits of the layer's input in every choice, where these are chosen too.
        formats: Format of the layer in every choice, where these are chosen too.
        fixed_costs: What each budget pays for all that is no item.
    """

    problem: AllocationProblem
    layers: tuple[str, ...]
    item_layer: Integers
    widths: tuple[int, ...]
    fixed_costs: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    formats: tuple[QuantFormat, ...] = ()

    @property
    def by_layer(self) -> bool:
        """Whether the items are layers."""
        return len(self.item_layer) == len(self.layers)

    @property
    def fixed_cost(self) -> int:
        """What the main budget pays for all that is no item."""
        return self.fixed_costs[0]

    def activations(self, choice: NDArray[np.int32]) -> dict[str, int]:
        """Width of the input of every layer under a choice ``[n]``, for a program that chooses them."""
        return {n: self.inputs[int(c)] for n, c in zip(self.layers, choice, strict=True)} if self.inputs else {}

    def weights(self, choice: NDArray[np.int32]) -> dict[str, NDArray[np.uint8]]:
        """Width (or vector of widths) of every layer under a choice ``[n]`` of every item."""
        chosen = np.array(self.widths, dtype=np.uint8)[choice]
        if self.by_layer:
            return dict(zip(self.layers, chosen, strict=True))
        cuts = [0, *np.cumsum(np.bincount(self.item_layer, minlength=len(self.layers))).tolist()]
        return {n: chosen[a:b] for n, a, b in zip(self.layers, cuts, cuts[1:], strict=False)}

    def applied(self, bit_map: BitMap, choice: NDArray[np.int32]) -> BitMap:
        """``bit_map`` with what a choice says of the searched layers."""
        inputs = {**bit_map.activations, **self.activations(choice)}
        chosen = {n: self.formats[int(c)] for n, c in zip(self.layers, choice, strict=False)} if self.formats else {}
        return replace(
            bit_map,
            weights={**bit_map.weights, **self.weights(choice)},
            activations={n: a for n, a in inputs.items() if a != FULL_PRECISION},
            formats={n: f for n, f in {**bit_map.formats, **chosen}.items() if f != bit_map.format},
        )

    def choice(self, bit_map: BitMap) -> NDArray[np.int32]:
        """Choice ``[n]`` of every item in a bit map. Raises `ConfigError` for widths that the program does not have."""
        counts = np.bincount(self.item_layer, minlength=len(self.layers)).tolist()
        bits = [np.broadcast_to(bit_map.weights[n], c).tolist() for n, c in zip(self.layers, counts, strict=True)]
        none = (None,) * len(self.widths)
        names = tuple(f.name for f in self.formats)
        index = {c: i for i, c in enumerate(zip(self.widths, self.inputs or none, names or none, strict=True))}
        found = [
            (
                w,
                bit_map.activations.get(n, FULL_PRECISION) if self.inputs else None,
                bit_map.format_of(n).name if self.formats else None,
            )
            for n, widths in zip(self.layers, bits, strict=True)
            for w in widths
        ]
        stray = next((c for c in found if c not in index), None)
        if stray is not None:
            raise ConfigError(
                f"the map has the choice {stray} (bits, input bits, format), which the program does not have"
            )
        return np.array([index[c] for c in found], dtype=np.int32)


def choices_of(task: Task) -> list[Choice]:
    """What each searched layer may take."""
    widths = sorted(task.programs.policy.widths)
    free = len(task.formats) > 1 and task.chosen_formats is None
    formats = range(len(task.formats)) if free else [None]
    if not task.method.act_choices or task.chosen_inputs is not None:
        return [Choice(w, None, f) for f in formats for w in widths]
    if all(li.budget.quantity not in ("bops", "latency") for li in task.limits):
        raise ConfigError(
            f"method {task.method.name!r}: act_choices need a BOPs budget or a latency; a size does not depend on them "
            "enough to choose"
        )
    return [Choice(w, a, f) for f in formats for w in widths for a in sorted(task.method.act_choices)]


def allowed_choices(task: Task, names: Sequence[str], choices: Sequence[Choice]) -> NDArray[np.bool_]:
    """``[n, k]``: whether a layer may take a choice; of formats that are one for its fan-in, only the first."""
    rules = task.programs.rules

    def allows(name: str, choice: Choice) -> bool:
        return rules.allows(name, choice.bits) and (choice.format is None or choice.format in _different(task, name))

    return np.array([[allows(n, c) for c in choices] for n in names], dtype=bool).reshape(len(names), len(choices))


def _different(task: Task, name: str) -> set[int]:
    """Numbers of the formats that differ for a layer, or for another one that shares its choice."""
    group = next((g for g in task.programs.rules.groups if name in g), (name,))
    sizes = [task.programs.table[n].weights_per_channel for n in group]
    first: dict[tuple[Any, ...], int] = {}
    for number, fmt in enumerate(task.formats):
        first.setdefault((fmt.scheme, *map(fmt.group_of, sizes)), number)
    return set(first.values())


def layer_program(task: Task) -> Program:
    """The program over layers."""
    rules, choices = task.programs.rules, choices_of(task)
    inputs, names = task.inputs(task.widest_input), rules.searched
    groups = np.full(len(names), -1)
    for number, group in enumerate(rules.groups):
        groups[[names.index(n) for n in group]] = number
    fixed = tuple(task.fixed_cost(li.budget, inputs) for li in task.limits)
    problem = _problem(
        task,
        loss=_layer_losses(task, names, choices),
        costs=[task.layer_costs(li.budget, names, choices, inputs) for li in task.limits],
        fixed=fixed,
        allowed=allowed_choices(task, names, choices),
        groups=groups,
        names=names,
        choices=tuple(_label(task, c) for c in choices),
        layer=np.arange(len(names)),
    )
    return Program(
        problem=problem,
        layers=names,
        item_layer=np.arange(len(names)),
        widths=tuple(c.bits for c in choices),
        fixed_costs=fixed,
        inputs=tuple(c.input for c in choices if c.input is not None),
        formats=tuple(task.formats[c.format] for c in choices if c.format is not None),
    )


def _label(task: Task, choice: Choice) -> str:
    width = f"{choice.bits} bits" if choice.input is None else f"W{choice.bits}A{choice.input}"
    return width if choice.format is None else f"{width} {task.formats[choice.format].name}"


def channel_program(task: Task) -> Program:
    """The program over output channels, each of which pays for its tag."""
    rules, widths = task.programs.rules, sorted(task.programs.policy.widths)
    layers = [task.programs.table[n] for n in rules.searched]
    inputs = task.inputs(task.widest_input)
    item_layer = np.repeat(np.arange(len(layers)), [la.n_channels for la in layers])
    costs, fixed = [], []
    for li in task.limits:
        if li.budget.quantity == "latency":
            raise whole_layers_only(task.method, li.budget)
        costs.append(_channel_costs(task, li.budget, layers, widths, inputs)[item_layer])
        fixed.append(task.fixed_cost(li.budget, inputs) + _beside_channels(task, li.budget, layers, inputs))
    problem = _problem(
        task,
        loss=_channel_losses(task, layers, widths),
        costs=costs,
        fixed=fixed,
        allowed=allowed_choices(task, rules.searched, [Choice(w) for w in widths])[item_layer],
        groups=_channel_labels(task, layers),
        choices=tuple(f"{b} bits" for b in widths),
        layer=item_layer,
    )
    return Program(
        problem=problem,
        layers=rules.searched,
        item_layer=item_layer,
        widths=tuple(widths),
        fixed_costs=tuple(fixed),
    )


def _problem(
    task: Task,
    *,
    loss: Floats,
    costs: Sequence[Integers],
    fixed: Sequence[int],
    allowed: NDArray[np.bool_],
    groups: Integers,
    choices: tuple[str, ...],
    layer: Integers,
    names: tuple[str, ...] | None = None,
) -> AllocationProblem:
    """The numbers of a program, with the limits that are left for its items."""
    policy = task.programs.policy
    budgets = tuple(
        CostBudget(name=li.budget.label(), cost=cost, limit=li.limit - paid)
        for li, cost, paid in zip(task.limits, costs, fixed, strict=True)
    )
    return AllocationProblem(
        loss=loss,
        budgets=budgets,
        allowed=None if allowed.all() else allowed,
        groups=groups if (groups >= 0).any() else None,
        names=names,
        choices=choices,
        max_formats=policy.max_formats or None,
        max_formats_per_layer=policy.max_formats_per_layer or None,
        layer=layer if policy.max_formats_per_layer else None,
    )


def _channel_losses(task: Task, layers: Sequence[LayerSpec], widths: Sequence[int]) -> Floats:
    """Losses ``[n, k]`` of the channels of some layers at some widths."""
    profile = task.programs.profile
    rows = np.concatenate([np.arange(r.start, r.stop) for r in (profile.rows(la.name) for la in layers)])
    columns = np.array([profile.widths.index(b) for b in widths])
    losses: Floats = task.channel_losses()[rows[:, None], columns]
    return losses


def _channel_costs(
    task: Task, budget: Budget, layers: Sequence[LayerSpec], widths: Sequence[int], inputs: Mapping[str, int]
) -> Integers:
    """Cost ``[l, k]`` of one channel of each layer at each width: bits with its tag, or its BOPs, rounded up."""
    if budget.quantity == "bops":
        acts = [inputs.get(la.name, FULL_PRECISION) for la in layers]
        cost = [[-(-la.macs * b * a // la.n_channels) for b in widths] for la, a in zip(layers, acts, strict=True)]
    else:
        cost = [[channel_bits(la, b, task.format_of(la.name)) + TAG_BITS for b in widths] for la in layers]
    return np.array(cost, dtype=np.int64).reshape(len(layers), len(widths))


def _beside_channels(task: Task, budget: Budget, layers: Sequence[LayerSpec], inputs: Mapping[str, int]) -> int:
    """Stored bits of searched layers that are of no one channel."""
    if budget.quantity == "bops":
        return 0
    acts = [inputs.get(la.name, FULL_PRECISION) for la in layers]
    return sum(
        fixed_bits(la, task.format_of(la.name)) + task.input_bits(la, a) for la, a in zip(layers, acts, strict=True)
    )


def _layer_losses(task: Task, names: Sequence[str], choices: Sequence[Choice]) -> Floats:
    """Loss ``[n, k]`` of each layer at each choice, that of its input included where the choice names its width."""
    profile = task.programs.profile
    rows = np.array([profile.index[n] for n in names], dtype=np.int64)
    tables = {f: profile.layer_sum(task.channel_losses(f))[rows] for f in dict.fromkeys(c.format for c in choices)}
    loss: Floats = np.stack([tables[c.format][:, profile.widths.index(c.bits)] for c in choices], axis=1)
    inputs = [c.input for c in choices if c.input is not None]
    return loss + input_losses(task, names, inputs) if inputs else loss


def input_losses(task: Task, names: Sequence[str], widths: Sequence[int]) -> Floats:
    """Loss ``[n, k]`` of the inputs of some layers at some widths, 16 for full precision."""
    profile = task.programs.profile
    measured = profile.arrays.get("layer_activation_error")
    if measured is None:
        raise ConfigError(
            "act_choices need the errors of quantized inputs: set calibration.activation_bits and profile again"
        )
    unknown = set(task.method.act_choices) - {*profile.widths, FULL_PRECISION}
    if unknown:
        raise ConfigError(f"act_choices name {sorted(unknown)} bits, the profile has the widths {profile.widths}")
    errors = np.concatenate([measured.astype(np.float64), np.zeros((len(measured), 1))], axis=1)
    place = {b: j for j, b in enumerate(profile.widths)} | {FULL_PRECISION: len(profile.widths)}
    rows = np.array([profile.index[n] for n in names], dtype=np.int64)
    lost: Floats = errors[rows][:, [place[a] for a in widths]]
    return lost


def _channel_labels(task: Task, layers: Sequence[LayerSpec]) -> Integers:
    """Group ``[n]`` of every channel of the searched layers, -1 for those that are free.

    Layers of a group share widths channel by channel; with unequal numbers of channels, one width for all.
    """
    counts = {la.name: la.n_channels for la in layers}
    starts = dict(zip(counts, np.cumsum([0, *counts.values()])[:-1].tolist(), strict=True))
    labels, used = np.full(sum(counts.values()), -1, dtype=np.int64), 0
    for group in task.programs.rules.groups:
        n = counts[group[0]]
        equal = all(counts[name] == n for name in group)
        for name in group:
            labels[starts[name] : starts[name] + counts[name]] = used + np.arange(n) if equal else used
        used += n if equal else 1
    return labels
