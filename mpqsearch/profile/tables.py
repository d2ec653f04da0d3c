"""What every output channel loses at every width, and the weight errors behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable, QuantFormat
from mpqsearch.models import Denoiser
from mpqsearch.profile.partial import Arrays, Partial, resumed
from mpqsearch.profile.recomputed import (
    RecomputedErrors,
    error_part,
    error_rows,
    joined_quantizers,
    slices_of,
)
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import RowQuantizer, RowStatistics, error_tables, kurtosis, rows_of, width_errors
from mpqsearch.quant.rows import row_summary
from mpqsearch.quant.tables import column_factors, errors_again, width_quantizers
from mpqsearch.specs import CalibrationSpec
from mpqsearch.specs.calibration import grouped

_SCRATCH = "scratch/"
"""How the names of arrays begin that a `Partial` keeps for a later run and that no profile holds."""


def formats_of(spec: CalibrationSpec, base: QuantFormat) -> dict[str, QuantFormat]:
    """The formats to measure, by name: ``<scheme>``, ``<scheme>+g<group>``, ``<scheme>+smooth``,
    ``asymmetric+smooth+minmax``."""
    plain = QuantFormat(criterion=base.criterion, p=base.p, n_candidates=base.n_candidates)
    formats = {scheme: replace(plain, scheme=scheme) for scheme in spec.schemes}
    by_group = (replace(formats[scheme], group=group) for scheme in grouped(spec.schemes) for group in spec.groups)
    formats |= {fmt.name: fmt for fmt in by_group}
    if spec.smooth:
        for scheme in dict.fromkeys((*spec.schemes, "asymmetric")):
            formats[f"{scheme}+smooth"] = replace(plain, scheme=scheme, smooth=True)
        minmax = replace(plain, scheme="asymmetric", smooth=True, criterion="minmax")
        formats["asymmetric+smooth+minmax"] = minmax
    return formats


def final_format(spec: CalibrationSpec) -> str:
    """The format of one layer at a time and of the maps at which slopes are measured: the last scheme."""
    return spec.schemes[-1]


@dataclass(frozen=True)
class WeightErrors:
    """Weight errors ``[W, C, D]`` by format and layer, held or made again at every look; and the ``shift`` ``[W, C]``
    of the layer's mean output that each causes, which bias correction takes out: zero for a layer without a bias."""

    table: LayerTable
    errors: Mapping[str, Mapping[str, Tensor]]
    shift: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats whose errors are known."""
        return tuple(self.errors)

    @property
    def held(self) -> bool:
        """Whether all errors are in memory."""
        return not any(isinstance(by_layer, RecomputedErrors) for by_layer in self.errors.values())

    def effects(self, name: str, rows: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """First-order effect ``[2, W]`` of the errors of a layer at every width, by format: first as they are, then
        with bias correction.

        rows, bias
            Gradient with respect to the weight ``[C, D]`` and the bias ``[C]``: ``<E, dW>`` and ``<E, dW - db m'>``.
        """
        return {fmt: torch.stack(self._pair(fmt, name, rows, bias)) for fmt in self.errors}

    def _pair(self, fmt: str, name: str, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        layer, by_layer = self.table[name], self.errors[fmt]
        parts = []
        for part in error_rows(by_layer, layer):
            error = error_part(by_layer, name, part)
            parts.append(error.flatten(1) @ rows[part].flatten().to(error))
        plain = torch.stack(parts).sum(0)
        shift = self.shift.get(fmt, {}).get(name)
        return plain, plain if shift is None else plain - shift.to(plain) @ bias.to(plain)


def shift_of(error: Tensor, layer: LayerSpec, mean: Tensor, part: slice = slice(None)) -> Tensor:
    """What weight errors ``[W, c, D]`` of some rows add to the mean of the layer's output ``[W, c]``, for the mean
    input ``[G, D]``."""
    rows_per_group = layer.n_channels // layer.groups
    groups = torch.arange(layer.n_channels, device=error.device)[part] // rows_per_group
    return (error * mean.to(error)[groups]).sum(2)


@torch.no_grad()
def tables_of(
    denoiser: Denoiser,
    table: LayerTable,
    widths: tuple[int, ...],
    formats: Mapping[str, QuantFormat],
    statistics: Callable[[LayerSpec], RowStatistics],
    progress: Progress = silent,
    *,
    blocks: Mapping[str, Sequence[slice]] | None = None,
    hold: bool = True,
    partial: Partial | None = None,
) -> tuple[Arrays, WeightErrors]:
    """Tables of every output channel, and the weight errors behind them for the formats without smoothing.

    ``statistics`` is called with the layers that ``partial`` does not have, in order; ``partial`` keeps tables and
    scales of a layer. ``blocks``: the slices of rows of each layer in which its errors are made (default: all at once).
    Without ``hold`` the errors are not kept: they are made again from their scales whenever they are looked at, the
    same bit for bit.
    """
    slices = blocks or {la.name: slices_of(la, la.n_channels) for la in table}
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    plain = [name for name, f in formats.items() if not f.smooth]
    held: dict[str, dict[str, Tensor]] = {name: {} for name in plain}
    scales: dict[str, dict[str, tuple[RowQuantizer, ...]]] = {name: {} for name in plain}
    shifts: dict[str, dict[str, Tensor]] = {name: {} for name in plain}
    tables: list[Arrays] = []

    def measure(layer: LayerSpec) -> Arrays:
        work = _LayerTables(modules[layer.name].weight, layer, widths, formats, statistics(layer))
        return work.measure(slices[layer.name])

    for position, layer in enumerate(table):
        weight: Tensor = modules[layer.name].weight
        arrays = resumed(partial, position, functools.partial(measure, layer))
        for name in plain:
            quantizers = _unpacked(arrays, formats[name], len(widths), weight.device)
            scales[name][layer.name] = quantizers
            if layer.has_bias:
                shifts[name][layer.name] = torch.from_numpy(arrays[f"{_SCRATCH}{name}/shift"]).to(weight.device)
            if hold:
                held[name][layer.name] = errors_again(weight, layer, quantizers, formats[name])
        tables.append({key: values for key, values in arrays.items() if not key.startswith(_SCRATCH)})
        progress("error tables", position + 1, len(table))

    joined = {key: np.concatenate([t[key] for t in tables]) for key in tables[0]}
    if hold:
        return joined, WeightErrors(table, held, shifts)
    again = {name: _again(denoiser, table, scales[name], formats[name], slices) for name in plain}
    return joined, WeightErrors(table, again, shifts)


@torch.no_grad()
def errors_within(
    denoiser: Denoiser,
    table: LayerTable,
    widths: tuple[int, ...],
    fmt: QuantFormat,
    blocks: Mapping[str, Sequence[slice]],
) -> RecomputedErrors:
    """Weight errors of a format without smoothing of which no more than those of a slice of ``blocks`` are in memory.

    The range search is done now, and its scales are kept."""
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    scales = {}
    for layer in table:
        weight = modules[layer.name].weight
        parts = [width_quantizers(weight, layer, widths, fmt, part=part)[0] for part in blocks[layer.name]]
        scales[layer.name] = joined_quantizers(parts)
    return _again(denoiser, table, scales, fmt, blocks)


def _again(
    denoiser: Denoiser,
    table: LayerTable,
    scales: Mapping[str, tuple[RowQuantizer, ...]],
    fmt: QuantFormat,
    blocks: Mapping[str, Sequence[slice]],
) -> RecomputedErrors:
    modules: dict[str, Any] = dict(denoiser.module.named_modules())

    def make(name: str, part: slice) -> Tensor:
        return errors_again(modules[name].weight, table[name], scales[name], fmt, part=part)

    return RecomputedErrors(list(table.by_name), make, blocks.__getitem__)


@dataclass(frozen=True)
class _LayerTables:
    """The tables of one layer, made some rows at a time."""

    weight: Tensor
    layer: LayerSpec
    widths: tuple[int, ...]
    formats: Mapping[str, QuantFormat]
    statistics: RowStatistics

    def measure(self, slices: Iterable[slice]) -> Arrays:
        """Tables float32, with the quantizers ``[W, C]`` of each format without smoothing and their mean shifts."""
        rows = rows_of(self.weight.detach(), self.layer)
        summary = row_summary(rows)
        parts: dict[str, list[Tensor]] = {"kurtosis": [summary.kurtosis], "weight_rms": [summary.rms]}
        quantizers: dict[str, list[tuple[RowQuantizer, ...]]] = {}
        for part in slices:
            for key, values in self._part(rows, part, quantizers).items():
                parts.setdefault(key, []).append(values)
        arrays = {
            key: torch.cat(values, int(key.startswith(_SCRATCH))).float().cpu().numpy() for key, values in parts.items()
        }
        return arrays | _packed({name: joined_quantizers(some) for name, some in quantizers.items()})

    def _part(
        self, rows: Tensor, part: slice, quantizers: dict[str, list[tuple[RowQuantizer, ...]]]
    ) -> dict[str, Tensor]:
        """Tables of some rows; the quantizers of these rows are added to ``quantizers``."""
        known = self.statistics if self.statistics.second_moment.numel() else None
        factor = column_factors(rows, self.layer, QuantFormat(smooth=True), self.statistics, part)
        assert factor is not None
        out = {"kurtosis_smoothed": kurtosis(rows[part].float() * factor)}
        for name, fmt in self.formats.items():
            if fmt.smooth:
                error = width_errors(self.weight, self.layer, self.widths, fmt, self.statistics, part)
            else:
                fitted, error = width_quantizers(self.weight, self.layer, self.widths, fmt, part=part)
                quantizers.setdefault(name, []).append(fitted)
                out[f"{_SCRATCH}{name}/shift"] = shift_of(error, self.layer, self.statistics.mean, part)
            out |= {f"{key}/{name}": values for key, values in error_tables(error, known).items()}
        return out


def _packed(quantizers: Mapping[str, tuple[RowQuantizer, ...]]) -> Arrays:
    """Quantizers as arrays ``[W, C]``."""
    return {
        f"{_SCRATCH}{name}/{key}": torch.stack([getattr(q, key) for q in by_width]).cpu().numpy()
        for name, by_width in quantizers.items()
        for key in ("scale", "zero", "bits")
    }


def _unpacked(arrays: Arrays, fmt: QuantFormat, n_widths: int, device: torch.device) -> tuple[RowQuantizer, ...]:
    scale, zero, bits = (
        torch.from_numpy(arrays[f"{_SCRATCH}{fmt.name}/{key}"]).to(device) for key in ("scale", "zero", "bits")
    )
    return tuple(RowQuantizer(scale=scale[w], zero=zero[w], bits=bits[w], ternary=fmt.ternary) for w in range(n_widths))
