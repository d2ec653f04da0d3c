"""SmoothQuant: factors that move magnitude from the columns of a layer's input to those of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable
from mpqsearch.errors import ConfigError
from mpqsearch.quant.rows import rows_of
from mpqsearch.quant.statistics import RowStatistics, Statistics


def smoothing_factors(rows: Tensor, input_max: Tensor, layer: LayerSpec, alpha: float = 0.5) -> Tensor:
    """Factor of every column ``[G, D]``: ``max|x|**a / max|w|**(1 - a)`` of its input channel (SmoothQuant at alpha
    ``a``; MPQ-DM: 0.5).

    Dead channels (no input, or no weight) get 1, where the released code of MPQ-DM divides by zero.
    """
    groups = layer.groups
    per_input = layer.weights_per_channel // (layer.n_inputs // groups)
    seen = rows.reshape(groups, len(rows) // groups, -1, per_input)
    # [G, inputs of a group]; no copy of the rows
    by_input = torch.maximum(seen.amax((1, 3)), -seen.amin((1, 3))).float()
    x = input_max.to(by_input).reshape(groups, -1)
    alive = (by_input > 1e-12) & (x > 1e-12)
    x, w = torch.where(alive, x, 1.0), torch.where(alive, by_input, 1.0)
    factor = (x / w).sqrt() if alpha == 0.5 else x.pow(alpha) / w.pow(1 - alpha)
    return factor.repeat_interleave(per_input, dim=1)


def stored_factors(rows: Tensor, input_max: Tensor, layer: LayerSpec, alpha: float = 0.5) -> Tensor:
    """`smoothing_factors` ``[G, D]`` as they are stored: half precision."""
    return smoothing_factors(rows, input_max, layer, alpha).half().float().clamp(2.0**-14, 2.0**14)


def known_factors(rows: Tensor, statistics: RowStatistics | None, layer: LayerSpec, alpha: float) -> Tensor:
    """`stored_factors` for a format that asks for them. Raises `ConfigError` when nothing is known of the input."""
    if statistics is None:
        raise ConfigError(f"{layer.name}: a smoothed format needs the input maxima of a profile")
    return stored_factors(rows, statistics.input_max, layer, alpha)


def by_row(factor: Tensor, rows: int) -> Tensor:
    """Factors ``[C, D]`` of every row from those of its group ``[G, D]``."""
    return factor.repeat_interleave(rows // len(factor), dim=0)


def scaled_moment(moment: Tensor, factor: Tensor) -> Tensor:
    """Second moment ``[G, D, D]`` of inputs over their smoothing factors ``[G, D]``."""
    return moment / (factor[:, :, None] * factor[:, None, :]).to(moment)


def input_factors(layer: LayerSpec, factor: Tensor) -> Tensor:
    """Smoothing factors by input channel ``[inputs]`` from those by column ``[G, D]``."""
    per_input = layer.weights_per_channel // (layer.n_inputs // layer.groups)
    return factor.reshape(layer.groups, -1, per_input)[:, :, 0].flatten()


def along_input(layer: LayerSpec, factor: Tensor, x: Tensor) -> Tensor:
    """Factors ``[inputs]`` in a shape that multiplies an input ``x`` of the layer."""
    return factor if layer.kind == "Linear" else factor.view(-1, *(1,) * (x.dim() - 2))


def smooth_inputs(module: nn.Module, table: LayerTable, bit_map: BitMap, statistics: Statistics) -> dict[str, Tensor]:
    """Factors ``[inputs]`` of the layers whose activations are quantized and whose format smooths: what
    `RangeCollector` divides by. Raises `ConfigError` without the statistics of such a layer."""
    modules: dict[str, Any] = dict(module.named_modules())
    out = {}
    for name, bits in bit_map.activations.items():
        fmt = bit_map.format_of(name)
        if bits == FULL_PRECISION or not fmt.smooth:
            continue
        rows = rows_of(modules[name].weight.detach().float(), table[name])
        out[name] = input_factors(table[name], known_factors(rows, statistics.get(name), table[name], fmt.alpha))
    return out
