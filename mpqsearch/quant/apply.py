"""Apply a bit map to a model: weights replaced by what their integer codes decode to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.errors import ConfigError, LayerMismatchError, NumericsError
from mpqsearch.quant.activations import ActivationTable, attach_clock, attach_quantizer, input_quantizers
from mpqsearch.quant.gptq import gptq_rows
from mpqsearch.quant.rows import RowQuantizer, decode, encode, fit_rows, rows_of, weight_of
from mpqsearch.quant.tables import stored_factors


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
    weight: Tensor,
    layer: LayerSpec,
    widths: Tensor,
    fmt: QuantFormat,
    input_max: Tensor | None = None,
    moment: Tensor | None = None,
) -> QuantizedRows:
    """Quantize one layer with a width per output channel (``[C]``, 1..8 or 16 for full precision).

    With ``moment`` ``[G, D, D]``, the second moment (or covariance) of the layer's input, rounding is GPTQ; see
    `gptq_rows`. Raises `ConfigError` when the format smooths and ``input_max`` (largest magnitude of each input
    channel) is not given.
    """
    rows = rows_of(weight.detach().float(), layer)
    factor = None
    if fmt.smooth:
        if input_max is None:
            raise ConfigError(f"{layer.name}: a smoothed format needs the input maxima of a profile")
        factor = stored_factors(rows, input_max, layer, fmt.alpha)
        rows = rows * factor.repeat_interleave(len(rows) // layer.groups, dim=0)
    full = widths == FULL_PRECISION
    try:
        quantizer = fit_rows(rows, torch.where(full, 8, widths), fmt)
    except NumericsError as error:
        raise NumericsError(f"layer {layer.name!r}: {error}. Repair or reload the checkpoint.") from error
    start = None
    if moment is not None:
        rows, quantizer = gptq_rows(rows, quantizer, moment if factor is None else scaled_moment(moment, factor))
        start = rows if factor is None else rows / factor.repeat_interleave(len(rows) // layer.groups, dim=0)
    codes = encode(rows, quantizer)
    kept = rows_of(weight.detach().float(), layer)[full] if bool(full.any()) else None
    quantizer = RowQuantizer(scale=quantizer.scale, zero=quantizer.zero, bits=widths.to(torch.uint8))
    return QuantizedRows(codes=codes, quantizer=quantizer, factor=factor, full_rows=kept, start=start)


@torch.no_grad()
def quantize_model(
    module: nn.Module,
    table: LayerTable,
    bit_map: BitMap,
    *,
    means: Mapping[str, Tensor] | None = None,
    input_max: Mapping[str, Tensor] | None = None,
    activations: ActivationTable | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> QuantizedModel:
    """A copy of ``module`` with every weight replaced by what its codes decode to, and quantizers in front of the
    layers that ask for them.

    With ``means`` (mean unfolded input ``[G, D]`` of each layer) the shift that the weight error gives to the mean
    output is taken off the bias, in layers that have one: it costs no storage. With ``moments`` (second moment ``[G, D,
    D]`` of that input) rounding is rounded by GPTQ in the layers that it names. ``activations`` holds the scales of the
    activation widths of the map. Raises `LayerMismatchError` when the map or the activations are for another model,
    `ConfigError` when the map has activation widths or GPTQ rounding without what these need.
    """
    bit_map.validate(table)
    check_moments(bit_map, moments)
    quantizers = input_quantizers(module, table, bit_map, activations, input_max)
    clone = copy.deepcopy(module)
    clock = attach_clock(clone, () if activations is None else activations.timesteps)
    owned = owners_of(clone, table)
    stored: dict[str, QuantizedRows] = {}
    for layer in table:
        targets: list[Any] = owned[layer.name]
        if layer.name in quantizers:
            quantizers[layer.name].clock = clock
            attach_quantizer(targets[0], quantizers[layer.name])  # what borrows the weight has inputs of its own
        widths = torch.from_numpy(bit_map.channel_widths(layer.name, layer.n_channels).copy())
        if bool((widths == FULL_PRECISION).all()):
            continue
        target = targets[0]
        weight: Tensor = target.weight
        moment = moment_of(layer.name, moments, means if target.bias is not None else None)
        quantized = quantize_weight(
            weight, layer, widths, bit_map.format_of(layer.name), (input_max or {}).get(layer.name), moment
        )
        rows = quantized.rows()
        if means is not None and layer.name in means and target.bias is not None:
            error = rows - rows_of(weight.float(), layer)
            target.bias.sub_(bias_shift(error, means[layer.name]).to(target.bias.dtype))
        weight.copy_(weight_of(rows, layer).to(weight.dtype))
        stored[layer.name] = quantized
    return QuantizedModel(module=clone, bit_map=bit_map, rows=stored)


def check_moments(bit_map: BitMap, moments: Mapping[str, Tensor] | None) -> None:
    """Raise `ConfigError` when the map asks for GPTQ rounding and there is nothing to compensate with."""
    if moments is None and any(f.rounding == "gptq" for f in (bit_map.format, *bit_map.formats.values())):
        raise ConfigError(
            "the bit map asks for GPTQ rounding, which needs the second moments of the layers' inputs. Measure them "
            "with "
            "mpqsearch.profile.input_statistics (or InputMoments) and give them as moments, or use rounding = "
            "'nearest'."
        )


def owners_of(module: nn.Module, table: LayerTable) -> dict[str, list[nn.Module]]:
    """The module of each layer, and after it those that borrow its weight. Raises `LayerMismatchError` when one is
    missing."""
    modules: dict[str, Any] = dict(module.named_modules())
    missing = [layer.name for layer in table if getattr(modules.get(layer.name), "weight", None) is None]
    if missing:
        raise LayerMismatchError(f"the model has no module {missing[0]!r}, which the layer table names")
    named = {id(modules[layer.name].weight): layer.name for layer in table}
    out: dict[str, list[nn.Module]] = {layer.name: [modules[layer.name]] for layer in table}
    for other in modules.values():
        name = named.get(id(other._parameters.get("weight")))
        if name is not None and other is not modules[name]:
            out[name].append(other)
    return out


def moment_of(name: str, moments: Mapping[str, Tensor] | None, means: Mapping[str, Tensor] | None) -> Tensor | None:
    """What the weight error of a layer is measured with: the second moment of its input, less the mean that the bias
    makes good."""
    if moments is None or name not in moments:
        return None
    moment = moments[name]
    if means is None or name not in means:
        return moment
    mean = means[name].to(moment)
    return moment - mean[:, :, None] * mean[:, None, :]


def scaled_moment(moment: Tensor, factor: Tensor) -> Tensor:
    """Second moment ``[G, D, D]`` of inputs over their smoothing factors ``[G, D]``."""
    return moment / (factor[:, :, None] * factor[:, None, :]).to(moment)


def bias_shift(error: Tensor, mean: Tensor) -> Tensor:
    """Mean output error of every channel ``[C]`` from weight errors ``[C, D]`` and the mean input ``[G, D]``."""
    groups = mean.shape[0]
    return torch.bmm(error.reshape(groups, len(error) // groups, -1), mean.to(error)[:, :, None]).flatten()
