"""Input statistics of every layer from forward hooks: second moment, mean and range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.models.hooks import layer_input, uses_weight_as_it_is
from mpqsearch.quant import ActivationQuantizer, RowStatistics

CONSTANT = 1e-5
"""An input is constant when no channel varies by more than this share of the largest magnitude in it."""


UNFOLDED = 1 << 30
"""Bytes that the unfolded input of a convolution may take at once."""


def columns_of(x: Tensor, module: nn.Module, layer: LayerSpec) -> Tensor:
    """What the rows of a layer are multiplied with: ``[G, positions, D]`` for an input ``x``, with or without a batch
    axis.

    Convolutions are unfolded with their own stride, padding and dilation; a transposed convolution is a convolution of
    the zero-stuffed input with the flipped kernel. So ``rows @ columns`` is the layer's output, exactly, for every
    kind.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    windows = _windows(x, module, layer)
    dims = (windows.dim() - 3) // 2
    # [N, G, C/G, L..., k...] -> [G, N, L..., C/G, k...]
    order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    return windows.permute(order).reshape(layer.groups, -1, layer.weights_per_channel)


def column_sums(x: Tensor, module: nn.Module, layer: LayerSpec) -> tuple[Tensor, int]:
    """Sum ``[G, D]`` in float64 of `columns_of` over positions, and their number, without unfolding the input."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows.sum(0, dtype=torch.float64)[None], len(rows)
    x = batched(x, module)
    # Sums over samples first: unfolding is linear, and then there is one sample to unfold.
    columns = columns_of(x.sum(0, keepdim=True, dtype=torch.float64), module, layer)
    return columns.sum(1), len(x) * columns.shape[1]


def batched(x: Tensor, module: nn.Module) -> Tensor:
    """The input of a convolution with a batch axis."""
    conv: Any = module
    return x if x.dim() == len(conv.kernel_size) + 2 else x[None]


def channel_axis(module: nn.Module) -> int:
    """The axis of a layer's input and output channels, counted from the end: so with or without a batch axis."""
    conv: Any = module
    return -1 if isinstance(module, nn.Linear) else -1 - len(conv.kernel_size)


def parts_of(x: Tensor, module: nn.Module, size: int) -> Iterable[Tensor]:
    """An input in parts of ``size`` samples, or rows of a linear layer's input."""
    return torch.split(x.reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else batched(x, module), size)


def _windows(x: Tensor, module: nn.Module, layer: LayerSpec) -> Tensor:
    """What a convolution sees at each position, as a view ``[N, G, C/G, L..., k...]`` of its padded input."""
    conv: Any = module
    dims, transposed = len(conv.kernel_size), layer.kind.startswith("ConvTranspose")
    x = batched(x, module)
    if transposed:
        x, stride = _zero_stuffed(x, conv), (1,) * dims
    else:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, stride = F.pad(x, _pads(conv), mode=mode), conv.stride
    for axis in range(dims):  # [N, C, L..., k...]
        reach = (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: conv.dilation[axis]]
    if transposed:
        x = x.flip(tuple(range(2 + dims, 2 + 2 * dims)))
    return x.reshape(len(x), layer.groups, -1, *x.shape[2:])


def _pads(conv: Any) -> list[int]:
    """What `torch.nn.functional.pad` takes: before and after each axis, the last axis first."""
    pads: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0, 0] if conv.padding == "valid" else [conv.padding[axis]] * 2
    return pads


def _zero_stuffed(x: Tensor, conv: Any) -> Tensor:
    dims = x.dim() - 2
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], conv.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    strided: list[Any] = [..., *(slice(None, None, s) for s in conv.stride)]
    stuffed[tuple(strided)] = x
    pads: list[int] = []
    for axis in reversed(range(dims)):
        edge = conv.dilation[axis] * (conv.kernel_size[axis] - 1) - conv.padding[axis]
        pads += [edge, edge + conv.output_padding[axis]]
    return F.pad(stuffed, pads)


@dataclass
class _Sums:
    """Running sums of one layer: over positions ``total`` ``[G, D]``, ``power`` ``[C]``; extremes of each input
    channel."""

    low: Tensor
    high: Tensor
    total: Tensor
    power: Tensor
    product: Tensor | None = None
    count: int = 0

    def add(self, other: _Sums) -> None:
        """Take what another call has seen."""
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.total, self.power = self.total + other.total, self.power + other.power
        self.count += other.count
        if self.product is not None and other.product is not None:
            self.product += other.product


@dataclass
class _Last:
    """The input that was unfolded last and its product: layers q, k and v of an attention are called with the same."""

    x: Tensor | None = None
    version: int = -1
    product: Tensor = field(default_factory=lambda: torch.empty(0))

    def product_of(self, x: Tensor, module: nn.Module, layer: LayerSpec) -> Tensor:
        """``sum x x'`` ``[G, D, D]`` of the unfolded input."""
        if not isinstance(module, nn.Linear):
            return _product(x, module, layer)
        if x is not self.x or x.is_inference() or x._version != self.version:
            self.product = _product(x, module, layer)
            self.x, self.version = x, 0 if x.is_inference() else x._version
        return self.product


