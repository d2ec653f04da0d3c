"""Smoothing for weights and inputs that are quantized together: its alpha, layer by layer.

Measured with the quantizers that are deployed, on the inputs that the layers of the full-precision model see while it
samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.models.hooks import layer_input
from mpqsearch.profile import columns_of
from mpqsearch.profile.calibrate import run_sampler
from mpqsearch.quant import RowStatistics, Statistics, quantize_weight, rows_of, search_range

ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Alphas of smoothing that `choose_alphas` tries."""

POSITIONS = 256
"""Positions of a layer's input that each call of the denoiser gives to `choose_alphas`."""


@torch.no_grad()
def choose_alphas(
    denoiser: Denoiser,
    table: LayerTable,
    bit_map: BitMap,
    *,
    statistics: Statistics,
    seeds: Sequence[int] = range(1_000_000, 1_000_008),
    alphas: Sequence[float] = ALPHAS,
    zero_points: bool = False,
) -> BitMap:
    """``bit_map`` with the alpha of smoothing that suits each layer: the least output error of weights and inputs
    quantized together.

    Searched for layers whose input is quantized and whose format smooths; the others keep what they have. Every call of
    the denoiser is a timestep with a range of its own. (Weighting channels by their sensitivity, or leaving out the
    mean error, chose no better.)

    Takes one run of the sampler for each alpha, and the memory of the smoothed weights once. Alphas take no storage:
    they only say how the factors, which are stored, were made. Raises `ConfigError` when no layer has both, or an alpha
    is not in 0..1.
    """
    wanted = [
        la.name
        for la in table
        if bit_map.format_of(la.name).smooth and bit_map.activations.get(la.name, FULL_PRECISION) != FULL_PRECISION
    ]
    if not wanted:
        raise ConfigError("choose_alphas: no layer of the bit map has both smoothing and a quantized input")
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    errors: dict[str, list[float]] = {name: [] for name in wanted}
    for alpha in alphas:
        trials = {
            name: _Trial(
                table[name],
                modules[name],
                replace(bit_map, formats={name: replace(bit_map.format_of(name), alpha=alpha)}),
                statistics[name],
                zero_points,
            )
            for name in wanted
        }
        handles = [
            modules[name].register_forward_pre_hook(trial.see, with_kwargs=True) for name, trial in trials.items()
        ]
        try:
            run_sampler(denoiser, seeds, f"smoothing at {alpha:g}")
        finally:
            for handle in handles:
                handle.remove()
        for name, trial in trials.items():
            errors[name].append(trial.error)
    best = {name: alphas[min(range(len(e)), key=e.__getitem__)] for name, e in errors.items()}
    formats = {name: replace(bit_map.format_of(name), alpha=a) for name, a in best.items() if a != bit_map.format.alpha}
    return replace(bit_map, formats={**bit_map.formats, **formats})


class _Trial:
    """One layer at one alpha: ``error`` is the sum of its squared output error over what it has seen."""

    def __init__(
        self, layer: LayerSpec, module: nn.Module, bit_map: BitMap, known: RowStatistics, zero_points: bool
    ) -> None:
        self._layer, self._zero_points = layer, zero_points
        self._bits = bit_map.activations[layer.name]
        weight: Any = module.weight
        widths = torch.from_numpy(bit_map.channel_widths(layer.name, layer.n_channels).copy())
        stored = quantize_weight(weight, layer, widths, bit_map.format_of(layer.name), known)
        assert stored.factor is not None
        self._factor = stored.factor[:, None, :]
        shape = (layer.groups, layer.n_channels // layer.groups, -1)
        self._exact = rows_of(weight.float(), layer).reshape(shape).transpose(1, 2)
        self._quantized = stored.rows().reshape(shape).transpose(1, 2)
        self.error = 0.0

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook of the layer."""
        x = layer_input(args, kwargs).detach().float()
        columns = columns_of(x, module, self._layer)
        # Evenly over samples and places; an odd stride so that it does not follow the rows of an image.
        columns = columns[:, :: max(1, columns.shape[1] // POSITIONS) | 1]
        scaled = columns / self._factor
        scale, zero = search_range(scaled, self._bits, zero_points=self._zero_points)
        top = 2**self._bits - 1
        seen = (scaled / scale).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale).mul_(self._factor)
        error = torch.bmm(seen, self._quantized).sub_(torch.bmm(columns, self._exact))
        self.error += float(error.square_().sum(dtype=torch.float64))
