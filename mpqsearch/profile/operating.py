"""Sensitivity at an operating point: what a layer's width changes *given the widths of all the others*.

First order at full precision is right at 6-8 bits and loses the order of maps at 2-4, where errors interact. At a
quantized model the error of the final sample has a slope: with ``r`` the difference to the full-precision sample and
``J`` the derivative of the sampler,

    |r + J dW|^2 - |r|^2  =  2 r'J dW + |J dW|^2

for every candidate ``dW`` (quantized weight of another width minus the present one). The first term costs one backward
pass through the sampler for all layers and widths, is exact to first order and contains the interactions with all
present errors; the second is the Gauss-Newton curvature from random probes. Solving the integer program again with
these and measuring again is iterated linearisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpqsearch.core import BitMap, LayerTable, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.profile.final_probes import final_probes
from mpqsearch.profile.moments import blocks_within
from mpqsearch.quant import RowStatistics, quantize_model, rows_of
from mpqsearch.quant.tables import (
    RecomputedErrors,
    error_part,
    errors_again,
    held_bytes,
    joined_quantizers,
    width_quantizers,
)
from mpqsearch.sampling import SamplerSpec, sample


def remeasure(
    denoiser: Denoiser,
    table: LayerTable,
    profile: SensitivityProfile,
    bit_map: BitMap | Sequence[BitMap],
    sampler: SamplerSpec,
    seeds: Sequence[int],
    *,
    probes: int = 3,
    batch: int = 2,
    bias_correction: bool = True,
    checkpoint: bool = False,
    memory_limit: int | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> SensitivityProfile:
    """The profile with ``layer_operating_error`` measured at a bit map, or as a mean over several.

    bit_map
        Where to linearise; of several, which share one format, each gets its part of the seeds. Weights are rounded to
        nearest there, whatever the map says.
    seeds
        Trajectories: one sample each, ``batch`` at a time with ``probes`` backward passes through the sampler, the
        first along the residual. Standard errors are over batches.
    memory_limit
        Bytes that the weight errors of all candidates may take; where they take more they are made again at every
        probe, some rows at a time. The gradient of one layer has to fit, too; beside that there is a quantized copy of
        the model.

    ``calibration`` of the result holds ``operating_points`` (digests) and ``operating_mse`` (the measured error of
    their final samples). Raises `ConfigError` when there are fewer seeds than maps, or the maps differ in format.
    """
    maps = [bit_map] if isinstance(bit_map, BitMap) else list(bit_map)
    if not maps or len(seeds) < len(maps):
        raise ConfigError(f"measuring at {len(maps)} bit maps needs at least one seed each, got {len(seeds)}")
    fmt = maps[0].format
    if any(m.format != fmt for m in maps) or any(m.formats for m in maps):
        raise ConfigError("the bit maps of one operating point must share one quantizer format")
    variant = f"{fmt.scheme}+smooth" if fmt.smooth else fmt.scheme
    means = {n: torch.from_numpy(np.array(m)) for n, m in profile.means.items()}
    input_max = {n: torch.from_numpy(np.array(m)) for n, m in profile.input_max.items()}
    hold = memory_limit is None or held_bytes(table, 2 * len(profile.widths)) <= memory_limit
    blocks = blocks_within(denoiser.module, table, 2 * len(profile.widths), memory_limit)
    candidates = _candidates(denoiser, table, profile.widths, fmt, means, input_max, blocks, hold=hold)
    no_shift = means if bias_correction else {n: torch.zeros_like(m) for n, m in means.items()}
    changes: list[NDArray[np.float64]] = []
    errors: list[float] = []
    sizes: list[int] = []
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress("operating point", done, len(seeds))

    for number, one in enumerate(maps):
        part = seeds[number :: len(maps)]
        # Errors of other widths are those of nearest rounding, and so is the point that they are compared with.
        nearest = replace(one, format=replace(fmt, rounding="nearest"))
        quantized = quantize_model(
            denoiser.module, table, nearest, means=means if bias_correction else None, input_max=input_max
        )
        reference = sample(denoiser, part, sampler)
        found = final_probes(
            denoiser.with_module(quantized.module),
            table,
            sampler,
            part,
            {variant: _moves(denoiser.module, quantized.module, table, candidates, blocks, hold=hold)},
            no_shift,
            probes=probes,
            batch=batch,
            reference=reference,
            along_residual=True,
            checkpoint=checkpoint,
            tick=tick,
        )
        effect = found.effect[variant].sum(1, dtype=np.float64).reshape(-1, probes, *found.effect[variant].shape[2:])
        length = found.residual.reshape(-1, probes)[:, 0].astype(np.float64)
        counts = found.samples.reshape(-1, probes)[:, 0]
        pixels = counts * reference[0].numel()
        slope = (2 * length / pixels)[:, None, None] * effect[:, 0]
        changes.extend(slope + np.square(effect[:, 1:]).mean(1) if probes > 1 else slope)
        errors.extend(np.square(length) / pixels)
        sizes.extend(counts)
    stacked = np.array(changes)
    mean = np.average(stacked, axis=0, weights=sizes)
    spread = stacked.std(0, ddof=1) / np.sqrt(len(stacked)) if len(stacked) > 1 else np.zeros_like(stacked[0])
    return replace(
        profile,
        arrays={
            **profile.arrays,
            f"layer_operating_error/{variant}": mean.astype(np.float32),
            f"layer_operating_std_error/{variant}": spread.astype(np.float32),
        },
        calibration={
            **profile.calibration,
            "operating_points": [m.digest for m in maps],
            "operating_mse": float(np.average(errors, weights=sizes)),
        },
    )


def _candidates(
    denoiser: Denoiser,
    table: LayerTable,
    widths: tuple[int, ...],
    fmt: QuantFormat,
    means: Mapping[str, Tensor],
    input_max: Mapping[str, Tensor],
    blocks: Mapping[str, Sequence[slice]],
    *,
    hold: bool,
) -> Mapping[str, Tensor]:
    """Quantized minus full-precision rows ``[W, C, D]`` of every layer."""
    scales, held = {}, {}
    known = {
        la.name: RowStatistics(
            second_moment=torch.zeros(0), mean=means[la.name], input_max=input_max[la.name], n_positions=0
        )
        for la in table
    }
    for layer in table:
        weight: Any = denoiser.module.get_submodule(layer.name).weight
        parts = [width_quantizers(weight, layer, widths, fmt, known[layer.name], part) for part in blocks[layer.name]]
        scales[layer.name] = joined_quantizers([q for q, _ in parts])
        if hold:
            held[layer.name] = torch.cat([error for _, error in parts], 1)

    def again(name: str, part: slice) -> Tensor:
        weight: Any = denoiser.module.get_submodule(name).weight
        return errors_again(weight, table[name], scales[name], fmt, known[name], part)

    return held if hold else RecomputedErrors(list(table.by_name), again, blocks.__getitem__)


def _moves(
    full: nn.Module,
    now: nn.Module,
    table: LayerTable,
    candidates: Mapping[str, Tensor],
    blocks: Mapping[str, Sequence[slice]],
    *,
    hold: bool,
) -> Mapping[str, Tensor]:
    """Candidate minus present rows ``[W, C, D]`` of every layer."""

    def move(name: str, part: slice) -> Tensor:
        before: Any = full.get_submodule(name).weight
        present: Any = now.get_submodule(name).weight
        mine, was = (rows_of(w.detach(), table[name])[part].float() for w in (present, before))
        return error_part(candidates, name, part) - (mine - was)

    names = list(table.by_name)
    if hold:
        return {name: move(name, slice(0, table[name].n_channels)) for name in names}
    return RecomputedErrors(names, move, blocks.__getitem__)