def _product(x: Tensor, module: nn.Module, layer: LayerSpec) -> Tensor:
    """``sum x x'`` ``[G, D, D]`` in float64, from float32 products of parts whose unfolded columns fit `UNFOLDED`."""
    samples = x.numel() // x.shape[-1] if isinstance(module, nn.Linear) else len(batched(x, module))
    unfolded = x.numel() // samples * (layer.weights_per_channel * layer.groups // layer.n_inputs) * 4
    total: Tensor | None = None
    for part in parts_of(x, module, max(1, UNFOLDED // unfolded)):
        columns = columns_of(part.float(), module, layer)
        product = torch.bmm(columns.transpose(1, 2), columns).double()
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


class Watcher:
    """Context manager whose hooks on layers go when it is left."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def _attach(self) -> Iterable[Any]:
        """Register the hooks and give their handles."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._handles += self._attach()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class InputCollector(Watcher):
    """Context manager: while it is open, every forward pass of the model adds to the statistics of its layers.

    Without ``second_moments`` no second moment is kept, and no input is unfolded.
    """

    def __init__(self, model: nn.Module, table: LayerTable, *, second_moments: bool = True) -> None:
        super().__init__()
        self._second_moments = second_moments
        self._modules = {name: m for name, m in model.named_modules() if name in table.by_name}
        self._table = table
        self._sums: dict[str, _Sums] = {}
        self._scaled: set[str] = set()
        self._last = _Last()

    def _attach(self) -> Iterable[Any]:
        for name, module in self._modules.items():
            yield module.register_forward_hook(self._hook(self._table[name]), with_kwargs=True)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._last = _Last()

    def _hook(self, layer: LayerSpec) -> Any:
        @torch.no_grad()
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = layer_input(args, kwargs)
            if not x.numel():
                return
            if layer.name not in self._sums and not uses_weight_as_it_is(module, args, kwargs, output):
                self._scaled.add(layer.name)
            values = x.detach().float()
            by_channel = values.movedim(channel_axis(module), 0).flatten(1)
            total, count = column_sums(values, module, layer)
            outputs = output.detach().float().movedim(channel_axis(module), 0).flatten(1)
            sums = _Sums(
                low=by_channel.amin(1),
                high=by_channel.amax(1),
                total=total,
                power=outputs.square().sum(1, dtype=torch.float64),
                product=self._last.product_of(x, module, layer) if self._second_moments else None,
                count=count,
            )
            if layer.name in self._sums:
                self._sums[layer.name].add(sums)
            else:
                sums.product = None if sums.product is None else sums.product.clone()
                self._sums[layer.name] = sums

        return collect

    def statistics(self) -> dict[str, RowStatistics]:
        """What has been seen so far, for the layers that ran.

        The mean is that which bias correction takes off a weight error: 0 for layers that scale their weight as they
        run, whose output does not follow from it.
        """
        return {
            name: RowStatistics(
                second_moment=torch.empty(0) if s.product is None else s.product / s.count,
                mean=torch.zeros_like(s.total) if name in self._scaled else s.total / s.count,
                input_max=torch.maximum(s.low.abs(), s.high.abs()),
            )
            for name, s in self._sums.items()
        }

    def output_power(self) -> dict[str, Tensor]:
        """Mean square of every output channel ``[C]``."""
        return {name: s.power / s.count for name, s in self._sums.items()}

    def constant_inputs(self) -> tuple[str, ...]:
        """Layers that ran and whose input never changed, in the order of the table."""
        still = {
            name
            for name, s in self._sums.items()
            if float((s.high - s.low).max()) <= CONSTANT * float(torch.maximum(s.low.abs(), s.high.abs()).max())
        }
        return tuple(la.name for la in self._table if la.name in still)


class QuantizedInputCollector(Watcher):
    """Context manager: second moments of quantized inputs ``q`` and of their errors ``d = q - x`` while the model runs
    at full precision.

    ``E[q q']``, ``E[q d']`` and ``E[d d']`` of each layer, ``[G, D, D]`` in float64: three times the memory of
    `InputCollector`.
    """

    def __init__(self, model: nn.Module, table: LayerTable, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        super().__init__()
        self._modules = {name: m for name, m in model.named_modules() if name in quantizers}
        self._table, self._quantizers = table, quantizers
        self._products: dict[str, list[Tensor]] = {}
        self._count: dict[str, int] = {}

    def _attach(self) -> Iterable[Any]:
        for name, module in self._modules.items():
            yield module.register_forward_pre_hook(self._hook(name), with_kwargs=True)

    def _hook(self, name: str) -> Any:
        layer = self._table[name]

        @torch.no_grad()
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = layer_input(args, kwargs).float()
            quantized = self._quantizers[name](x)
            q, d = columns_of(quantized, module, layer), columns_of(quantized - x, module, layer)
            products = [torch.bmm(a.transpose(1, 2), b).double() for a, b in ((q, q), (q, d), (d, d))]
            before = self._products.get(name)
            self._products[name] = (
                products if before is None else [a + b for a, b in zip(before, products, strict=True)]
            )
            self._count[name] = self._count.get(name, 0) + q.shape[1]

        return collect

    def errors(self, layer: LayerSpec, rows: Tensor, weight_errors: Tensor) -> Tensor:
        """``E[(w_q' q - w' x)**2]`` of every row at every width ``[C, W]``, from the weights ``[C, D]`` and their
        errors ``[W, C, D]``.

        With ``e = w_q - w`` this is ``e' E[q q'] e + 2 e' E[q d'] w + w' E[d d'] w``. Zero for a layer that never ran.
        """
        if layer.name not in self._products:
            return torch.zeros(len(rows), len(weight_errors), dtype=torch.float64)
        qq, qd, dd = (m / self._count[layer.name] for m in self._products[layer.name])
        groups = len(qq)
        w = rows.double().reshape(groups, len(rows) // groups, -1)
        alone = (torch.bmm(w, dd) * w).sum(2)
        across = torch.bmm(w, qd.transpose(1, 2))  # E[q d'] w
        out = []
        for error in weight_errors:
            e = error.double().reshape(w.shape)
            out.append(((torch.bmm(e, qq) + 2 * across) * e).sum(2) + alone)
        return torch.stack([v.flatten() for v in out], 1).clamp_min(0)
