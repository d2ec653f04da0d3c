"""Apply a bit map to a model: weights replaced by what their integer codes decode to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.errors import ConfigError, LayerMismatchError, NumericsError
from mpqsearch.quant.activations import ActivationTable, attach_clock, attach_quantizer, input_quantizers
from mpqsearch.quant.gptq import gptq_rows
from mpqsearch.quant.kfac import input_side, kfac_rows
from mpqsearch.quant.rows import RowQuantizer, decode, encode, fit_rows, rows_of, weight_of
from mpqsearch.quant.smoothing import by_row, known_factors, scaled_moment
from mpqsearch.quant.statistics import RowStatistics, Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRows:
    """One layer as it would be stored: ``codes`` uint8 ``[C, D]``, the quantizer, and column factors ``[G, D]`` of
    smoothing.

    Rows of width 16 are not quantized; their weights are in ``full_rows`` ``[k, D]``, in order. ``start`` ``[C, D]``
    are weights whose nearest codes these are, where that is not true of the layer's own (GPTQ): what training starts
    from.
    """

    codes: Tensor
    quantizer: RowQuantizer
    factor: Tensor | None = None
    full_rows: Tensor | None = None
    start: Tensor | None = None

    def rows(self) -> Tensor:
        """The weights ``[C, D]`` in float32, the very numbers of the forward pass."""
        rows = decode(self.codes, self.quantizer)
        if self.factor is not None:
            rows = rows / by_row(self.factor, len(rows))
        if self.full_rows is not None:
            rows[self.quantizer.bits == FULL_PRECISION] = self.full_rows
        return rows


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """A model whose weights are fake-quantized, the codes behind them, and the bit map that they follow."""

    module: nn.Module
    bit_map: BitMap
    rows: Mapping[str, QuantizedRows] = field(default_factory=dict)


def quantize_weight(
    weight: Tensor,
    layer: LayerSpec,
    widths: Tensor,
    fmt: QuantFormat,
    statistics: RowStatistics | None = None,
    *,
    bias_correction: bool = False,
) -> QuantizedRows:
    """Quantize one layer with a width per output channel (``[C]``, 1..8 or 16 for full precision).

    GPTQ (see `gptq_rows`) goes by the second moment in ``statistics``, or by the covariance where ``bias_correction``
    takes the error of the mean; without one, rounding is to nearest. KFAC goes by the moments of gradients, too, and
    without one is GPTQ. Weights of any floating type are computed with in float32. Raises `ConfigError` when the format
    smooths and there are no statistics, `NumericsError` for NaN or infinity.
    """
    exact = rows_of(weight.detach().float(), layer)
    widths = widths.to(exact.device, torch.uint8)
    full = widths == FULL_PRECISION
    rows, factor, start = exact, None, None
    if fmt.smooth:
        factor = known_factors(exact, statistics, layer, fmt.alpha)
        rows = exact * by_row(factor, len(exact))
    try:
        quantizer = fit_rows(rows, torch.where(full, 8, widths), fmt)
    except NumericsError as error:
        raise NumericsError(f"layer {layer.name!r}: {error}. Repair or reload the checkpoint.") from error
    if fmt.rounding != "nearest" and statistics is not None and statistics.second_moment.numel():
        moment = statistics.covariance if bias_correction else statistics.second_moment
        moment, wanted = moment if factor is None else scaled_moment(moment, factor), rows
        rows, quantizer = gptq_rows(wanted, quantizer, moment)
        if fmt.rounding == "kfac" and statistics.output_moment.numel():
            gradient = statistics.input_moment
            if factor is not None and gradient.numel():
                gradient = scaled_moment(gradient, factor)
            inputs = input_side(moment, gradient)
            known = replace(quantizer, bits=widths)
            rows, quantizer = kfac_rows(wanted, rows, known, inputs, statistics.output_moment)
        start = rows if factor is None else rows / by_row(factor, len(rows))
    return QuantizedRows(
        codes=encode(rows, quantizer),
        quantizer=replace(quantizer, bits=widths),
        factor=factor,
        full_rows=exact[full] if bool(full.any()) else None,
        start=start,
    )


@torch.no_grad()
def quantize_model(
    module: nn.Module,
    table: LayerTable,
    bit_map: BitMap,
    *,
    statistics: Statistics | None = None,
    bias_correction: bool = False,
    activations: ActivationTable | None = None,
) -> QuantizedModel:
    """A copy of ``module`` with every weight replaced by what its codes decode to, and quantizers in front of the
    layers that ask for them.

    statistics
        What is known of the inputs of layers: smoothed formats and GPTQ need it. Layers without a second moment are
        rounded to nearest.
    bias_correction
        Take the shift that the weight error gives to the mean output off the bias, in layers that have one and whose
        statistics are known: it costs no storage.
    activations
        The scales of the activation widths of the map, unless they are found token by token.

    Raises `LayerMismatchError` when the map or the activations are for another model, `ConfigError` when the map has
    activation widths with stored scales, smoothing or GPTQ rounding without what these need.
    """
    bit_map.validate(table)
    quantizers = input_quantizers(module, table, bit_map, activations, statistics or {})
    clone = copy.deepcopy(module)
    clock = attach_clock(clone, () if activations is None else activations.timesteps)
    owned = owners_of(clone, table)
    for name, quantizer in quantizers.items():
        quantizer.clock = clock
        attach_quantizer(owned[name][0], quantizer)  # what borrows the weight has inputs of its own
    stored = {}
    for layer, rows in quantized_layers(owned, table, bit_map, statistics or {}, bias_correction=bias_correction):
        weight: Any = weight_parameter(owned[layer.name][0])
        weight.copy_(weight_of(rows.rows(), layer))
        stored[layer.name] = rows
    return QuantizedModel(module=clone, bit_map=bit_map, rows=stored)


def quantized_layers(
    owned: Mapping[str, list[nn.Module]],
    table: LayerTable,
    bit_map: BitMap,
    statistics: Statistics,
    *,
    bias_correction: bool,
) -> Iterator[tuple[LayerSpec, QuantizedRows]]:
    """Quantize one layer after the other, and correct the bias of its owner (see `owners_of`) in place. Layers that are
    wholly at full precision are left out."""
    check_moments(bit_map, statistics)
    for layer in table:
        widths = torch.from_numpy(bit_map.channel_widths(layer.name, layer.n_channels).copy())
        if bool((widths == FULL_PRECISION).all()):
            continue
        owner: Any = owned[layer.name][0]
        weight: Any = weight_parameter(owner)
        known, corrected = statistics.get(layer.name), bias_correction and owner.bias is not None
        rows = quantize_weight(weight, layer, widths, bit_map.format_of(layer.name), known, bias_correction=corrected)
        if corrected and known is not None:
            error = rows.rows() - rows_of(weight.float(), layer)
            owner.bias.sub_(bias_shift(error, known.mean))
        yield layer, rows


def check_moments(bit_map: BitMap, statistics: Statistics) -> None:
    """Raise `ConfigError` when the map asks for GPTQ rounding and there is nothing to compensate with."""
    if bit_map.rounds_to_nearest or any(s.second_moment.numel() for s in statistics.values()):
        return
    raise ConfigError(
        "the bit map asks for GPTQ rounding, which needs the second moments of the layers' inputs. Measure them with "
        "mpqsearch.profile.input_statistics or SecondMoments and give them as statistics, or use rounding = 'nearest'."
    )


def weight_parameter(module: nn.Module) -> nn.Parameter | None:
    """The weight of a layer where it is a parameter of its own; None where it is computed from others (weight norm,
    spectral norm, LoRA)."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def owners_of(module: nn.Module, table: LayerTable) -> dict[str, list[nn.Module]]:
    """The module of each layer, and after it those that borrow its weight. Raises `LayerMismatchError` when one is
    missing."""
    modules = dict(module.named_modules())
    named = {}
    for layer in table:
        weight = weight_parameter(modules[layer.name]) if layer.name in modules else None
        if weight is None:
            raise LayerMismatchError(
                f"the model has no module {layer.name!r} with a weight, which the layer table names"
            )
        named[weight] = layer.name
    owners = {layer.name: [modules[layer.name]] for layer in table}
    for other in modules.values():
        weight = weight_parameter(other)
        borrowed = None if weight is None else named.get(weight)
        if borrowed is not None and other is not modules[borrowed]:
            owners[borrowed].append(other)
    return owners


def bias_shift(error: Tensor, mean: Tensor) -> Tensor:
    """Mean output error of every channel ``[C]`` from weight errors ``[C, D]`` and the mean input ``[G, D]``."""
    groups = mean.shape[0]
    return torch.bmm(error.reshape(groups, len(error) // groups, -1), mean.to(error)[:, :, None]).flatten()
