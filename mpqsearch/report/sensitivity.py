"""What the profile measured: what the layers lose at each width, and when they are sensitive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mpqsearch.core import LayerTable, SensitivityProfile
from mpqsearch.errors import UnknownNameError
from mpqsearch.methods import best_loss, channel_losses
from mpqsearch.report.figures import Drawing
from mpqsearch.report.style import COLOURS, MARKERS, MUTED, axes_or_new, legend_below

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLosses:
    """``loss`` ``[L, W]`` of each layer at each width; ``label`` says what it is, ``name`` is one of
    `mpqsearch.methods.LOSSES` and ``format_name`` the format."""

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    loss: Floats
    name: str
    format_name: str
    label: str

    def worst(self, n: int) -> list[int]:
        """The ``n`` layers with the largest loss at any width, largest first."""
        return [int(i) for i in np.argsort(-self.loss.max(axis=1), kind="stable")[:n]]


def layer_losses(profile: SensitivityProfile, table: LayerTable, format_name: str = "") -> LayerLosses:
    """The loss by which widths are chosen, of every layer if it alone is quantized, with bias correction.

    That is the best loss that the profile holds (`mpqsearch.methods.best_loss`). ``format_name`` is one of the formats
    of the profile (default: ``auto`` if it was measured, else the first). Raises `UnknownNameError` for another one.
    """
    formats = profile.formats or tuple(sorted({k.split("/")[1] for k in profile.arrays if "/" in k}))
    chosen = format_name or ("auto" if "auto" in formats else next(iter(formats), ""))
    if chosen not in formats:
        raise UnknownNameError("format of the profile", chosen, formats)
    name = best_loss(profile)
    loss = profile.layer_sum(channel_losses(profile, table, chosen, name, bias_correction=name != "weight"))
    what = "squared weight error" if name == "weight" else f"predicted loss ({name})"
    return LayerLosses(
        layers=profile.names,
        widths=profile.widths,
        loss=loss,
        name=name,
        format_name=chosen,
        label=f"{what}, format {chosen}",
    )


def plot_sensitivity(losses: LayerLosses, worst: int = 8, ax: Axes | None = None) -> Axes:
    """Loss against width, a line per layer, log y; the ``worst`` layers in colour and named, the rest grey.

    Draws on ``ax`` (default: a new figure) and returns it.
    """
    ax = axes_or_new(ax, (5.4, 4.8))
    ax.set_yscale("log", nonpositive="mask")
    widths, loss = np.array(losses.widths), losses.loss
    named = losses.worst(worst)
    for i in range(len(losses.layers)):
        if i not in named:
            ax.plot(widths, loss[i], color=MUTED, alpha=0.35, linewidth=0.8, zorder=1)
    for rank, i in enumerate(named):
        colour, marker = COLOURS[rank % len(COLOURS)], MARKERS[rank % len(MARKERS)]
        line = "-" if rank < len(COLOURS) else "--"
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": line,
            "markersize": 4.5,
            "linewidth": 1.5,
        }
        ax.plot(widths, loss[i], label=losses.layers[i], zorder=2, **style)
    ax.set_xticks(widths)
    ax.set_xlabel("bits of the layer, all others at full precision")
    ax.set_ylabel(losses.label)
    legend_below(ax, columns=2, title=f"largest of {len(losses.layers)} layers")
    return ax


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeInfo:
    """Mean sensitivity ``[L, B]`` of the channels of each layer in each of B equal parts of a run, noise first; NaN
    where nothing was probed. ``edges`` ``[B + 1]`` are the ends of the parts in percent."""

    layers: tuple[str, ...]
    sensitivity: Floats
    edges: tuple[int, ...]


def sensitivity_over_time(profile: SensitivityProfile) -> TimeInfo:
    """Sensitivity over depth and time. Raises `ConfigError` when the profile holds none."""
    steps = profile.need("step_sensitivity", "the picture of sensitivity over time").astype(np.float64)
    mean = profile.layer_sum(steps) / np.array(profile.channels, dtype=np.float64)[:, None]
    return TimeInfo(
        layers=profile.names,
        sensitivity=np.where(mean > 0, mean, np.nan),
        edges=tuple(int(e) for e in np.linspace(0, 100, steps.shape[1] + 1).round()),
    )


def profile_drawing(profile: SensitivityProfile, table: LayerTable, format_name: str = "") -> Drawing:
    """The figure of a profile."""
    losses = layer_losses(profile, table, format_name)
    worst = ", ".join(losses.layers[i] for i in losses.worst(5))
    return Drawing(
        key="profile_sensitivity",
        section="profile",
        title="Sensitivity",
        caption=f"{losses.label[0].upper()}{losses.label[1:]}, of one layer at a time against its width.",
        alt=f"Line chart of {losses.label} against bits for {len(losses.layers)} layers. Most sensitive: {worst}.",
        draw=lambda: plot_sensitivity(losses),
    )
