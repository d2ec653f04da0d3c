"""Allocation over a target's own formats: its true stored cost, its shape limits, and the error of its own quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch.allocate import AllocationProblem, AllocationResult, solve
from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable, Policy, QuantFormat, StoredBits, stored_total
from mpqsearch.errors import ConfigError, InfeasibleBudgetError
from mpqsearch.export.contract import Choice
from mpqsearch.export.rounding import least_cost, tie_groups
from mpqsearch.export.target import ConsumerTarget

if TYPE_CHECKING:
    from torch import Tensor, nn

FULL = "full"
"""Column of full precision in the tables here."""


@dataclass(frozen=True, kw_only=True)
class TargetAllocation:
    """A map made for one target: ``choices`` names the format of every quantized layer, ``bit_map`` holds their nominal widths.

    ``stored`` are the bits of the whole model in the target's own file, ``loss`` the predicted loss of the map.
    """

    target: str
    bit_map: BitMap
    choices: Mapping[str, str]
    stored: StoredBits
    limit: int
    loss: float
    result: AllocationResult | None = None

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data (the bit map has a file of its own)."""
        data: dict[str, Any] = {
            "target": self.target,
            "choices": dict(self.choices),
            "stored_bits": {
                "payload": self.stored.payload,
                "metadata": self.stored.metadata,
                "unquantized": self.stored.unquantized,
            },
            "size_bits": self.stored.total,
            "limit": self.limit,
            "predicted_loss": self.loss,
        }
        if self.result is not None:
            data |= {"status": self.result.status, "solver": self.result.solver}
        return data


def formats_of(target: ConsumerTarget, table: LayerTable) -> tuple[str, ...]:
    """All formats that the target has for any layer, by width and name; the columns of `target_errors`."""
    found = {(c.width, c.name) for layer in table for c in target.choices(layer)}
    return tuple(name for _, name in sorted(found))


def target_errors(target: ConsumerTarget, table: LayerTable, module: nn.Module) -> dict[str, Tensor]:
    """Weight errors ``[formats, channels, fan-in]`` of every layer in every format of `formats_of`, zero where it has none.

    Targets that round by themselves and can be asked (`ConsumerTarget.round_trip`) give their own errors; others that derive their
    scales get those of minimum and maximum; the rest keep our codes, in the affine codebook.
    """
    import torch

    from mpqsearch.quant import rows_of
    from mpqsearch.quant.tables import row_errors

    formats = formats_of(target, table)
    asks = type(target).round_trip is not ConsumerTarget.round_trip
    fmt = QuantFormat(criterion="minmax") if target.rerounds else QuantFormat()
    modules: dict[str, Any] = dict(module.named_modules())
    errors = {}
    for layer in table:
        weight = modules[layer.name].weight.detach().float()
        rows = rows_of(weight, layer)
        found = torch.zeros(len(formats), *rows.shape)
        for choice in target.choices(layer):
            ours = None if asks else row_errors(weight, layer, choice.width, fmt, None)
            found[formats.index(choice.name)] = (
                rows_of(target.round_trip(weight, layer, choice), layer) - rows if ours is None else ours
            )
        errors[layer.name] = found
    return errors


def allocate_for(
    target: ConsumerTarget,
    table: LayerTable,
    losses: Mapping[str, Sequence[float]],
    limit: int,
    policy: Policy | None = None,
) -> TargetAllocation:
    """The formats of least total loss whose file takes no more than ``limit`` bits, headers apart: solved exactly.

    ``losses`` gives, for each layer, the loss of every format of `formats_of`; full precision costs nothing and is offered too.
    ``policy`` fixes layers by role or name: such a layer takes the format of that width, or full precision where the target has none.
    Tied layers share their format. Raises `InfeasibleBudgetError`, with the smallest attainable size, when nothing fits.
    """
    table.require_same_names(set(losses), "the losses")
    formats = (*formats_of(target, table), FULL)
    shape = (len(table), len(formats))
    loss, cost, allowed = np.zeros(shape), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    by_name = [{c.name: c for c in target.choices(layer)} for layer in table]
    for i, layer in enumerate(table):
        fixed = None if policy is None else policy.fixed_width(layer)
        offered = [c for c in by_name[i].values() if fixed is None or c.width == fixed]
        for choice in offered:
            j = formats.index(choice.name)
            loss[i, j] = max(0.0, float(losses[layer.name][j]))
            cost[i, j], allowed[i, j] = target.cost(layer, choice).total, True
        cost[i, -1], allowed[i, -1] = target.cost(layer, None).total, fixed is None or not offered
    kept = target.kept_bits * sum(k.n_values for k in table.kept)
    ties = tie_groups(list(table))
    least = least_cost(cost, allowed, ties) + kept
    if least > limit:
        raise InfeasibleBudgetError(
            f"the budget allows {limit} bits ({limit // 8} bytes); the smallest file of {target.name} takes {least} "
            f"({-(-least // 8)} bytes). Layers that it cannot quantize stay at {target.full_bits} bits."
        )
    names = [la.name for la in table]
    problem = AllocationProblem(
        loss=loss, cost=cost, limit=limit - kept, allowed=allowed, ties=ties, names=names, choices=list(formats)
    )
    result = solve(problem)
    return assemble(target, table, [formats[j] for j in result.choice], limit=limit, losses=losses, result=result)


def uniform_for(
    target: ConsumerTarget, table: LayerTable, fmt: str, losses: Mapping[str, Sequence[float]] | None = None
) -> TargetAllocation:
    """Every layer that has the format ``fmt`` in it, all others at full precision: what most tools do."""
    picked = [fmt if fmt in {c.name for c in target.choices(layer)} else FULL for layer in table]
    if set(picked) == {FULL}:
        raise ConfigError(f"no layer of the model can take {fmt!r}; {target.name} needs {target.limits or 'other shapes'}")
    return assemble(target, table, picked, limit=0, losses=losses)


def assemble(
    target: ConsumerTarget,
    table: LayerTable,
    picked: Sequence[str],
    *,
    limit: int,
    losses: Mapping[str, Sequence[float]] | None = None,
    result: AllocationResult | None = None,
) -> TargetAllocation:
    """An allocation from the name of a format for every layer; it is costed again from the names."""
    formats = formats_of(target, table)
    choices: dict[str, Choice] = {}
    total = 0.0
    for layer, name in zip(table, picked, strict=True):
        if name == FULL:
            continue
        choices[layer.name] = next(c for c in target.choices(layer) if c.name == name)
        if losses is not None:
            total += max(0.0, float(losses[layer.name][formats.index(name)]))
    bits = {la.name: target.cost(la, choices.get(la.name)) for la in table}
    widths = {la.name: choices[la.name].width if la.name in choices else FULL_PRECISION for la in table}
    stored = stored_total(table, bits, target.kept_bits)
    return TargetAllocation(
        target=target.name,
        bit_map=BitMap(
            model_digest=table.digest, weights={n: np.array(w, dtype=np.uint8) for n, w in widths.items()}, format=QuantFormat()
        ),
        choices={n: c.name for n, c in choices.items()},
        stored=stored,
        limit=limit or stored.total,
        loss=total,
        result=result,
    )
