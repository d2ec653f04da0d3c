"""Input statistics of every layer from forward hooks: second moment, mean and largest magnitudes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.quant import ActivationQuantizer, RowStatistics


def columns_of(x: Tensor, module: nn.Module, layer: LayerSpec) -> Tensor:
    """What the rows of a layer are multiplied with: ``[G, positions, D]`` for an input ``x``, with or without a batch
    axis.

    Convolutions are unfolded with their own stride, padding and dilation; a transposed convolution is a convolution of
    the zero-stuffed input with the flipped kernel. So ``rows @ columns`` is the layer's output, exactly, for every
    kind.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    seen = _windows(x, module, layer)
    dims = (seen.dim() - 3) // 2
    # [N, G, C/G, L..., k...] -> [G, N, L..., C/G, k...]
    order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    return seen.permute(order).reshape(layer.groups, -1, layer.weights_per_channel)


def column_sums(x: Tensor, module: nn.Module, layer: LayerSpec) -> tuple[Tensor, int]:
    """Sum ``[G, D]`` in float64 of `columns_of` over positions, and their number, without unfolding the input."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows.sum(0, dtype=torch.float64)[None], len(rows)
    conv: Any = module
    x = x if x.dim() == len(conv.kernel_size) + 2 else x[None]
    # Sums over samples first: unfolding is linear, and then there is one sample to unfold.
    columns = columns_of(x.sum(0, keepdim=True, dtype=torch.float64), module, layer)
    return columns.sum(1), len(x) * columns.shape[1]


def _windows(x: Tensor, module: nn.Module, layer: LayerSpec) -> Tensor:
    """What a convolution sees at each position, as a view ``[N, G, C/G, L..., k...]`` of its padded input."""
    conv: Any = module
    dims = len(conv.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        x = _zero_stuffed(x, conv)
        stride: tuple[int, ...] = (1,) * dims
    else:
        stride = conv.stride
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        elif conv.padding == "same":
            x = F.pad(x, conv._reversed_padding_repeated_twice)
        elif conv.padding != "valid":
            x = F.pad(x, [p for pad in reversed(conv.padding) for p in (pad, pad)])
    for axis in range(dims):  # [N, C, L..., k...]
        reach = (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: conv.dilation[axis]]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        x = x.flip(tuple(range(2 + dims, 2 + 2 * dims)))
    return x.reshape(len(x), layer.groups, -1, *x.shape[2:])


def parts_of(x: Tensor, module: nn.Module, at_once: int) -> Iterable[Tensor]:
    """An input in parts of so many samples, or rows of a linear layer's input; for those who cannot unfold all of it
    together."""
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, x.shape[-1])
    else:
        conv: Any = module
        x = x if x.dim() == len(conv.kernel_size) + 2 else x[None]
    return torch.split(x, at_once)


def _by_channel(x: Tensor, module: nn.Module) -> Tensor:
    """``[channels, values]`` of an input or output, with or without a batch axis."""
    if isinstance(module, nn.Linear):
        return x.movedim(-1, 0).reshape(x.shape[-1], -1)
    conv: Any = module
    return x.movedim(-1 - len(conv.kernel_size), 0).flatten(1)


def _zero_stuffed(x: Tensor, conv: Any) -> Tensor:
    dims = x.dim() - 2
    spread = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], conv.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *spread)
    strided: list[Any] = [..., *(slice(None, None, s) for s in conv.stride)]
    stuffed[tuple(strided)] = x
    pads: list[int] = []
    for axis in reversed(range(dims)):
        edge = conv.dilation[axis] * (conv.kernel_size[axis] - 1) - conv.padding[axis]
        pads += [edge, edge + conv.output_padding[axis]]
    return F.pad(stuffed, pads)


class InputCollector:
    """Context manager: while it is open, every forward pass of the model adds to the statistics of its layers.

    Without ``moments`` no second moment is kept, and no input is unfolded.
    """

    def __init__(self, model: nn.Module, table: LayerTable, *, moments: bool = True) -> None:
        self._moments = moments
        self._modules = {name: m for name, m in model.named_modules() if name in table.by_name}
        self._table = table
        self._moment: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._max: dict[str, Tensor] = {}
        self._power: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> InputCollector:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(self._table[name]), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, layer: LayerSpec) -> Any:
        @torch.no_grad()
        def collect(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            x = (inputs[0] if inputs else next(iter(named.values()))).detach().float()
            if not x.numel():
                return
            channels, out = (_by_channel(v, module) for v in (x, output.detach().float()))
            if self._moments:
                columns = columns_of(x, module, layer)
                # Products in float32, sums over batches in float64: the sums run over many more terms.
                self._add(self._moment, layer.name, torch.bmm(columns.transpose(1, 2), columns).double())
                total, count = columns.sum(1, dtype=torch.float64), columns.shape[1]
            else:
                total, count = column_sums(x, module, layer)
            self._add(self._sum, layer.name, total)
            self._count[layer.name] = self._count.get(layer.name, 0) + count
            self._add(self._power, layer.name, out.square().sum(1, dtype=torch.float64))
            peak = channels.abs().amax(1)
            self._max[layer.name] = torch.maximum(self._max[layer.name], peak) if layer.name in self._max else peak

        return collect

    @staticmethod
    def _add(store: dict[str, Tensor], name: str, value: Tensor) -> None:
        if name in store:
            store[name] += value
        else:
            store[name] = value

    def statistics(self) -> Mapping[str, RowStatistics]:
        """What has been seen so far, for the layers that ran."""
        return {
            name: RowStatistics(
                second_moment=self._moment[name] / count if self._moments else torch.empty(0),
                mean=self._sum[name] / count,
                input_max=self._max[name],
                n_positions=count,
            )
            for name, count in self._count.items()
        }

    def output_power(self) -> Mapping[str, Tensor]:
        """Mean square of every output channel ``[C]``."""
        return {name: self._power[name] / count for name, count in self._count.items()}


class QuantizedInputCollector:
    """Context manager: moments of quantized inputs ``q`` and of their errors ``d = q - x`` while the model runs at full
    precision.

    ``E[q q']``, ``E[q d']`` and ``E[d d']`` of each layer, ``[G, D, D]`` in float64: three times the memory of
    `InputCollector`.
    """

    def __init__(self, model: nn.Module, table: LayerTable, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        self._modules = {name: m for name, m in model.named_modules() if name in quantizers}
        self._table, self._quantizers = table, quantizers
        self._moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._count: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> QuantizedInputCollector:
        self._handles += [m.register_forward_pre_hook(self._hook(name)) for name, m in self._modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        layer = self._table[name]

        @torch.no_grad()
        def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            quantized = self._quantizers[name](x)
            q, d = columns_of(quantized, module, layer), columns_of(quantized - x, module, layer)
            new = tuple(torch.bmm(a.transpose(1, 2), b).double() for a, b in ((q, q), (q, d), (d, d)))
            old = self._moments.get(name)
            self._moments[name] = new if old is None else tuple(o + n for o, n in zip(old, new, strict=True))  # type: ignore[assignment]
            self._count[name] = self._count.get(name, 0) + q.shape[1]

        return collect

    def errors(self, layer: LayerSpec, rows: Tensor, weight_errors: Tensor) -> Tensor:
        """``E[(w_q' q - w' x)**2]`` of every row at every width ``[C, W]``, from the weights ``[C, D]`` and their
        errors ``[W, C, D]``.

        With ``e = w_q - w`` this is ``e' E[q q'] e + 2 e' E[q d'] w + w' E[d d'] w``. Zero for a layer that never ran.
        """
        if layer.name not in self._moments:
            return torch.zeros(len(rows), len(weight_errors), dtype=torch.float64)
        qq, qd, dd = (m / self._count[layer.name] for m in self._moments[layer.name])
        groups = len(qq)
        w = rows.double().reshape(groups, len(rows) // groups, -1)
        own = (torch.bmm(w, dd) * w).sum(2)
        across = torch.bmm(w, qd.transpose(1, 2))  # E[q d'] w
        out = []
        for error in weight_errors:
            e = error.double().reshape(w.shape)
            out.append(((torch.bmm(e, qq) + 2 * across) * e).sum(2) + own)
        return torch.stack([v.flatten() for v in out], 1).clamp_min(0)
