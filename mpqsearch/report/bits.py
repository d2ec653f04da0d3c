"""Where a bit map puts its bits: over layers and channels, and over depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from numpy.typing import NDArray

from mpqsearch.core import FULL_PRECISION, ROLES, BitMap, LayerTable, Policy
from mpqsearch.core.formats import WIDTHS
from mpqsearch.report.style import COLOURS, axes_or_new, ink

MAX_LABELS = 120
"""Above so many layers only some are labelled: text below five points helps nobody."""

_FULL = len(WIDTHS) + 1  # the class after the widths: full precision
_HATCHES = ("", "///", "...", "xxx")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatmapInfo:
    """``widths`` ``[L, Q]``: the width at each quantile of a layer's channels, sorted; ``fixed`` ``[L]``: held by the
    policy.

    ``channels`` ``[L]`` counts the output channels of each layer, so that a quantile can be read as channels.
    """

    layers: tuple[str, ...]
    widths: NDArray[np.uint8]
    channels: tuple[int, ...]
    fixed: tuple[bool, ...]


def bits_heatmap_info(
    table: LayerTable, bit_map: BitMap, policy: Policy | None = None, quantiles: int = 64
) -> HeatmapInfo:
    """Widths of every layer at ``quantiles`` evenly spaced channels, after sorting the channels of a layer by width.

    Raises `LayerMismatchError` when the map is for another model.
    """
    bit_map.validate(table)
    at = (np.arange(quantiles) + 0.5) / quantiles
    rows = []
    for layer in table:
        widths = np.sort(bit_map.channel_widths(layer.name, layer.n_channels))
        rows.append(widths[(at * len(widths)).astype(int)])
    return HeatmapInfo(
        layers=tuple(la.name for la in table),
        widths=np.stack(rows),
        channels=tuple(la.n_channels for la in table),
        fixed=tuple(policy is not None and policy.fixed_width(la) is not None for la in table),
    )


def plot_bits_heatmap(info: HeatmapInfo, ax: Axes | None = None) -> Axes:
    """One row per layer in forward order, channels sorted by width from left to right; fixed layers carry a lock mark.

    Draws on ``ax`` (default: a new figure as high as the layers need) and returns it.
    """
    n = len(info.layers)
    ax = axes_or_new(ax, (7.2, min(1.1 + 0.17 * n, 24.0)))
    image = ax.imshow(
        np.where(info.widths == FULL_PRECISION, _FULL, info.widths),
        aspect="auto",
        interpolation="nearest",
        cmap=_width_colours(),
        norm=BoundaryNorm(np.arange(0.5, _FULL + 1), _FULL),
        extent=(0, 100, n - 0.5, -0.5),
    )
    step = -(-n // MAX_LABELS)
    labels = [f"{name}{'  (fixed)' if fixed else ''}" for name, fixed in zip(info.layers, info.fixed, strict=True)]
    ax.set_yticks(range(0, n, step), labels[::step], fontsize=7 if n > 20 else 8)
    for i, fixed in enumerate(info.fixed):
        if fixed:
            ax.axhspan(i - 0.5, i + 0.5, facecolor="none", edgecolor="black", hatch="////", linewidth=0, alpha=0.45)
    ax.grid(visible=False)
    ax.set_xlabel("output channels of the layer, sorted by width (%)")
    bar = ax.figure.colorbar(image, ax=ax, ticks=range(1, _FULL + 1), pad=0.02, fraction=0.04, aspect=30)
    bar.ax.set_yticklabels([*map(str, WIDTHS), "full"])
    bar.set_label("bits")
    return ax


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthInfo:
    """Per layer in forward order, all ``[L]``: mean, smallest and largest width, parameters, and role."""

    layers: tuple[str, ...]
    roles: tuple[str, ...]
    mean: NDArray[np.float64]
    low: NDArray[np.uint8]
    high: NDArray[np.uint8]
    weights: NDArray[np.int64]
    fixed: tuple[bool, ...]


def bits_by_depth_info(table: LayerTable, bit_map: BitMap, policy: Policy | None = None) -> DepthInfo:
    """Mean width of each layer's weights. Raises `LayerMismatchError` when the map is for another model."""
    bit_map.validate(table)
    widths = [bit_map.channel_widths(la.name, la.n_channels) for la in table]
    return DepthInfo(
        layers=tuple(la.name for la in table),
        roles=tuple(la.role for la in table),
        mean=np.array([w.mean() for w in widths]),
        low=np.array([w.min() for w in widths], dtype=np.uint8),
        high=np.array([w.max() for w in widths], dtype=np.uint8),
        weights=np.array([la.n_weights for la in table], dtype=np.int64),
        fixed=tuple(policy is not None and policy.fixed_width(la) is not None for la in table),
    )


def plot_bits_by_depth(info: DepthInfo, ax: Axes | None = None) -> Axes:
    """A bar per layer in forward order: height the mean width, breadth the share of the weights, colour and hatch the
    role.

    A thin line spans the widths inside a layer. Draws on ``ax`` (default: a new figure) and returns it.
    """
    ax = axes_or_new(ax, (7.2, 3.4))
    ends = np.cumsum(info.weights) / info.weights.sum() * 100
    starts = np.r_[0.0, ends[:-1]]
    styles = _role_styles(info.roles)
    for i, role in enumerate(info.roles):
        colour, hatch = styles[role]
        ax.bar(
            starts[i],
            info.mean[i],
            width=ends[i] - starts[i],
            align="edge",
            color=colour,
            hatch=hatch,
            edgecolor=ax.get_facecolor(),
            linewidth=0.4,
        )
        if info.low[i] != info.high[i]:
            ax.vlines((starts[i] + ends[i]) / 2, info.low[i], info.high[i], color=ink(), linewidth=0.9)
    ax.set_xlim(0, 100)
    ax.set_ylim(0, max(8.5, float(info.high.max()) + 0.5))
    ax.set_xlabel("depth: share of the weights, from the input to the output (%)")
    ax.set_ylabel("bits (mean; line: range)")
    handles = [Patch(facecolor=c, hatch=h, edgecolor=ax.get_facecolor(), label=role) for role, (c, h) in styles.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=6)
    return ax


def _width_colours() -> ListedColormap:
    """Viridis, whose lightness rises with the width, so that it reads in grey and with every colour vision; grey: not
    quantized."""
    return ListedColormap([*colormaps["viridis"](np.linspace(0, 1, len(WIDTHS))), (0.6, 0.6, 0.6, 1.0)])


def _role_styles(roles: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and hatch by role, the same in every figure whatever roles it has."""
    every = {r: (COLOURS[i % len(COLOURS)], _HATCHES[i // len(COLOURS)]) for i, r in enumerate(ROLES)}
    return {r: every[r] for r in ROLES if r in set(roles)}
