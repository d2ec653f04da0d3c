"""Allocation over a target's own formats: its true stored cost, its shape limits, and the error of its own
quantizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import AllocationProblem, AllocationResult, CostBudget, PairwiseTerms, solve
from mpqsearch.core import (
    FULL_PRECISION,
    BitMap,
    LayerSpec,
    LayerTable,
    Policy,
    QuantFormat,
    SensitivityProfile,
    StoredBits,
    size_bits,
    stored_total,
)
from mpqsearch.errors import InfeasibleBudgetError
from mpqsearch.export.contract import AS_PLANNED, ExportJob
from mpqsearch.export.plan import least_cost
from mpqsearch.export.target import Target
from mpqsearch.methods import BEST_LOSS, channel_losses
from mpqsearch.methods.shrinkage import FLOOR
from mpqsearch.specs.targets import FULL

if TYPE_CHECKING:
    from torch import Tensor, nn

Floats = NDArray[np.float64]

_TINY = 1e-300  # a layer without any error has the nearest width that has none, too


@dataclass(frozen=True, kw_only=True)
class TargetAllocation:
    """A map made for one target: ``choices`` names the format of every quantized layer, ``bit_map`` holds their nominal
    widths.

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
            "stored_bits": asdict(self.stored),
            "size_bits": self.stored.total,
            "limit": self.limit,
            "within_budget": self.stored.total <= self.limit,
            "predicted_loss": self.loss,
            "bit_map_digest": self.bit_map.digest,
        }
        if self.result is not None:
            data |= {"status": self.result.status, "solver": self.result.solver}
            if np.isfinite(self.result.gap):  # no bound, no gap
                data["gap"] = float(self.result.gap)
        return data


def formats_of(target: Target, table: LayerTable) -> tuple[str, ...]:
    """All formats that the target has for any layer, by width and name; the columns of `target_errors`."""
    formats = {(c.width, c.name) for layer in table for c in target.choices(layer)}
    return tuple(name for _, name in sorted(formats))


def target_errors(
    target: Target, table: LayerTable, module: nn.Module, fmt: QuantFormat | None = None
) -> dict[str, Tensor]:
    """Weight errors ``[formats, channels, fan-in]`` of every layer in every format of `formats_of`, zero where it has
    none.

    Targets that round by themselves and can be asked (`Target.round_trip`) give their own errors; others that
    derive their scales get those of minimum and maximum; the rest keep our codes, in the asymmetric scheme with the
    range search of ``fmt``.
    """
    formats = formats_of(target, table)
    modules: dict[str, Any] = dict(module.named_modules())
    return {la.name: _layer_errors(target, la, modules[la.name].weight, formats, fmt or QuantFormat()) for la in table}


def target_squares(
    target: Target, table: LayerTable, weights: Callable[[str], Tensor], fmt: QuantFormat | None = None
) -> dict[str, Floats]:
    """Squared weight errors ``[formats, channels]`` of every layer in every format of `formats_of`.

    Layers are looked at one after another and nothing runs, so this works for any model of which ``weights`` gives the
    weight of a layer by its name.
    """
    formats, ours = formats_of(target, table), fmt or QuantFormat()

    def squares(layer: LayerSpec) -> Floats:
        errors = _layer_errors(target, layer, weights(layer.name), formats, ours)
        squared: Floats = errors.double().square().sum(-1).cpu().numpy()
        return squared

    return {la.name: squares(la) for la in table}


def target_losses(squared: Mapping[str, Floats], table: LayerTable, profile: SensitivityProfile) -> dict[str, Floats]:
    """Loss ``[formats]`` of every layer in every format, from a profile and the target's own `target_squares`.

    A channel's loss is its own squared weight error in that format, times what the profile found a unit of squared
    weight error of that channel to cost (the best loss that the profile has, see `mpqsearch.methods.best_loss`; from a
    profile of the weights alone, one) at the width whose error in the layer is nearest. Without a layer's loss in the
    profile: full cost, zero loss.
    """
    scheme = "asymmetric" if "asymmetric" in profile.formats else profile.formats[0]
    losses = {}
    priced = channel_losses(profile, table, scheme, BEST_LOSS, bias_correction=False)
    squares = profile.need(f"weight_error/{scheme}", "a map for a target").astype(np.float64)
    for layer in table:
        rows, own = profile.rows(layer.name), squared[layer.name]
        unit = np.divide(
            priced[rows], squares[rows], out=np.zeros_like(squares[rows]), where=squares[rows] > 0
        )  # [C, W]
        distance = np.abs(np.log(own.sum(1)[:, None] + _TINY) - np.log(squares[rows].sum(0)[None] + _TINY))
        losses[layer.name] = (unit.T[distance.argmin(1)] * own).sum(1)
    return losses


