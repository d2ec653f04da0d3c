"""Ranges of activations on what the runner calls the denoiser with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import BitMap, LayerTable, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.profile.calibrate import rehearse, run_sampler
from mpqsearch.profile.inputs import QuantizedInputCollector
from mpqsearch.profile.partial import Arrays
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import (
    ActivationQuantizer,
    ActivationTable,
    RangeCollector,
    RowStatistics,
    rows_of,
    width_errors,
)
from mpqsearch.quant.smoothing import input_factors, stored_factors
from mpqsearch.specs import CalibrationSpec


def scales_of(
    ranges: RangeCollector, table: LayerTable, bit_map: BitMap, *, zero_points: bool = False
) -> ActivationTable:
    """The scales that a map asks for, from collected ranges. Raises `ConfigError` when it counts others."""
    found = ranges.table(bit_map.static_inputs(table), zero_points=zero_points)
    if found.steps != bit_map.activation_steps:
        raise ConfigError(
            f"the bit map counts {bit_map.activation_steps} activation scales a layer, but the model is called with "
            f"{found.steps} different timesteps: allocate again with a profile of this sampler, or use static scales"
        )
    return found


@torch.no_grad()
def collect_ranges(
    denoiser: Denoiser,
    table: LayerTable,
    *,
    seeds: Sequence[int],
    per_timestep: bool = False,
    layers: Mapping[str, int] | None = None,
    factors: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> RangeCollector:
    """Histograms of the inputs of layers over trajectories: one collection gives the scales of any widths
    (`RangeCollector.table`)."""
    rehearse(denoiser)
    collector = RangeCollector(denoiser.module, table, layers=layers, per_timestep=per_timestep, factors=factors)
    with collector:
        run_sampler(denoiser, seeds, "calibrate activations", progress)
    return collector


@torch.no_grad()
def activation_arrays(
    denoiser: Denoiser,
    table: LayerTable,
    spec: CalibrationSpec,
    widths: tuple[int, ...],
    smooth: QuantFormat | None,
    statistics: Mapping[str, RowStatistics],
    sensitivity: NDArray[np.float32],
    progress: Progress = silent,
) -> Arrays:
    """``layer_activation_error`` at ``widths``, and ``quantized_input_error`` of the format ``smooth`` (None: left out)
    at ``spec.activation_bits``."""
    seeds = range(spec.first_seed, spec.first_seed + spec.samples)
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    weights = {la.name: rows_of(modules[la.name].weight.float(), la) for la in table}
    ranges = collect_ranges(denoiser, table, seeds=seeds, progress=progress)
    arrays = {"layer_activation_error": _noise(ranges, table, widths, weights, sensitivity)}
    if smooth is None:
        return arrays
    factors = {
        la.name: input_factors(la, stored_factors(weights[la.name], statistics[la.name].input_max, la)) for la in table
    }
    ranges = collect_ranges(denoiser, table, seeds=seeds, factors=factors, progress=progress)
    for bits in spec.activation_bits:
        quantizers = _input_quantizers(ranges, table, bits, factors, weights)
        collector = QuantizedInputCollector(denoiser.module, table, quantizers)
        with collector:
            run_sampler(denoiser, seeds, f"inputs at {bits} bits", progress)
        columns = []
        for la in table:
            errors = width_errors(modules[la.name].weight, la, widths, smooth, statistics[la.name])
            columns.append(collector.errors(la, weights[la.name], errors).float().cpu())
        arrays[f"quantized_input_error/asymmetric+smooth@a{bits}"] = torch.cat(columns).numpy()
    return arrays


def _noise(
    ranges: RangeCollector,
    table: LayerTable,
    widths: tuple[int, ...],
    weights: Mapping[str, Tensor],
    sensitivity: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Effect ``[L, W]`` of quantizing each layer's input: its mean squared error times ``sum_c sensitivity_c
    |w_c|**2``."""
    noise = {b: ranges.table(dict.fromkeys(table.by_name, b)).error for b in widths}
    parts = np.split(sensitivity.astype(np.float64), np.cumsum([la.n_channels for la in table])[:-1])
    through = [
        float(part @ weights[la.name].double().square().sum(1).cpu().numpy())
        for la, part in zip(table, parts, strict=True)
    ]
    rows = [[float(noise[b][la.name]) * t for b in widths] for la, t in zip(table, through, strict=True)]
    return np.array(rows, dtype=np.float32)


def _input_quantizers(
    ranges: RangeCollector, table: LayerTable, bits: int, factors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, ActivationQuantizer]:
    found = ranges.table(dict.fromkeys(table.by_name, bits))
    return {
        la.name: ActivationQuantizer(la, bits, found.scale[la.name], found.zero[la.name], None, factors[la.name]).to(
            weights[la.name].device
        )
        for la in table
    }
