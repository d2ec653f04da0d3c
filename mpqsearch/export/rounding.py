"""From the widths of a map to the widths that a target has, one per layer, with a reason for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpqsearch.allocate import AllocationProblem, solve
from mpqsearch.core import FULL_PRECISION, LayerSpec
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import ExportJob, PlanEntry

_EXACT = 1e-9  # a mean of widths that is this close to a width is that width


def plan_layers(job: ExportJob, target: str, widths: Sequence[int], kinds: Sequence[str]) -> list[PlanEntry]:
    """One entry per layer for a target with one width per layer, out of ``widths`` (ascending), for layers of ``kinds``.

    A layer whose channels differ stands for its mean width. ``up`` and ``down`` round layer by layer, to the nearest end where the
    target has nothing beyond. ``resolve`` chooses the widths of all layers together so that their codes take no more bits than the
    map gives them: if the map is the best for its size and each bit divides a layer's squared error by four, channel ``c`` has a
    loss in proportion to ``4**(asked_c - b)`` at width ``b``, and the knapsack over that is solved. A map that the target can hold
    comes back unchanged. ``error`` raises `ConfigError` at the first layer that the target cannot hold as asked.
    """
    entries = {la.name: _alone(la, job, target, widths, kinds) for la in job.table}
    if job.rounding == "resolve":
        free = [la for la in job.table if entries[la.name] is None]
        entries |= dict(zip([la.name for la in free], _resolve(free, job, widths), strict=True))
    plan = []
    for layer in job.table:
        entry = entries[layer.name]
        assert entry is not None
        if job.rounding == "error" and entry.reason not in ("exact", "kept_full_precision"):
            raise ConfigError(
                f"{target} cannot hold layer {layer.name!r} ({layer.kind}) at {entry.asked_text} bits: {entry.detail} "
                "Use --round resolve, up or down."
            )
        plan.append(entry)
    return plan


def _alone(layer: LayerSpec, job: ExportJob, target: str, widths: Sequence[int], kinds: Sequence[str]) -> PlanEntry | None:
    """The entry of a layer that is decided on its own; None when ``resolve`` decides it with the others."""
    asked = job.bit_map.channel_widths(layer.name, layer.n_channels)
    low, high, mean = int(asked.min()), int(asked.max()), float(asked.mean())
    if low == FULL_PRECISION:
        return _entry(layer, job, FULL_PRECISION, "kept_full_precision", "the map asks for full precision.")
    if layer.kind not in kinds:
        detail = f"{target} quantizes {' and '.join(kinds)} only; the layer stays at full precision."
        return _entry(layer, job, FULL_PRECISION, "unsupported_kind", detail)
    if mean > widths[-1]:
        return _entry(layer, job, FULL_PRECISION, "rounded_up", f"mean width {mean:.2f}, above the widest, {widths[-1]}.")
    if job.rounding == "resolve":
        return None
    above = [w for w in widths if w >= mean - _EXACT]
    below = [w for w in widths if w <= mean + _EXACT]
    got = below[-1] if job.rounding == "down" and below else above[0]
    return _rounded(layer, job, got, f"widths that {target} has: {', '.join(map(str, widths))}.", low == high, mean)


def _rounded(layer: LayerSpec, job: ExportJob, got: int, why: str, plain: bool, mean: float) -> PlanEntry:
    if plain and abs(got - mean) < _EXACT:
        return _entry(layer, job, got, "exact", "")
    if not plain:
        return _entry(layer, job, got, "collapsed_channels", f"channels differ, mean {mean:.2f}; {why}")
    return _entry(layer, job, got, "rounded_up" if got > mean else "rounded_down", why)


def _resolve(layers: Sequence[LayerSpec], job: ExportJob, widths: Sequence[int]) -> list[PlanEntry]:
    """Exact knapsack over the layers that the target quantizes, at the payload that the map gives them."""
    if not layers:
        return []
    asked = [job.bit_map.channel_widths(la.name, la.n_channels).astype(np.int64) for la in layers]
    choice = np.array(widths, dtype=np.int64)
    cost = np.array([la.n_weights for la in layers], dtype=np.int64)[:, None] * choice[None]
    loss = np.stack(
        [la.weights_per_channel * (4.0 ** (a[:, None] - choice[None])).sum(axis=0) for la, a in zip(layers, asked, strict=True)]
    )
    payload = sum(la.weights_per_channel * int(a.sum()) for la, a in zip(layers, asked, strict=True))
    limit = max(payload, int(cost[:, 0].sum()))  # a target without narrow widths may be unable to stay inside
    result = solve(AllocationProblem(loss=loss, cost=cost, limit=limit, ties=_ties(layers), names=[la.name for la in layers]))
    entries = []
    for layer, widths_asked, chosen in zip(layers, asked, result.choice, strict=True):
        got, plain, mean = int(choice[chosen]), bool((widths_asked == widths_asked[0]).all()), float(widths_asked.mean())
        exact = plain and got == int(widths_asked[0])
        detail = "" if exact else f"mean width {mean:.2f}; all layers were chosen together at the payload of the map."
        entries.append(_entry(layer, job, got, "exact" if exact else "resolved", detail))
    return entries


def _ties(layers: Sequence[LayerSpec]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        if layer.tie:
            groups.setdefault(layer.tie, []).append(i)
    return [g for g in groups.values() if len(g) > 1]


def _entry(layer: LayerSpec, job: ExportJob, got: int, reason: str, detail: str) -> PlanEntry:
    widths = job.bit_map.weights[layer.name]
    return PlanEntry(layer=layer.name, asked=(int(widths.min()), int(widths.max())), will_get=got, reason=reason, detail=detail)
