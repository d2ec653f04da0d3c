"""Activation calibration: histograms of layer inputs while the model runs, and the range search on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.models.hooks import layer_input
from mpqsearch.models.runner import parts_of
from mpqsearch.quant.activations import ActivationTable, one_a_sample, watch_timesteps
from mpqsearch.quant.rows import stored_scale
from mpqsearch.quant.smoothing import along_input

BINS = 2048
"""Bins of a histogram, over both signs. With data of one sign a step of 8 bits spans at least two of them, one of 4
bits 34."""


P = 2.4
"""Power of the errors by which ranges are chosen: that of the released codes of EfficientDM and MPQ-DM."""

FACTORS = 1 - 0.8 * torch.arange(80, dtype=torch.float32) / 80
"""By which a range is shrunk: those codes' 80 candidates in steps of 0.01."""


class RangeCollector:
    """Context manager: while it is open, every call of the denoiser adds the inputs of its layers to histograms.

    One histogram of `BINS` float32 counts a layer, or a layer and timestep: 8 kB each, however many values are seen.
    The first call sets the bin width and larger values double it, so nothing is ever cut off. With ``factors`` (layer
    -> ``[inputs]``) values are divided by the factor of their channel first.
    """

    def __init__(
        self,
        module: nn.Module,
        table: LayerTable,
        *,
        layers: Mapping[str, Any] | None = None,
        per_timestep: bool = False,
        factors: Mapping[str, Tensor] | None = None,
    ) -> None:
        wanted = table.by_name if layers is None else {n: table[n] for n in layers}
        self._root, self._table, self._factors = module, table, dict(factors or {})
        self._modules = {n: m for n, m in module.named_modules() if n in wanted}
        self._per_timestep = per_timestep
        self._now: Tensor | None = None
        self._clocks_before: dict[nn.Module, Any] = {}
        self._histograms: dict[tuple[str, float], _Histogram] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> RangeCollector:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(self._table[name]), with_kwargs=True))
        if self._per_timestep:
            parts = parts_of(self._root).values()
            self._clocks_before = {part: getattr(part, "timestep_clock", None) for part in parts}
            self._handles += watch_timesteps(self._root, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for part, before in self._clocks_before.items():
            del part.timestep_clock
            if before is not None:
                part.timestep_clock = before
        self._clocks_before = {}

    def set(self, t: Tensor | float) -> None:
        """Take note of the timestep of the coming call; the denoiser does this by itself."""
        self._now = torch.as_tensor(t).detach().reshape(-1).cpu().double()

    def _hook(self, layer: LayerSpec) -> Any:
        @torch.no_grad()
        def collect(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(args, kwargs).detach().float()
            if not x.numel():
                return
            if layer.name in self._factors:
                x = x / along_input(layer, self._factors[layer.name].to(x.device), x)
            for t, part in self._by_time(x, layer.name):
                self._histograms.setdefault((layer.name, t), _Histogram(layer.name)).add(part)

        return collect

    def _by_time(self, x: Tensor, name: str) -> Iterator[tuple[float, Tensor]]:
        if not self._per_timestep:
            yield 0.0, x
            return
        if self._now is None:
            raise ConfigError(
                f"{name}: ranges by timestep, but no timestep is known. Call the whole denoiser, not the layer."
            )
        times = one_a_sample(self._now, len(x), name) if len(self._now) > 1 else self._now
        for t in torch.unique(times).tolist():
            same = (times == t).to(x.device)
            yield t, x if len(same) == 1 or bool(same.all()) else x[same]

    def table(self, bits: Mapping[str, int], *, zero_points: bool = False) -> ActivationTable:
        """Scales for the given widths, from what was seen. Layers that never ran get a step of 1 and zero error.

        Every range is searched over `FACTORS` by which both ends shrink. With ``zero_points`` each end is cut where it
        costs least: all zero points are tried at every eighth factor, then all factors at the best of them. It takes no
        storage.

        Raises `ConfigError` when a width is asked for a layer that was not collected, or nothing was seen at all.
        """
        bits = {n: int(b) for n, b in bits.items() if b != FULL_PRECISION}
        steps = sorted({t for _, t in self._histograms})
        if not steps:
            raise ConfigError("RangeCollector: no call of the denoiser was seen while it was open")
        unknown = [n for n in bits if n not in self._modules]
        if unknown:
            raise ConfigError(f"RangeCollector: {unknown[0]!r} was not collected")
        searched = {n: self._searched(n, b, steps, zero_points) for n, b in bits.items()}
        scale, zero, error = ({n: values[k] for n, values in searched.items()} for k in range(3))
        return ActivationTable(
            model_digest=self._table.digest,
            bits=bits,
            scale=scale,
            zero=zero,
            error=error,
            timesteps=tuple(steps) if self._per_timestep and len(steps) > 1 else (),
        )

    def _searched(self, name: str, bits: int, steps: list[float], zero_points: bool) -> tuple[Tensor, ...]:
        """Scale, zero and error ``[T]`` of one layer; where it did not run, those of the nearest timestep where it
        did."""
        histograms = [self._histograms.get((name, t)) for t in steps]
        ran = [i for i, h in enumerate(histograms) if h is not None]
        results = _search([h for h in histograms if h is not None], bits, zero_points)
        nearest = [min(range(len(ran)), key=lambda k: abs(ran[k] - i)) if ran else 0 for i in range(len(steps))]
        return tuple(values[nearest] for values in results)


class _Histogram:
    """Counts over ``[-reach, reach]``, doubled as needed; smallest and largest value."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts = torch.zeros(BINS)
        self.reach = self.low = self.high = 0.0

    def add(self, x: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise NumericsError(f"layer {self.name!r}: its input holds NaN or infinity during activation calibration")
        peak = max(-low, high, 1e-30)
        self.reach = self.reach or peak
        while self.reach < peak:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(pairs, (BINS // 4, BINS // 4))
            self.reach *= 2
        self.counts += torch.histc(x, BINS, -self.reach, self.reach).cpu()
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def centres(self) -> Tensor:
        return (torch.arange(BINS) + 0.5) * (2 * self.reach / BINS) - self.reach


def search_range(values: Tensor, bits: int, *, zero_points: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the best range of ``bits`` bits for some values, as `RangeCollector` finds it."""
    seen = _Histogram("values")
    seen.add(values)
    scale, zero, _ = _search([seen], bits, zero_points)
    return scale[0].to(values), zero[0].to(values)


def _search(histograms: list[_Histogram], bits: int, zero_points: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero and mean squared error ``[T]`` of the best range for each histogram."""
    if not histograms:
        return torch.ones(1), torch.zeros(1), torch.zeros(1)
    top = 2**bits - 1
    low, high = (torch.tensor([getattr(h, side) for h in histograms]) for side in ("low", "high"))
    width = ((high - low) / top).clamp_min(1e-20)  # [T]; the range always holds zero
    zeros = (-low / width).round().clamp(0, top)  # shrinking both ends by one factor leaves the zero point as it is
    scales = stored_scale((width[:, None] * FACTORS).flatten()).view(len(histograms), -1)
    out = []
    for h, scale, zero in zip(histograms, scales, zeros, strict=True):
        seen = h.counts > 0
        # The edge bins hold the extremes themselves: their centres may lie outside the values that were seen.
        values, counts = h.centres[seen].clamp(h.low, h.high), h.counts[seen]
        candidates = [_best(values, counts, scale, zero.expand(len(scale)), top)]
        if zero_points:
            coarse, every = torch.meshgrid(scale[::8], torch.arange(top + 1.0), indexing="ij")
            rough = _best(values, counts, coarse.flatten(), every.flatten(), top)
            candidates.append(_best(values, counts, scale, rough[1].expand(len(scale)), top))
        out.append(min(candidates, key=lambda c: float(c[3])))
    s, z, e, _ = (torch.stack(list(v)) for v in zip(*out, strict=True))
    return s, z, e


def _best(
    values: Tensor, counts: Tensor, scales: Tensor, zeros: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of K quantizers ``[K]`` the one with the least ``sum |x - x_q|**P``: its scale, zero, mean squared error and that
    sum."""
    parts = []
    for part in range(0, len(scales), 128):  # as much as stays in cache
        square = _square(values, scales[part : part + 128, None], zeros[part : part + 128, None], top)
        parts.append(square.log2_().mul_(P / 2).exp2_() @ counts)  # vectorised, which pow is not
    sums = torch.cat(parts)
    b = int(sums.argmin())
    return scales[b], zeros[b], _square(values, scales[b], zeros[b], top) @ counts / counts.sum(), sums[b]


def _square(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return (values / scale).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale).sub_(values).square_()
