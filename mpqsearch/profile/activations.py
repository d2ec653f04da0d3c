"""Ranges of activations on the sampler's own trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import BitMap, LayerTable, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.profile.inputs import QuantizedInputCollector
from mpqsearch.quant import (
    ActivationQuantizer,
    ActivationSearch,
    ActivationTable,
    RangeCollector,
    RowStatistics,
    rows_of,
    smooth_inputs,
    width_errors,
)
from mpqsearch.quant.smoothing import input_factors, stored_factors
from mpqsearch.sampling import SamplerSpec, labels_of, noise_of, trajectory


def calibrate_activations(
    denoiser: Denoiser,
    table: LayerTable,
    bit_map: BitMap,
    sampler: SamplerSpec,
    *,
    seeds: Sequence[int] = range(1_000_000, 1_000_008),
    input_max: Mapping[str, Tensor] | None = None,
    search: ActivationSearch | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ActivationTable:
    """Scales for the activation widths of ``bit_map``, searched on what the layers of the full-precision model see
    while it samples.

    By timestep of the sampler (TALSQ) when the map counts more than one scale a layer (``activation_steps``), else
    static.

    seeds
        Trajectories, of ``sampler.steps`` steps each, with its guidance.
    input_max
        Largest magnitude of each input channel, layer -> ``[inputs]``; needed where the format of the map smooths.

    Memory: 8 kB a layer, times the steps. Raises `ConfigError` when the map has no activation widths, or counts other
    steps than the sampler takes.
    """
    if not bit_map.activations:
        raise ConfigError("the bit map has no activation widths: there is nothing to calibrate")
    if bit_map.activation_steps not in (1, sampler.steps):
        raise ConfigError(
            f"the bit map counts {bit_map.activation_steps} activation scales a layer, the sampler takes "
            f"{sampler.steps} steps; give the map "
            "one a step, or 1 for static scales"
        )
    collector = collect_ranges(
        denoiser,
        table,
        sampler,
        seeds=seeds,
        per_timestep=bit_map.activation_steps > 1,
        layers=bit_map.activations,
        factors=smooth_inputs(denoiser.module, table, bit_map, input_max),
        progress=progress,
    )
    return collector.table(bit_map.activations, search)


def collect_ranges(
    denoiser: Denoiser,
    table: LayerTable,
    sampler: SamplerSpec,
    *,
    seeds: Sequence[int],
    per_timestep: bool = False,
    layers: Mapping[str, int] | None = None,
    factors: Mapping[str, Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> RangeCollector:
    """Histograms of the inputs of layers over trajectories: one collection gives the scales of any widths
    (`RangeCollector.table`).

    A denoiser with recorded calls is run on those, and not with the sampler.
    """
    collector = RangeCollector(denoiser.module, table, layers=layers, per_timestep=per_timestep, factors=factors)
    with torch.no_grad(), collector:
        run_sampler(denoiser, sampler, seeds, "calibrate activations", progress)
    return collector


def run_sampler(
    denoiser: Denoiser,
    sampler: SamplerSpec,
    seeds: Sequence[int],
    label: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Sample for the sake of hooks on the layers: the trajectories of ``seeds``, or the denoiser's recorded calls where
    it has any."""
    report = progress or (lambda _label, _done, _total: None)
    for done, call in enumerate(denoiser.calls, start=1):
        call.replay(denoiser.module)
        report(label, done, len(denoiser.calls))
    if len(denoiser.calls):
        return
    device = next(denoiser.module.parameters()).device
    done, total = 0, -(-len(seeds) // sampler.batch) * sampler.steps
    for start in range(0, len(seeds), sampler.batch):
        part = seeds[start : start + sampler.batch]
        cond = labels_of(denoiser, part)
        cond = cond.to(device) if isinstance(cond, Tensor) else cond
        for _ in trajectory(denoiser, noise_of(part, denoiser.sample_shape).to(device), cond, sampler):
            done += 1
            report(label, done, total)


def activation_arrays(
    denoiser: Denoiser,
    table: LayerTable,
    sampler: SamplerSpec,
    seeds: Sequence[int],
    widths: tuple[int, ...],
    act_bits: tuple[int, ...],
    smoothed: QuantFormat | None,
    stats: Mapping[str, RowStatistics],
    gain: Mapping[str, Tensor],
    report: Callable[[str, int, int], None],
) -> dict[str, NDArray[Any]]:
    """``layer_activation_error`` at ``widths``, and ``quantized_input_error`` of the smoothed format at
    ``act_bits``."""
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    ranges = collect_ranges(denoiser, table, sampler, seeds=seeds, progress=report)
    noise = {b: ranges.table(dict.fromkeys(table.by_name, b)).error for b in widths}
    through = {
        la.name: float(gain[la.name] @ rows_of(modules[la.name].weight, la).double().square().sum(1).cpu())
        for la in table
    }
    per_layer = [[float(noise[b][la.name]) * through[la.name] for b in widths] for la in table]
    arrays: dict[str, NDArray[Any]] = {"layer_activation_error": np.array(per_layer, dtype=np.float32)}
    if smoothed is None:
        return arrays
    factors = {}
    for la in table:
        rows = rows_of(modules[la.name].weight.float(), la)
        factors[la.name] = input_factors(la, stored_factors(rows, stats[la.name].input_max, la))
    ranges = collect_ranges(denoiser, table, sampler, seeds=seeds, factors=factors, progress=report)
    for act in act_bits:
        found = ranges.table(dict.fromkeys(table.by_name, act))
        quantizers = {
            la.name: ActivationQuantizer(la, act, found.scale[la.name], found.zero[la.name], None, factors[la.name]).to(
                modules[la.name].weight.device
            )
            for la in table
        }
        collector = QuantizedInputCollector(denoiser.module, table, quantizers)
        with torch.no_grad(), collector:
            run_sampler(denoiser, sampler, seeds, f"inputs at {act} bits", report)
        columns = []
        for la in table:
            weight = modules[la.name].weight
            errors = width_errors(weight, la, widths, smoothed, stats[la.name])
            columns.append(collector.errors(la, rows_of(weight.float(), la), errors))
        arrays[f"quantized_input_error/asymmetric+smooth@a{act}"] = torch.cat(columns).float().cpu().numpy()
    return arrays
