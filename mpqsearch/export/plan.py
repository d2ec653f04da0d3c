"""From the widths of a map to the formats that a target has, one per layer, with a reason for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mpqsearch.core import FULL_PRECISION, LayerSpec
from mpqsearch.errors import UnknownNameError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.specs.targets import FULL

if TYPE_CHECKING:
    from mpqsearch.export.target import Target

_EXACT = 1e-9  # a mean of widths that is this close to a width is that width


def plan_layers(job: ExportJob, target: Target) -> list[PlanEntry]:
    """One entry per layer for a target with one format per layer.

    A layer that ``job.choices`` names gets that format, with the reason ``resolved`` where the map asks for another
    width; `mpqsearch.export.allocation.allocate_for` gives such choices. Any other gets the next width up that the
    target has, full precision above the widest; a layer whose channels differ stands for its mean width. A map that the
    target can hold comes back unchanged; three levels (the scheme ``ternary``) are not held by any of these targets.
    """
    unknown = sorted(set(job.choices) - set(job.table.by_name))
    if unknown:
        raise UnknownNameError("layer", unknown[0], job.table.by_name, f"(the choices for {target.name!r})")
    return [_entry_of(layer, job, target) for layer in job.table]


def plan_channels(job: ExportJob, target: Target) -> list[PlanEntry]:
    """Every layer as asked, channel by channel, for a target that holds all widths of its kinds of layers; others stay
    at full precision."""
    plan = []
    for layer in job.table:
        widths = job.bit_map.weights[layer.name]
        asked = (int(widths.min()), int(widths.max()))
        if asked[0] == FULL_PRECISION:
            plan.append(_entry(layer, job, None, "kept_full_precision", "the map asks for full precision."))
        elif target.kinds and layer.kind not in target.kinds:
            detail = f"{target.name} quantizes {', '.join(target.kinds)} only; the layer stays at full precision."
            plan.append(_entry(layer, job, None, "unsupported_kind", detail))
        elif asked[0] != asked[1]:
            plan.append(PlanEntry(layer=layer.name, asked=asked, will_get=None, reason="exact"))
        else:
            plan.append(_entry(layer, job, Choice(name=f"uint{asked[0]}", width=asked[0]), "exact", ""))
    return plan


def share(plan: Sequence[PlanEntry], groups: Sequence[Sequence[str]]) -> list[PlanEntry]:
    """The plan with one format for all layers of a group, the widest of theirs: they are one layer in the file."""
    entries = {e.layer: e for e in plan}
    for group in groups:
        widest = max((entries[n] for n in group), key=lambda e: e.will_get or 0)
        for entry in (entries[n] for n in group if entries[n].choice != widest.choice):
            detail = f"one layer with {widest.layer} in the file, which has {widest.choice or 'full precision'}."
            entries[entry.layer] = replace(
                entry, will_get=widest.will_get, choice=widest.choice, reason="rounded_up", detail=detail
            )
    return list(entries.values())


def _entry_of(layer: LayerSpec, job: ExportJob, target: Target) -> PlanEntry:
    choices, name = target.choices(layer), target.name
    asked = job.bit_map.channel_widths(layer.name, layer.n_channels)
    low, high, mean = int(asked.min()), int(asked.max()), float(asked.mean())
    three = job.bit_map.format_of(layer.name).three_levels(low) and low == high
    picked = job.choices.get(layer.name)
    if low == FULL_PRECISION and picked in (None, FULL):
        return _entry(layer, job, None, "kept_full_precision", "the map asks for full precision.")
    if layer.kind not in target.kinds and picked in (None, FULL):
        detail = f"{name} quantizes {' and '.join(target.kinds)} only; the layer stays at full precision."
        return _entry(layer, job, None, "unsupported_kind", detail)
    if not choices and picked in (None, FULL):
        shape = "x".join(map(str, layer.weight_shape))
        return _entry(layer, job, None, "unsupported_shape", f"{name} needs {target.limits}; the shape is {shape}.")
    if picked is not None:
        named = {c.name: c for c in choices}
        if picked not in (*named, FULL):
            raise UnknownNameError(f"{name} format of {layer.name!r}", picked, (*named, FULL))
        choice = named.get(picked)
        if choice is not None and low == high == choice.width and not three:
            return _entry(layer, job, choice, "exact", "")
        detail = f"mean width {mean:.2f}; the formats of all layers were chosen together."
        return _entry(layer, job, choice, "resolved", detail)
    widths = sorted({c.width for c in choices})
    if mean > widths[-1]:
        return _entry(layer, job, None, "rounded_up", f"mean width {mean:.2f}, above the widest, {widths[-1]}.")
    got = next(w for w in widths if w >= mean - _EXACT)
    why = f"widths that {name} has here: {', '.join(map(str, widths))}."
    choice = next(c for c in choices if c.width == got)
    if three:
        return _entry(layer, job, choice, "rounded_up", f"{name} has no codes of three levels; {why}")
    if low == high and got == low:
        return _entry(layer, job, choice, "exact", "")
    if low != high:
        return _entry(layer, job, choice, "collapsed_channels", f"channels differ, mean {mean:.2f}; {why}")
    return _entry(layer, job, choice, "rounded_up", why)


def least_cost(cost: np.ndarray, allowed: np.ndarray, ties: Sequence[Sequence[int]]) -> int:
    """The smallest total cost: tied layers share a choice that all of them have."""
    masked = np.where(allowed, cost, np.iinfo(np.int64).max // 2 // max(1, len(cost)))
    tied = {i for group in ties for i in group}
    alone = [i for i in range(len(cost)) if i not in tied]
    return int(masked[alone].min(axis=1).sum()) + sum(int(masked[list(g)].sum(axis=0).min()) for g in ties)


def _entry(layer: LayerSpec, job: ExportJob, choice: Choice | None, reason: str, detail: str) -> PlanEntry:
    widths = job.bit_map.weights[layer.name]
    return PlanEntry(
        layer=layer.name,
        asked=(int(widths.min()), int(widths.max())),
        will_get=FULL_PRECISION if choice is None else choice.width,
        reason=reason,
        detail=detail,
        choice="" if choice is None else choice.name,
    )
