"""Apply a bit map to a model: weights replaced by what their integer codes decode to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.errors import ConfigError, LayerMismatchError, NumericsError
from mpqsearch.quant.rows import RowQuantizer, decode, encode, fit_rows, rows_of, weight_of
from mpqsearch.quant.tables import prescale_factors


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRows:
    """One layer as it would be stored: ``codes`` uint8 ``[C, D]``, the quantizer, and column factors ``[G, D]`` of pre-scaling.

    Rows of width 16 are not quantized; their weights are in ``full_rows`` ``[k, D]``, in order.
    """

    codes: Tensor
    quantizer: RowQuantizer
    factor: Tensor | None = None
    full_rows: Tensor | None = None

    def rows(self) -> Tensor:
        """The weights ``[C, D]`` in float32, the very numbers of the forward pass."""
        rows = decode(self.codes, self.quantizer)
        if self.factor is not None:
            rows = rows / self.factor.repeat_interleave(len(rows) // len(self.factor), dim=0)
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
    weight: Tensor, layer: LayerSpec, widths: Tensor, fmt: QuantFormat, input_max: Tensor | None = None
) -> QuantizedRows:
    """Quantize one layer with a width per output channel (``[C]``, 1..8 or 16 for full precision).

    Raises `ConfigError` when the format pre-scales and ``input_max`` (largest magnitude of each input channel) is not given.
    """
    rows = rows_of(weight.detach().float(), layer)
    factor = None
    if fmt.prescale:
        if input_max is None:
            raise ConfigError(f"{layer.name}: a pre-scaled format needs the input maxima of a profile")
        factor = prescale_factors(rows, input_max, layer).half().float().clamp(2.0**-14, 2.0**14)
        rows = rows * factor.repeat_interleave(len(rows) // layer.groups, dim=0)
    full = widths == FULL_PRECISION
    try:
        quantizer = fit_rows(rows, torch.where(full, 8, widths), fmt)
    except NumericsError as error:
        raise NumericsError(f"layer {layer.name!r}: {error}. Repair or reload the checkpoint.") from error
    codes = encode(rows, quantizer)
    kept = rows_of(weight.detach().float(), layer)[full] if bool(full.any()) else None
    quantizer = RowQuantizer(scale=quantizer.scale, zero=quantizer.zero, bits=widths.to(torch.uint8))
    return QuantizedRows(codes=codes, quantizer=quantizer, factor=factor, full_rows=kept)


@torch.no_grad()
def quantize_model(
    module: nn.Module,
    table: LayerTable,
    bit_map: BitMap,
    *,
    means: Mapping[str, Tensor] | None = None,
    input_max: Mapping[str, Tensor] | None = None,
) -> QuantizedModel:
    """A copy of ``module`` with every weight replaced by what its codes decode to.

    With ``means`` (mean unfolded input ``[G, D]`` of each layer) the shift that the weight error gives to the mean output is taken
    off the bias, in layers that have one: it costs no storage. Raises `LayerMismatchError` when the map is for another model.
    """
    bit_map.validate(table)
    if bit_map.activations:
        raise ConfigError("activation quantization is not applied by this version; remove the activation widths from the bit map")
    clone = copy.deepcopy(module)
    modules = dict(clone.named_modules())
    stored: dict[str, QuantizedRows] = {}
    for layer in table:
        target = modules.get(layer.name)
        if target is None:
            raise LayerMismatchError(f"the model has no module {layer.name!r}, which the layer table names")
        widths = torch.from_numpy(bit_map.channel_widths(layer.name, layer.n_channels).copy())
        if bool((widths == FULL_PRECISION).all()):
            continue
        weight: Tensor = target.weight
        quantized = quantize_weight(weight, layer, widths, bit_map.format_of(layer.name), (input_max or {}).get(layer.name))
        rows = quantized.rows()
        if means is not None and layer.name in means and target.bias is not None:
            error = rows - rows_of(weight.float(), layer)
            target.bias.sub_(_shift(error, means[layer.name]).to(target.bias.dtype))
        weight.copy_(weight_of(rows, layer).to(weight.dtype))
        stored[layer.name] = quantized
    return QuantizedModel(module=clone, bit_map=bit_map, rows=stored)


def _shift(error: Tensor, mean: Tensor) -> Tensor:
    """Mean output error of every channel ``[C]``."""
    groups = mean.shape[0]
    return torch.bmm(error.reshape(groups, len(error) // groups, -1), mean.to(error)[:, :, None]).flatten()