def shrunk_losses(losses: Mapping[str, Floats], squared: Mapping[str, Floats], shrinkage: float) -> dict[str, Floats]:
    """Losses ``[formats]`` in which the price of a unit of squared weight error of each layer is shrunk, in its
    logarithm, towards one price for all: 0 leaves `target_losses`, 1 leaves the squared errors of `target_squares`.

    A layer that seems to cost nothing keeps its errors, so that no solver takes it for free.
    """
    totals = {n: np.maximum(own.sum(1), _TINY) for n, own in squared.items()}
    prices = {n: losses[n] / total for n, total in totals.items()}
    positive = np.concatenate([p[p > 0] for p in prices.values()] or [np.ones(1)])
    middle = float(np.exp(np.log(positive).mean())) if positive.size else 1.0
    return {
        n: total * middle * (np.where(prices[n] > 0, prices[n], middle * FLOOR) / middle) ** (1 - shrinkage)
        for n, total in totals.items()
    }


def probed_losses(
    effect: Floats, table: LayerTable, *, coupling: float = 0.5
) -> tuple[dict[str, Floats], PairwiseTerms]:
    """Losses ``[formats]`` of every layer, and losses of pairs of layers, from probes of the final sample.

    effect
        ``[K, L, F]``: what the target's own error of layer ``l`` in format ``f`` adds to the K random projections of
        the final sample (`mpqsearch.profile.projected_effects` without bias correction, given the errors of
        `target_errors`).
    coupling
        Share of the interactions that is believed, 0..1. To first order the error of a map is ``E (sum_l effect[:, l,
        f_l])**2``: its squares are the losses of the layers, twice its products those of the pairs. A product has the
        noise of K probes whatever it is, and a solver looks for the ones that the noise made negative; 0.5 was the best
        on other seeds than those probed, at the sizes of Q4_0 and Q5_0 together (studies/gguf).
    """
    effect = np.concatenate(
        [effect, np.zeros((*effect.shape[:2], 1))], axis=2
    )  # full precision is the last column, without error
    first, second = np.triu_indices(len(table), 1)
    products = np.einsum("kpa,kpb->pab", effect[:, first], effect[:, second], optimize=True) / len(effect)
    losses = {la.name: np.square(effect[:, i, :-1]).mean(0) for i, la in enumerate(table)}
    return losses, PairwiseTerms(first=first, second=second, value=2 * coupling * products)


def allocate_for(
    target: Target,
    table: LayerTable,
    losses: Mapping[str, Sequence[float] | Floats],
    limit: int,
    policy: Policy | None = None,
    *,
    fmt: QuantFormat | None = None,
    pairs: PairwiseTerms | None = None,
    at_least_smallest: bool = False,
) -> TargetAllocation:
    """The formats of least total loss whose file takes no more than ``limit`` bits, headers apart: solved exactly.

    ``losses`` gives, for each layer, the loss of every format of `formats_of`; full precision costs nothing and is
    offered too, as the last choice. ``pairs`` add losses of pairs of layers (see `probed_losses`); what was found is
    then not always proven to be the best. ``policy`` fixes and bounds layers by role or name: a fixed layer takes the
    format of that width, or full precision where the target has none. Layers of a group share their format, and so do
    those that are one layer in the file. Raises `InfeasibleBudgetError`, with the smallest attainable size, when
    nothing fits; with ``at_least_smallest`` the smallest file is made instead.
    """
    table.require_same_names(set(losses), "the losses")
    formats = (*formats_of(target, table), FULL)
    shape = (len(table), len(formats))
    loss, cost, allowed = np.zeros(shape), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    by_name = [{c.name: c for c in target.choices(layer)} for layer in table]
    policy = policy or Policy(roles={})
    joint = {f"{target.name} {i}": names for i, names in enumerate(target.tied(table))}
    policy = replace(policy, groups={**policy.groups, **joint})
    rules = policy.resolve(table)
    for i, layer in enumerate(table):
        fixed = rules.fixed.get(layer.name)
        offered = [
            c for c in by_name[i].values() if (rules.allows(layer.name, c.width) if fixed is None else c.width == fixed)
        ]
        for choice in offered:
            j = formats.index(choice.name)
            loss[i, j] = max(0.0, float(losses[layer.name][j]))
            cost[i, j], allowed[i, j] = target.cost(layer, choice).total, True
        whole = fixed is None and rules.allows(layer.name, FULL_PRECISION)
        cost[i, -1], allowed[i, -1] = target.cost(layer, None).total, whole or not offered
    other = target.kept_bits * sum(k.n_values for k in table.kept)
    ties = [[table.index[n] for n in group] for group in policy.groups_of(table)]
    groups = np.full(len(table), -1)
    for number, tied in enumerate(ties):
        groups[tied] = number
    least = least_cost(cost, allowed, ties) + other
    if least > limit:
        if not at_least_smallest:
            raise InfeasibleBudgetError(
                f"the budget allows {limit} bits ({limit // 8} bytes); the smallest file of {target.name} takes "
                f"{least} "
                f"({-(-least // 8)} bytes). Layers that it cannot quantize stay at {target.full_bits} bits."
            )
        limit = least
    names = [la.name for la in table]
    problem = AllocationProblem(
        loss=loss,
        budgets=(CostBudget(name="bits", cost=cost, limit=limit - other),),
        allowed=allowed,
        groups=groups,
        names=names,
        choices=list(formats),
        pairwise=pairs,
    )
    result = solve(problem)
    picked = {la.name: formats[j] for la, j in zip(table, result.choice, strict=True)}
    separate = float(loss[np.arange(len(table)), result.choice].sum())
    return allocation_of(target, table, picked, limit=limit, loss=separate, result=result, fmt=fmt)


