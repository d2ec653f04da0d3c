"""Trainable quantizers: a copy of a model whose layers compute ``layer(Q_x(x), Q_w(W + B A))`` with gradients.

`build_student` makes the copy, `param_groups` the learning rates, `convert` the integer codes at the end. All widths of
a layer are handled by one vectorised pass; low-rank updates are merged before quantization (QALoRA of EfficientDM), so
nothing is left of them at inference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.models.devices import float_dtype
from mpqsearch.models.hooks import layer_input, with_input
from mpqsearch.quant.activations import (
    ActivationQuantizer,
    ActivationTable,
    attach_clock,
    attach_quantizer,
    input_quantizers,
)
from mpqsearch.quant.apply import QuantizedModel, QuantizedRows, owners_of, quantized_layers, weight_parameter
from mpqsearch.quant.fake import as_stored, fake_quantize
from mpqsearch.quant.rows import RowQuantizer, by_column, encode, rows_of, weight_of
from mpqsearch.quant.smoothing import by_row
from mpqsearch.quant.statistics import Statistics

Trainable = Literal["none", "scales", "lora", "all"]
"""``none``: nothing. ``scales``: scales and zero points of weights and activations. ``lora``: these and low-rank
updates of the weights. ``all``: these and all quantized weights with their biases."""


class WeightQuantizer(nn.Module):
    """The weight of one layer as a function of what is trained: `forward` gives it fake-quantized, in its own shape.

    ``scale``, ``zero`` ``[C n]`` start from the range search (n = 1 but for groups of inputs). ``base`` ``[C, D]`` is
    the full-precision weight: a parameter when all is trained, else a buffer that no checkpoint holds. ``lora_a``
    ``[r, D]`` and ``lora_b`` ``[C, r]`` (zero at the start) are its low-rank update; the rank is at most the smaller
    side.

    ``scale`` is in units of ``scale_unit`` ``[C n]``, the power of two next to the row's own step, ``base`` and its
    update in units of ``weight_unit`` ``[C n]``, which is the same but for smoothing. So one learning rate moves rows
    of all widths by the same part of their step, and no bit is lost: a row of 8 bits has a step of a hundredth of that
    of a row of 1 bit in the same layer, and is there because it matters most.
    """

    scale: nn.Parameter
    zero: nn.Parameter
    bits: Tensor
    top: Tensor
    full: Tensor
    fixed_zero: Tensor
    group_factor: Tensor | None
    scale_unit: Tensor
    weight_unit: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        weight: Tensor,
        stored: QuantizedRows,
        *,
        trainable: Trainable,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        bits, zero = stored.quantizer.bits, stored.quantizer.zero
        full = bits == FULL_PRECISION
        self.layer, self.dtype, self.any_full = layer, weight.dtype, bool(full.any())
        groups = stored.quantizer.groups
        # A symmetric scheme has its zero between two codes, three levels on the middle one.
        fixed_zero = (zero != zero.round()) | (full | stored.quantizer.three_levels).repeat_interleave(groups)
        learned, scale, factor = trainable != "none", stored.quantizer.scale, stored.factor
        scale_unit = _power_of_two(scale)
        weight_unit = scale_unit if factor is None else _power_of_two(scale / _mean_factor(factor, stored.quantizer))
        self.scale = nn.Parameter(scale / scale_unit, requires_grad=learned)
        self.zero = nn.Parameter(zero.clone(), requires_grad=learned and not bool(fixed_zero.all()))
        rows = stored.start if stored.start is not None else rows_of(weight.detach().float(), layer)
        rows = rows / by_column(weight_unit, rows)
        if trainable == "all":
            self.base: Tensor = nn.Parameter(rows)
        else:
            self.register_buffer("base", rows, persistent=False)
        if trainable == "lora":
            self._add_lora(rows, rank, generator)
        top, self.ternary = stored.quantizer.top, stored.quantizer.ternary
        constants = {"bits": bits, "top": top, "full": full, "fixed_zero": fixed_zero, "group_factor": factor}
        constants |= {"scale_unit": scale_unit, "weight_unit": weight_unit}
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def _add_lora(self, rows: Tensor, rank: int, generator: torch.Generator) -> None:
        rank = min(rank, *rows.shape)
        # As in LoRA: one factor uniform within 1/sqrt(fan-in) (which `rows` multiplies with), the other zero.
        start = torch.rand(rank, rows.shape[1], generator=generator) * 2 - 1
        self.lora_a = nn.Parameter(start.to(rows))
        self.lora_b = nn.Parameter(rows.new_zeros(len(rows), rank))

    def rows(self) -> Tensor:
        """The weight before quantization ``[C, D]``, low-rank update merged."""
        rows = self.base
        if hasattr(self, "lora_a"):
            rows = torch.addmm(rows, self.lora_b, self.lora_a, alpha=rows.shape[1] ** -0.5)
        return rows * by_column(self.weight_unit, rows)

    def _quantizer(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points as they are stored; those of symmetric rows stay between the two middle codes,
        whatever the optimiser's weight decay makes of the parameter."""
        scale, zero = as_stored(self.scale * self.scale_unit, self.zero, self.top)
        return scale, torch.where(self.fixed_zero, self.top / 2, zero)

    def forward(self) -> Tensor:
        """The fake-quantized weight in the layer's own shape and dtype."""
        rows = self.rows()
        factor = None if self.group_factor is None else by_row(self.group_factor, len(rows))
        scaled = (rows if factor is None else rows * factor).reshape(len(self.scale), -1)
        quantized = fake_quantize(scaled, *self._quantizer(), self.top).reshape(rows.shape)
        if factor is not None:
            quantized = quantized / factor
        if self.any_full:
            quantized = torch.where(self.full[:, None], rows, quantized)
        return weight_of(quantized, self.layer).to(self.dtype)

    @torch.no_grad()
    def stored(self) -> QuantizedRows:
        """Codes, scales, zero points and full-precision rows: what `forward` uses, bit for bit."""
        rows = self.rows().detach()
        scale, zero = self._quantizer()
        widths = torch.where(self.full, 8, self.bits).to(torch.uint8)
        scaled = rows if self.group_factor is None else rows * by_row(self.group_factor, len(rows))
        quantizer = RowQuantizer(scale=scale, zero=zero, bits=self.bits.clone(), ternary=self.ternary)
        return QuantizedRows(
            codes=encode(scaled, replace(quantizer, bits=widths)),
            quantizer=quantizer,
            factor=None if self.group_factor is None else self.group_factor.clone(),
            full_rows=rows[self.full].clone() if self.any_full else None,
        )

    @torch.no_grad()
    def mean_step(self) -> float:
        """Mean distance of neighbouring levels over quantized rows, in the units of the weight."""
        steps = by_column(self.scale.detach() * self.scale_unit, self.base)
        if self.group_factor is not None:
            steps = steps / by_row(self.group_factor, len(steps))
        return float(steps[~self.full].mean())

    def extra_repr(self) -> str:
        """Rows by width."""
        values, counts = torch.unique(self.bits, return_counts=True)
        return ", ".join(f"{b}b x{c}" for b, c in zip(values.tolist(), counts.tolist(), strict=True))


