"""A cheap profile for those who choose widths of whole layers: one forward and one backward pass a calibration batch.

The gradient of a random projection ``v . f`` over a batch has, for a weight error E, the expectation ``E <E, dW>**2 =
sum_i ||J_i E||**2`` over the samples of the batch, whose projections are independent (``f`` in the weights of
`Weighing`). So one backward pass prices every
layer at every width in every format. Nothing is measured of single channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable, QuantFormat
from mpqsearch.models import Denoiser
from mpqsearch.models.calls import Call
from mpqsearch.profile.calibrate import Calibration, collected, run_sampler
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.profile.partial import Arrays
from mpqsearch.profile.probing import layer_arrays
from mpqsearch.profile.recomputed import error_part, error_rows
from mpqsearch.profile.tables import WeightErrors, errors_within, shift_of
from mpqsearch.profile.taps import GradientTap, checkpointed
from mpqsearch.profile.weighing import weighing_of
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import width_errors
from mpqsearch.sources import kind_of
from mpqsearch.specs import CalibrationSpec

BATCH = 4
"""Samples in one backward pass: more of them cost less each, fewer give more observations."""


@dataclass
class _Observations:
    """What every backward pass gave: uncorrected effects ``[W]`` by (layer, format), bias gradients ``[C]``."""

    errors: WeightErrors
    n_widths: int
    effects: list[dict[tuple[str, str], Tensor]] = field(default_factory=list)
    bias: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, name: str, rows: Tensor, bias: Tensor, _square: Tensor) -> None:
        """Take the gradient of a layer in the present backward pass."""
        self.bias[-1][name] = bias
        for fmt, effect in self.errors.effects(name, rows, bias).items():
            self.effects[-1][name, fmt] = effect[0]

    def squares(self, shifts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, NDArray[np.float64]]:
        """Squared effects ``[n, 2, L, W]`` by format, the second after bias correction with ``shifts``."""
        table = self.errors.table
        out = {}
        for fmt in self.errors.formats:
            out[fmt] = np.zeros((len(self.effects), 2, len(table), self.n_widths))
            for n, (effects, biases) in enumerate(zip(self.effects, self.bias, strict=True)):
                for i, layer in enumerate(table):
                    if (layer.name, fmt) in effects:
                        plain, shift = effects[layer.name, fmt].double(), shifts[fmt].get(layer.name)
                        corrected = plain if shift is None else plain - (shift @ biases[layer.name].to(shift)).double()
                        out[fmt][n, :, i] = torch.stack([plain, corrected]).square().cpu().numpy()
        return out


def layer_scores(
    denoiser: Denoiser,
    table: LayerTable,
    widths: tuple[int, ...],
    formats: Mapping[str, QuantFormat],
    spec: CalibrationSpec,
    progress: Progress = silent,
    *,
    blocks: Mapping[str, Sequence[slice]] | None = None,
) -> tuple[Arrays, Calibration]:
    """``layer_probe_error`` and its kin of `layer_arrays`, with the means and ranges of inputs. Standard errors are
    over backward passes. Formats with smoothing are left out: their errors depend on inputs that are not known yet.

    With ``blocks``, slices of the rows of each layer, weight errors are made again in every backward pass, those of one
    slice at a time; without, all are held, which takes the memory of the model for every width of every format.

    Raises `NumericsError` when the output is not finite.
    """
    plain = {name: fmt for name, fmt in formats.items() if not fmt.smooth}
    errors = {name: _errors(denoiser, table, widths, fmt, blocks) for name, fmt in plain.items()}
    seen = _Observations(WeightErrors(table, errors), len(widths))
    seeds = range(spec.first_seed, spec.first_seed + spec.samples)
    weighing, times = weighing_of(denoiser, seeds), list[float]()
    generator = torch.Generator().manual_seed(spec.seed)

    def take(calls: list[Call], predictions: list[Tensor]) -> None:
        output = weighing.checked(denoiser, calls, predictions)
        v = torch.randn(output.shape, generator=generator).to(output)
        times.extend(call.timestep for call in calls if not kind_of(call.part))
        seen.effects.append({})
        seen.bias.append({})
        tap.backward((v * output).sum(), seen.add)

    with (
        checkpointed(denoiser.module, spec.checkpoint),
        InputCollector(denoiser.module, table, second_moments=False) as collector,
        GradientTap(denoiser.module, table) as tap,
        torch.enable_grad(),
    ):
        run_sampler(denoiser, seeds, "layer scores", progress, take=weighing.by_step(take), batch=BATCH)
    calibration = collected(denoiser, table, collector, times)
    biased = [la for la in table if la.has_bias]
    shifts = {fmt: {la.name: _shift(e, la, calibration.means[la.name]) for la in biased} for fmt, e in errors.items()}
    return layer_arrays("layer_probe", seen.squares(shifts)), calibration


def _errors(
    denoiser: Denoiser,
    table: LayerTable,
    widths: tuple[int, ...],
    fmt: QuantFormat,
    blocks: Mapping[str, Sequence[slice]] | None,
) -> Mapping[str, Tensor]:
    """Weight errors ``[W, C, D]`` by layer, held or made again at every look."""
    if blocks is not None:
        return errors_within(denoiser, table, widths, fmt, blocks)
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    return {la.name: width_errors(modules[la.name].weight, la, widths, fmt, None) for la in table}


def _shift(errors: Mapping[str, Tensor], layer: LayerSpec, mean: Tensor) -> Tensor:
    """`shift_of` ``[W, C]`` of all rows of a layer, in the slices in which its errors are looked at."""
    parts = error_rows(errors, layer)
    return torch.cat([shift_of(error_part(errors, layer.name, part), layer, mean, part) for part in parts], 1)
