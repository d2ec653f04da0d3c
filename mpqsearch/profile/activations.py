"""Ranges of activations on the sampler's own trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mpqsearch.core import BitMap, LayerTable
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.quant import ActivationSearch, ActivationTable, RangeCollector, prescale_inputs
from mpqsearch.sampling import SamplerSpec, labels_of, noise_of, trajectory


def calibrate_activations(
    denoiser: Denoiser,
    table: LayerTable,
    bit_map: BitMap,
    sampler: SamplerSpec,
    *,
    seeds: Sequence[int] = range(1_000_000, 1_000_008),
    per_timestep: bool = False,
    input_max: Mapping[str, Tensor] | None = None,
    search: ActivationSearch | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ActivationTable:
    """Scales for the activation widths of ``bit_map``, searched on what the layers of the full-precision model see while it samples.

    seeds
        Trajectories, of ``sampler.steps`` steps each, with its guidance.
    per_timestep
        Scales by timestep of the sampler (TALSQ), else one static scale a layer.
    input_max
        Largest magnitude of each input channel, layer -> ``[inputs]``; needed where the format of the map pre-scales.

    Memory: 8 kB a layer, times the steps with ``per_timestep``. Raises `ConfigError` when the map has no activation widths.
    """
    if not bit_map.activations:
        raise ConfigError("the bit map has no activation widths: there is nothing to calibrate")
    collector = collect_ranges(
        denoiser,
        table,
        sampler,
        seeds=seeds,
        per_timestep=per_timestep,
        layers=bit_map.activations,
        factors=prescale_inputs(denoiser.module, table, bit_map, input_max),
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
    """Histograms of the inputs of layers over trajectories: one collection gives the scales of any widths (`RangeCollector.table`)."""
    device = next(denoiser.module.parameters()).device
    done, total = 0, -(-len(seeds) // sampler.batch) * sampler.steps
    collector = RangeCollector(denoiser.module, table, layers=layers, per_timestep=per_timestep, factors=factors)
    with torch.no_grad(), collector:
        for start in range(0, len(seeds), sampler.batch):
            part = seeds[start : start + sampler.batch]
            cond = labels_of(denoiser, part)
            cond = cond.to(device) if isinstance(cond, Tensor) else cond
            for _ in trajectory(denoiser, noise_of(part, denoiser.sample_shape).to(device), cond, sampler):
                done += 1
                if progress is not None:
                    progress("calibrate activations", done, total)
    return collector
