"""What a test says of the inputs of layers, and scales of activations from a few samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpqsearch.profile import collect_ranges, scales_of
from mpqsearch.quant import ActivationTable, RowStatistics, Statistics, smooth_inputs

if TYPE_CHECKING:
    from mpqsearch.core import BitMap, LayerTable
    from mpqsearch.models import Denoiser


def known(
    *,
    means: Mapping[str, Tensor] | None = None,
    input_max: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> dict[str, RowStatistics]:
    """Statistics with what is given of each layer."""
    parts = [given or {} for given in (moments, means, input_max)]
    names = dict.fromkeys(n for part in parts for n in part)
    fields = ("second_moment", "mean", "input_max")
    return {
        n: RowStatistics(**{f: part.get(n, torch.empty(0)) for f, part in zip(fields, parts, strict=True)})
        for n in names
    }


def calibrated(
    denoiser: Denoiser,
    table: LayerTable,
    bit_map: BitMap,
    *,
    seeds: Sequence[int] = range(1_000_000, 1_000_008),
    statistics: Statistics | None = None,
    zero_points: bool = False,
) -> ActivationTable:
    """Scales for the activation widths of a map, from samples of the model."""
    ranges = collect_ranges(
        denoiser,
        table,
        seeds=seeds,
        per_timestep=bit_map.activation_steps > 1,
        layers=bit_map.static_inputs(table),
        factors=smooth_inputs(denoiser.module, table, bit_map, statistics or {}),
    )
    return scales_of(ranges, table, bit_map, zero_points=zero_points)