def _mean_factor(factor: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Mean smoothing factor ``[C n]`` of the columns of every scale, from the factors of groups of rows ``[G, D]``."""
    return by_row(factor, len(quantizer.bits)).reshape(len(quantizer.scale), -1).mean(1)


def _power_of_two(x: Tensor) -> Tensor:
    """The power of two next to each positive number."""
    return torch.exp2(x.log2().round())


class QuantLayer(nn.Module):
    """A linear or convolutional layer with fake-quantized weight and, where asked, input. Takes what the layer takes.

    ``weight`` is the fake-quantized weight, computed anew at each access; ``bias`` is the layer's own. Public
    attributes of the layer (``in_features``, ``stride``, ...) are copied, for code that reads them.
    """

    bias: nn.Parameter | None

    def __init__(
        self, plain: nn.Module, weight_quantizer: WeightQuantizer, input_quantizer: ActivationQuantizer | None
    ) -> None:
        super().__init__()
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.register_parameter("bias", getattr(plain, "bias", None))
        shell = copy.copy(plain)
        shell.__dict__["_parameters"] = {}
        self._shell = (shell,)  # in a tuple, since it is no part of the model: it only knows how to call the layer
        for key, value in vars(plain).items():
            if not key.startswith("_") and key != "training":
                setattr(self, key, value)

    @property
    def weight(self) -> Tensor:
        """The fake-quantized weight."""
        weight: Tensor = self.weight_quantizer()
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``layer(Q_x(x), Q_w(W))``."""
        if self.input_quantizer is not None:
            args, kwargs = with_input(args, kwargs, self.input_quantizer(layer_input(args, kwargs)))
        shell = self._shell[0]
        shell.__dict__.update(weight=self.weight, bias=self.bias)
        try:
            out: Tensor = shell(*args, **kwargs)
        finally:
            shell.__dict__.update(weight=None, bias=None)
        return out

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """An ordinary layer with the given weight, this bias, and this input quantizer in front."""
        layer = copy.copy(self._shell[0])
        for key in ("weight", "bias"):
            layer.__dict__.pop(key, None)
        layer.__dict__["_parameters"] = {}
        layer.__dict__["_modules"] = {}
        for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            layer.__dict__[hooks] = layer.__dict__[hooks].copy()
        layer.register_parameter("weight", weight)
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        layer.register_parameter("bias", bias)
        if self.input_quantizer is not None:
            attach_quantizer(layer, self.input_quantizer)
        return layer


@torch.no_grad()
def build_student(
    module: nn.Module,
    table: LayerTable,
    bit_map: BitMap,
    *,
    statistics: Statistics | None = None,
    bias_correction: bool = False,
    activations: ActivationTable | None = None,
    trainable: Trainable = "lora",
    rank: int = 32,
    seed: int = 0,
) -> nn.Module:
    """A deep copy of ``module`` whose quantized layers are `QuantLayer` s, ready to train. Its first forward equals
    `quantize_model`'s. The student of a module in half precision is in float32, as its optimiser's state is.

    statistics, bias_correction
        As in `quantize_model`. With GPTQ, weights start where the codes that it chose are their nearest ones.
    activations
        Needed when the bit map stores scales of inputs; made by `RangeCollector` for the same widths.
    trainable
        See `Trainable`. Norms, embeddings and layers at 16 bits are never trained.
    rank, seed
        Rank of the low-rank updates, and what their random factor is drawn from.

    Raises `LayerMismatchError` when the map or the activations are for another model, `ConfigError` for missing
    statistics.
    """
    if trainable not in get_args(Trainable):
        raise UnknownNameError("choice of what is trainable", trainable, get_args(Trainable))
    if rank < 1:
        raise ConfigError(f"the rank must be at least 1, got {rank}")
    bit_map.validate(table)
    quantizers = input_quantizers(module, table, bit_map, activations, statistics or {})
    student = copy.deepcopy(module).requires_grad_(False)
    if float_dtype(module).itemsize < torch.float32.itemsize:
        student = student.float()
    clock = attach_clock(student, () if activations is None else activations.timesteps)
    for quantizer in quantizers.values():
        quantizer.clock = clock
        quantizer.requires_grad_(trainable != "none")
    owned = owners_of(student, table)
    generator = torch.Generator().manual_seed(seed)
    swaps: dict[int, nn.Module] = {}
    for layer, rows in quantized_layers(owned, table, bit_map, statistics or {}, bias_correction=bias_correction):
        weight: Any = weight_parameter(owned[layer.name][0])
        shared = WeightQuantizer(layer, weight, rows, trainable=trainable, rank=rank, generator=generator)
        for target in owned[layer.name]:  # the first owns the weight, others borrow it and have inputs of their own
            if isinstance(getattr(target, "bias", None), nn.Parameter):
                target.bias.requires_grad_(trainable == "all")
            first = target is owned[layer.name][0]
            swaps[id(target)] = QuantLayer(target, shared, quantizers.pop(layer.name, None) if first else None)
    for name, quantizer in quantizers.items():  # layers whose weights stay at full precision
        attach_quantizer(owned[name][0], quantizer)
    _replace(student, swaps)
    student.bit_map = bit_map  # type: ignore[assignment]
    return student.train(module.training)


def _replace(root: nn.Module, swaps: Mapping[int, nn.Module]) -> None:
    """Put other modules in the place of some, wherever they hang: by identity, since a module may hang in two
    places."""
    for parent in list(root.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in swaps:
                parent._modules[key] = swaps[id(child)]


def quant_layers(student: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """The `QuantLayer` s of a student, with their names."""
    for name, module in student.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def param_groups(
    student: nn.Module,
    *,
    lora_lr: float = 0.02,
    weight_lr: float = 0.004,
    weight_scale_lr: float = 1e-3,
    activation_scale_lr: float = 5e-3,
    lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, ``{"name", "params", "lr"}``, one for each kind and layer: ``lora:<layer>``,
    ``weights:<layer>``, ``biases:<layer>``, ``weight-scales:<layer>`` and ``activation-scales:<layer>`` (with zero
    points).

    Rates are in quantization steps, times ``lr_factor``: of weights, their updates and their scales in the step of each
    row (which is the unit of these parameters), of biases in the mean step of the layer's weight, of activation scales
    in that of its input. The defaults are for a few hundred steps; the released codes of EfficientDM
    and MPQ-DM train 16,000 with ``lora_lr`` = 1/2500. Groups without parameters are left out.
    """
    groups: list[dict[str, Any]] = []

    def add(kind: str, name: str, parameters: Sequence[nn.Parameter], lr: float) -> None:
        trained = [p for p in parameters if p.requires_grad]
        if trained:
            groups.append({"name": f"{kind}:{name}", "params": trained, "lr": lr * lr_factor})

    seen: set[WeightQuantizer] = set()
    for name, part in student.named_modules():
        if isinstance(part, ActivationQuantizer) and part.static is not None:
            step = float(part.static[0].detach().mean())
            add("activation-scales", part.layer.name, part.static, step * activation_scale_lr)
        if not isinstance(part, QuantLayer):
            continue
        q = part.weight_quantizer
        if q not in seen:  # a weight that several layers use is trained once
            add("weight-scales", name, [q.scale, q.zero], weight_scale_lr)
            add("lora", name, [q.lora_a, q.lora_b] if hasattr(q, "lora_a") else [], lora_lr)
            add("weights", name, [q.base] if isinstance(q.base, nn.Parameter) else [], weight_lr)
        seen.add(q)
        add("biases", name, [] if part.bias is None else [part.bias], weight_lr * q.mean_step())
    return groups


@torch.no_grad()
def convert(student: nn.Module) -> QuantizedModel:
    """The student as it would be deployed: ordinary layers with the weights that integer codes decode to, and the
    codes.

    Weights equal those of the student's forward pass bit for bit. Quantizers of activations stay in front of their
    layers, with the learned scales. Nothing is left of low-rank updates. The student is not changed. Raises
    `ConfigError` for a module that is no student.
    """
    bit_map = getattr(student, "bit_map", None)
    if not isinstance(bit_map, BitMap):
        raise ConfigError(f"{type(student).__name__} was not made by build_student: there is nothing to convert")
    clone = copy.deepcopy(student).requires_grad_(False)
    del clone.bit_map
    rows: dict[str, QuantizedRows] = {}
    weights: dict[int, nn.Parameter] = {}
    swaps: dict[int, nn.Module] = {}
    for _, layer in quant_layers(clone):
        q = layer.weight_quantizer
        if id(q) not in weights:
            stored = q.stored()
            rows[q.layer.name] = stored
            weights[id(q)] = nn.Parameter(weight_of(stored.rows(), q.layer).to(q.dtype), requires_grad=False)
        swaps[id(layer)] = layer.plain(weights[id(q)])
    _replace(clone, swaps)
    return QuantizedModel(module=clone.eval(), bit_map=bit_map, rows=rows)
