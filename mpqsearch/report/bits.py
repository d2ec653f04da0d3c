"""Where a bit map puts its bits: over depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from numpy.typing import NDArray

from mpqsearch.core import ROLES, BitMap, LayerTable
from mpqsearch.core.shown import shortened
from mpqsearch.report.style import COLOURS, INK, PAGE, axes_or_new

NAMED_SHARE = 2.5
"""Layers with this share of the weights or more are named on the axis (%); the names of the others would collide."""

NAME = 28
"""Characters of the name of a layer on an axis."""

_HATCHES = ("", "///", "...", "xxx")
_ROLE_STYLES = {r: (COLOURS[i % len(COLOURS)], _HATCHES[i // len(COLOURS)]) for i, r in enumerate(ROLES)}
"""Colour and hatch by role, the same in every figure whatever roles it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthInfo:
    """Per layer in forward order, all ``[L]``: mean, smallest and largest width, parameters, and role."""

    layers: tuple[str, ...]
    roles: tuple[str, ...]
    mean: NDArray[np.float64]
    low: NDArray[np.uint8]
    high: NDArray[np.uint8]
    weights: NDArray[np.int64]


def bits_by_depth_info(table: LayerTable, bit_map: BitMap) -> DepthInfo:
    """Widths of each layer's weights. Raises `LayerMismatchError` when the map is for another model."""
    bit_map.validate(table)
    widths = [bit_map.channel_widths(la.name, la.n_channels) for la in table]
    return DepthInfo(
        layers=tuple(la.name for la in table),
        roles=tuple(la.role for la in table),
        mean=np.array([w.mean() for w in widths]),
        low=np.array([w.min() for w in widths], dtype=np.uint8),
        high=np.array([w.max() for w in widths], dtype=np.uint8),
        weights=np.array([la.n_weights for la in table], dtype=np.int64),
    )


def plot_bits_by_depth(info: DepthInfo, ax: Axes | None = None) -> Axes:
    """A bar per layer in forward order: height the mean width, breadth the share of the weights, colour and hatch the
    role.

    A thin line spans the widths inside a layer; broad layers are named. Draws on ``ax`` (default: a new figure) and
    returns it.
    """
    ax = axes_or_new(ax, (10.0, 4.0))
    breadth = info.weights / info.weights.sum() * 100
    middle = np.cumsum(breadth) - breadth / 2
    colours, hatches = zip(*(_ROLE_STYLES[r] for r in info.roles), strict=True)
    ax.bar(middle, info.mean, breadth, color=colours, hatch=hatches, edgecolor=PAGE, linewidth=0.4)
    mixed = info.low != info.high
    ax.vlines(middle[mixed], info.low[mixed], info.high[mixed], color=INK, linewidth=0.9)
    ax.set_xlim(0, 100)
    ax.set_ylim(0, max(8.5, float(info.high.max()) + 0.5))
    ax.set_yticks(range(0, int(ax.get_ylim()[1]) + 1, 1 if info.high.max() <= 8 else 2))
    named = np.flatnonzero(breadth >= NAMED_SHARE)
    ax.set_xticks(middle[named], [shortened(info.layers[i], NAME) for i in named], rotation=90, fontsize=6)
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("layers from the input to the output, each as broad as its share of the weights")
    ax.set_ylabel("bits")
    roles = {r: _ROLE_STYLES[r] for r in ROLES if r in info.roles}
    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor=PAGE, label=r) for r, (colour, hatch) in roles.items()]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(roles))
    return ax
