"""The Lagrangian dual: the best lower bound that multipliers of the budgets can prove.

The dual is a concave piecewise linear function of one multiplier per budget. One evaluation is a pass over the tables
and gives a value and a supergradient. A small linear program over the planes so far proposes the next multipliers
inside a trust region (Kelley, "The cutting-plane method for solving convex programs", 1960). Limits on the number of
formats stay in: they ask for the least sum over all sets of so many formats, in every layer by itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import ilp
from mpqsearch.allocate.problem import Mask
from mpqsearch.allocate.tables import Tables, total_loss
from mpqsearch.errors import ConfigError

MAX_EVALUATIONS = 80
"""Passes that the ascent may take; two or three budgets need 20 to 45."""

TOLERANCE = 1e-9
"""Relative distance between the best value and the model of the planes at which the ascent ends."""

MAX_SUBSETS = 5_000
"""Sets of formats that one evaluation may try."""

KEPT_PATTERNS = 6
"""Different sets of formats, the last ones met, that are handed on as starts for a heuristic."""


@dataclass(frozen=True, slots=True, eq=False)
class FormatLimits:
    """Numbers of different formats that may be used in the model and inside one layer."""

    in_model: int
    in_layer: int


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The dual at some multipliers.

    Attributes:
        rates: The multipliers.
        value: The bound that they prove.
        choice: ``[r]`` minimizers.
        spent: Total of every budget under the minimizers.
        formats: ``[r, k]`` formats that every row may take under the best sets of formats; None without such limits.
    """

    rates: NDArray[np.float64]
    value: float
    choice: NDArray[np.int32]
    spent: tuple[int, ...]
    formats: Mask | None


@dataclass(frozen=True, slots=True, eq=False)
class Dual:
    """The best evaluation, and those with the last few different sets of formats (the best one first)."""

    best: Evaluation
    patterns: list[Evaluation]


def evaluate(tables: Tables, rates: NDArray[np.float64], few: FormatLimits | None) -> Evaluation:
    """One pass: value and minimizers of the Lagrangian at ``rates``."""
    priced = prices(tables, rates)
    formats = None if few is None else _best_formats(priced, tables.layer, few)
    if formats is not None:
        priced = np.where(formats, priced, np.inf)
    choice = np.argmin(priced, axis=1).astype(np.int32)
    spent = tables.spent(choice)
    over = np.array([used - limit for used, limit in zip(spent, tables.limits, strict=True)], dtype=np.float64)
    return Evaluation(rates, total_loss(tables.loss, choice) + float(rates @ over), choice, spent, formats)


def prices(tables: Tables, rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[r, k]`` loss + rates * costs."""
    priced = tables.loss.astype(np.float64)
    for cost, rate in zip(tables.costs, rates, strict=True):
        if rate:
            priced += rate * cost
    return priced


def _best_formats(priced: NDArray[np.float64], layer: NDArray[np.int64], few: FormatLimits) -> Mask:
    """``[r, k]``: the formats of the set with the least sum, for every row's layer."""
    k = priced.shape[1]
    subsets = list(combinations(range(k), few.in_layer))
    sums = np.array([np.bincount(layer, weights=priced[:, list(s)].min(axis=1)) for s in subsets])
    best, least = np.zeros(sums.shape[1], dtype=np.int64), np.inf
    for model in combinations(range(k), few.in_model):
        inside = np.array([i for i, s in enumerate(subsets) if set(s) <= set(model)])
        total = float(sums[inside].min(axis=0).sum())
        if total < least:
            best, least = inside[sums[inside].argmin(axis=0)], total
    member = np.zeros((len(subsets), k), dtype=bool)
    member[np.arange(len(subsets))[:, None], np.array(subsets)] = True
    mask: Mask = member[best[layer]]
    return mask


def format_limits(n_choices: int, in_model: int | None, in_layer: int | None) -> FormatLimits | None:
    """What ``max_formats`` and ``max_formats_per_layer`` limit; None when that is nothing.

    Raises:
        ConfigError: There are more sets of formats than can be tried.
    """
    most = min(in_model or n_choices, n_choices)
    inside = min(in_layer or most, most)
    if inside == n_choices:
        return None
    sets = comb(n_choices, inside) * (comb(n_choices, most) if inside < most else 1)
    if sets > MAX_SUBSETS:
        raise ConfigError(
            f"{inside} of {n_choices} formats can be chosen in {sets} ways, more than the {MAX_SUBSETS} that are "
            "tried. Offer fewer formats."
        )
    return FormatLimits(most, inside)


def maximize(tables: Tables, few: FormatLimits | None, tolerance: float = TOLERANCE, deadline: float = np.inf) -> Dual:
    """Multipliers of the best Lagrangian bound.

    Works in prices of a whole budget (rate * limit) divided by the range of the losses, so that neither the unit of a
    budget nor the size of the losses matters to the linear program.
    """
    zero = np.zeros(len(tables.limits))
    best = evaluate(tables, zero, few)
    patterns = [best]
    scale = _loss_range(tables)
    if scale < float(np.finfo(np.float64).tiny):  # all choices lose the same: no multiplier can raise the bound
        return Dual(best, patterns)
    unit = scale / np.maximum(np.array(tables.limits, dtype=np.float64), 1.0)
    centre, radius = zero, 1.0
    planes = [_plane(best, tables.limits, centre, scale)]
    for _ in range(MAX_EVALUATIONS):
        point, model = ilp.maximize_planes(planes, np.maximum(centre - radius, 0.0), centre + radius)
        promised = model - best.value / scale
        at_edge = bool((point >= centre + radius * (1 - 1e-9)).any()) or bool(
            ((point > 0) & (point <= centre - radius * (1 - 1e-9))).any()
        )
        small = promised <= tolerance * abs(best.value) / scale
        if time.perf_counter() > deadline or (small and not at_edge):
            break
        if small:  # nothing more in this box: look in a wider one
            radius *= 4.0
            continue
        new = evaluate(tables, point * unit, few)
        planes.append(_plane(new, tables.limits, point, scale))
        _remember(patterns, new)
        gained = (new.value - best.value) / scale
        if gained <= 0:
            radius /= 2
            continue
        centre, best = point, new
        radius *= 2.0 if at_edge and gained > promised / 4 else 1.0
    return Dual(best, patterns)


def _remember(patterns: list[Evaluation], new: Evaluation) -> None:
    """Keep one evaluation for each of the last few sets of formats, the latest first."""
    same = [p for p in patterns if p.formats is None or new.formats is None or bool((p.formats == new.formats).all())]
    for pattern in same:
        patterns.remove(pattern)
    patterns.insert(0, new)
    del patterns[KEPT_PATTERNS:]


def _loss_range(tables: Tables) -> float:
    """Largest sum of losses minus the smallest, over permitted choices: no multiplier needs to buy more than this."""
    largest = np.where(np.isfinite(tables.loss), tables.loss, -np.inf).max(axis=1).astype(np.float64)
    return float((largest - tables.loss.min(axis=1)).sum())


def _plane(
    at: Evaluation, limits: tuple[int, ...], point: NDArray[np.float64], scale: float
) -> tuple[float, NDArray[np.float64]]:
    """Value at zero and slope of the dual's tangent plane, in the scaled prices."""
    slope = np.array([(s - limit) / max(limit, 1) for s, limit in zip(at.spent, limits, strict=True)], dtype=np.float64)
    return at.value / scale - float(slope @ point), slope
