"""A search that starts from a map that somebody else chose: the point of the space whose maps are nearest to it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpqsearch.core import BitMap, Budget, average_bits
from mpqsearch.errors import InfeasibleBudgetError
from mpqsearch.search.space import Space, Value
from mpqsearch.search.surrogate import Surrogate


def start_point(surrogate: Surrogate, space: Space, bit_map: BitMap) -> dict[str, Value]:
    """Active parameters at which the integer program gives roles and depths the bits that ``bit_map`` gives them.

    Where a loss falls by four a bit, a layer whose loss is multiplied by ``4**d`` gets ``d`` bits more of an optimal
    map. So the multiplier of a role is four to the mean difference between the widths of ``bit_map`` and those of the
    plain program at the same size, weighted by weights; what is left is fitted by a slope over depth. Values are held
    inside the ranges of the space. The plain point, with the granularity of the map, when the program cannot have that
    size.
    """
    point = space.default_point()
    active = {d.name: d for d in space.active}
    if "granularity" in active and active["granularity"].holds(bit_map.granularity):
        point["granularity"] = bit_map.granularity
    table = surrogate.table
    try:
        plain = surrogate.candidate({}, Budget(quantity="average_bits", limit=average_bits(table, bit_map))).bit_map
    except InfeasibleBudgetError:
        return point
    layers = [la for la in table if surrogate.policy.fixed_width(la) is None]
    weights = np.array([la.n_weights for la in layers], dtype=np.float64)
    place = np.linspace(0.0, 1.0, len(table))[
        [i for i, la in enumerate(table) if surrogate.policy.fixed_width(la) is None]
    ]
    more = np.array([float(bit_map.weights[la.name].mean()) - float(plain.weights[la.name].mean()) for la in layers])
    for role in {la.role for la in layers}:
        name, own = f"role_{role}", np.array([la.role == role for la in layers])
        if name in active:
            shift = float(np.average(more[own], weights=weights[own]))
            point[name] = _held(active[name].low, 4.0**shift, active[name].high)
            more[own] -= shift
    if "depth" in active and len(layers) > 1:
        centred = place - np.average(place, weights=weights)
        slope = float((weights * centred * more).sum() / (weights * centred**2).sum())
        point["depth"] = _held(active["depth"].low, 2.0 * slope, active["depth"].high)
    return point


def with_start(points: list[dict[str, Value]], start: Mapping[str, Value]) -> list[dict[str, Value]]:
    """The points to try first, with ``start`` behind the plain one."""
    return [*points[:1], dict(start), *points[1:]]


def _held(low: float, value: float, high: float) -> float:
    return float(min(max(low, value), high))