def allocation_of(
    target: Target,
    table: LayerTable,
    picked: Mapping[str, str],
    *,
    limit: int | None = None,
    loss: float = 0.0,
    result: AllocationResult | None = None,
    fmt: QuantFormat | None = None,
) -> TargetAllocation:
    """An allocation from the name of a format for every layer; it is costed from the names."""
    choices = {la.name: target.choice_of(la, "" if picked[la.name] == FULL else picked[la.name]) for la in table}
    widths = {n: FULL_PRECISION if c is None else c.width for n, c in choices.items()}
    stored = stored_total(table, {la.name: target.cost(la, choices[la.name]) for la in table}, target.kept_bits)
    return TargetAllocation(
        target=target.name,
        bit_map=BitMap(
            model_digest=table.digest,
            weights={n: np.array(w, dtype=np.uint8) for n, w in widths.items()},
            format=fmt or QuantFormat(),
        ),
        choices={n: c.name for n, c in choices.items() if c is not None},
        stored=stored,
        limit=stored.total if limit is None else limit,
        loss=loss,
        result=result,
    )


def uniform_maps(
    target: Target, table: LayerTable, policy: Policy | None = None, *, fmt: QuantFormat | None = None
) -> dict[str, TargetAllocation]:
    """A map for each format of the target, by its name: every layer that can take it does, and the rest is at full
    precision. Layers that ``policy`` fixes take the format of that width. Layers that are one in the file and differ in
    what they can take are left to `Target.plan`."""
    fixed = {} if policy is None else policy.resolve(table).fixed

    def picked(layer: LayerSpec, name: str) -> str:
        width = fixed.get(layer.name)
        fits = (c.name for c in target.choices(layer) if (c.name == name if width is None else c.width == width))
        return next(fits, FULL)

    names = dict.fromkeys(c.name for la in table for c in target.choices(la))  # preferred ones of a width first
    return {n: allocation_of(target, table, {la.name: picked(la, n) for la in table}, fmt=fmt) for n in names}


def resolve_job(
    target: Target,
    job: ExportJob,
    losses: Callable[[], tuple[Mapping[str, Floats], PairwiseTerms | None]],
    policy: Policy,
    fmt: QuantFormat | None = None,
) -> ExportJob:
    """A job whose map was made for something else, with the target's formats solved for anew at the size that the map
    has with all that is stored; where the target has no file that small, at the size of its smallest.

    What ``policy`` fixes stays fixed, and layers that the map leaves at full precision stay there. A job with choices,
    a map that the target holds, and targets that hold every width are left as they are; only else ``losses`` is asked.
    """
    if job.choices or target.granularity == "channel" or all(e.reason in AS_PLANNED for e in target.plan(job)):
        return job
    if target.asks_itself:
        target.require()
    full = {n: FULL_PRECISION for n, w in job.bit_map.weights.items() if int(w.min()) == FULL_PRECISION}
    policy = replace(policy, overrides={**full, **policy.overrides})
    separate, pairs = losses()
    solved = allocate_for(
        target,
        job.table,
        separate,
        size_bits(job.table, job.bit_map),
        policy,
        fmt=fmt,
        pairs=pairs,
        at_least_smallest=True,
    )
    return replace(job, choices={name: solved.choices.get(name, FULL) for name in job.table.by_name})


def _layer_errors(target: Target, layer: LayerSpec, weight: Tensor, formats: Sequence[str], fmt: QuantFormat) -> Tensor:
    """Weight errors ``[formats, channels, fan-in]`` of one layer."""
    import torch

    from mpqsearch.quant import rows_of
    from mpqsearch.quant.tables import row_errors

    ours = replace(fmt, scheme="asymmetric", smooth=False, criterion="minmax" if target.rerounds else fmt.criterion)
    weight = weight.detach().float().cpu()
    rows = rows_of(weight, layer)
    errors = torch.zeros(len(formats), *rows.shape)
    for choice in target.choices(layer):
        error = (
            rows_of(target.round_trip(weight, layer, choice), layer) - rows
            if target.rounds
            else row_errors(weight, layer, choice.width, ours, None)
        )
        errors[formats.index(choice.name)] = error
    return errors
