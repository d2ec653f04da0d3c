"""Activation quantization: range search on histograms, a table of scales, and the quantizer that a layer's input passes
through.

Per tensor, asymmetric, with an integer zero point: ``x ~ scale * (code - zero)``. Scales are static, or one a timestep
(TALSQ of EfficientDM). A timestep-wise quantizer looks its scale up by the *timestep that the denoiser is called with*,
so guidance in one call or two, other step counts and interrupted sampling all do what is meant; the released codes
count calls instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable
from mpqsearch.core.formats import check_width
from mpqsearch.errors import ConfigError, LayerMismatchError, NumericsError
from mpqsearch.models.calls import TIMESTEP_ARGUMENTS
from mpqsearch.quant.rows import rows_of, stored_scale
from mpqsearch.quant.search import run_in_shares, takes_compiled
from mpqsearch.quant.tables import stored_factors
from mpqsearch.specs import ActivationSearch

BINS = 2048
"""Bins of a histogram, over both signs. With data of one sign a step of 8 bits spans at least two of them, one of 4
bits 34."""


@dataclass(frozen=True, kw_only=True)
class ActivationTable:
    """Scales and zero points of the inputs of layers.

    ``bits``: layer -> width 1..8. ``scale``, ``zero``: layer -> float32 ``[T]``, ``scale > 0`` and ``zero`` an integer
    in the code range. ``timesteps``: the ``T`` calibrated timesteps in ascending order; empty for static scales, then
    ``T`` is 1. ``error``: layer -> mean squared error ``[T]`` of the values that were seen, in the smoothed units when
    the layer is smoothed.
    """

    model_digest: str
    bits: Mapping[str, int]
    scale: Mapping[str, Tensor]
    zero: Mapping[str, Tensor]
    timesteps: tuple[float, ...] = ()
    error: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = max(1, len(self.timesteps))
        if list(self.timesteps) != sorted(set(self.timesteps)):
            raise ConfigError(f"activation table: timesteps must ascend and differ, got {list(self.timesteps)}")
        for name, bits in self.bits.items():
            check_width(bits, f"activation table, layer {name!r}")
            if bits == FULL_PRECISION:
                raise ConfigError(f"activation table: {name!r} is at full precision; leave it out")
            for what, values in (("scale", self.scale), ("zero", self.zero)):
                if name not in values or tuple(values[name].shape) != (steps,):
                    found = "nothing" if name not in values else f"the shape {tuple(values[name].shape)}"
                    raise ConfigError(f"activation table, layer {name!r}: {what} needs {steps} values, found {found}")
            if not bool((self.scale[name] > 0).all()) or not bool(torch.isfinite(self.scale[name]).all()):
                raise NumericsError(f"activation table, layer {name!r}: scales must be positive and finite")

    @property
    def steps(self) -> int:
        """Scales that each layer stores."""
        return max(1, len(self.timesteps))

    def check(self, table: LayerTable, bit_map: BitMap) -> None:
        """Raise `LayerMismatchError` unless the table is for this model and has the widths of the map."""
        if self.model_digest != table.digest:
            raise LayerMismatchError(
                f"the activation table was calibrated on the model {self.model_digest[:12]}, this one is "
                f"{table.digest[:12]}; calibrate again"
            )
        wanted = {n: b for n, b in bit_map.activations.items() if b != FULL_PRECISION}
        if dict(self.bits) != wanted:
            differ = [n for n in {**wanted, **self.bits} if wanted.get(n) != self.bits.get(n)]
            n = differ[0]
            raise LayerMismatchError(
                f"the activation table and the bit map differ in {len(differ)} layers, first {n!r}: "
                f"{self.bits.get(n, 'none')} bits calibrated, {wanted.get(n, 'none')} asked. Calibrate for this map."
            )
        if wanted and bit_map.activation_steps != self.steps:
            raise LayerMismatchError(
                f"the bit map counts {bit_map.activation_steps} activation scales a layer, the table has {self.steps} "
                f"(timesteps {list(self.timesteps)}). Calibrate with the sampler that the map was made for."
            )

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "model_digest": self.model_digest,
            "timesteps": list(self.timesteps),
            "layers": {
                n: {
                    "bits": b,
                    "scale": self.scale[n].tolist(),
                    "zero": self.zero[n].tolist(),
                    **({"error": self.error[n].tolist()} if n in self.error else {}),
                }
                for n, b in self.bits.items()
            },
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> ActivationTable:
        """Back from `to_data`."""
        layers = data["layers"]
        return cls(
            model_digest=data["model_digest"],
            timesteps=tuple(data["timesteps"]),
            bits={n: e["bits"] for n, e in layers.items()},
            scale={n: torch.tensor(e["scale"], dtype=torch.float32) for n, e in layers.items()},
            zero={n: torch.tensor(e["zero"], dtype=torch.float32) for n, e in layers.items()},
            error={n: torch.tensor(e["error"], dtype=torch.float32) for n, e in layers.items() if "error" in e},
        )


class TimestepClock:
    """What a quantized model knows of the time: the nearest calibrated timestep of the present call, or one for each of
    its samples."""

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        self.index: Tensor | None = None

    def set(self, t: Tensor | float) -> None:
        """Take note of the timestep of a call: one number, or one a sample ``[N]``."""
        now = torch.as_tensor(t).detach().reshape(-1, 1)
        if now.device.type == "cpu" and bool((now == now[0]).all()):  # elsewhere asking would wait for the device
            now = now[:1]
        self.timesteps = self.timesteps.to(now.device)
        self.index = (now.to(self.timesteps.dtype) - self.timesteps).abs().argmin(1)


def attach_clock(module: nn.Module, timesteps: tuple[float, ...]) -> TimestepClock | None:
    """Give ``module``, the whole denoiser, a clock that each call sets; None for static scales.

    Calls of the module itself are seen by a forward pre-hook, calls through `Denoiser` by that (a module of the user's
    with a method ``denoise`` need not call itself). Raises `ConfigError` when the module has no argument that could be
    the timestep.
    """
    if not timesteps:
        return None
    clock = TimestepClock(timesteps)
    _watch(module, clock)
    return clock


def _watch(module: nn.Module, clock: Any) -> list[Any]:
    """Let ``clock.set`` hear of the timestep of each call; handles of the hooks."""
    module.timestep_clock = clock
    if hasattr(module, "denoise"):
        return []
    _timestep_argument(module)
    return [module.register_forward_pre_hook(_read_clock, with_kwargs=True)]


def _read_clock(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name, position = _timestep_argument(module)
    value = kwargs[name] if name in kwargs else args[position]
    module.timestep_clock.set(value)  # type: ignore[operator, union-attr]


def _timestep_argument(module: nn.Module) -> tuple[str, int]:
    names = list(inspect.signature(module.forward).parameters)
    for name in TIMESTEP_ARGUMENTS:
        if name in names:
            return name, names.index(name)
    raise ConfigError(
        f"{type(module).__name__}.forward({', '.join(names)}) has no argument 'timestep': scales by timestep need to "
        "know it. "
        "Name it so, give the module a method denoise(x, t, cond), or use static scales."
    )


class _QuantizeActivation(torch.autograd.Function):
    """Fake quantization of a tensor with one step for all, or one a sample; straight-through and LSQ gradients.

    With ``S`` the step (of an element), ``q`` the code and ``inside`` where the code was not clipped: ``dy/dx =
    inside``, ``dy/dS = (y - x inside) / S`` and ``dy/dz = -S (1 - inside)``; roundings of scale and zero point to what
    is stored count as the identity.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        index: Tensor | None,
        factor: Tensor | None,
        top: int,
        lsq: bool,
    ) -> Tensor:
        s, z = stored_scale(scale), zero.round().clamp(0, top)
        shape = (-1,) + (1,) * (x.dim() - 1)
        if index is not None:
            s, z = s[index], z[index]
        s, z = s.view(shape), z.view(shape)
        step = s if factor is None else s * factor
        codes = torch.div(x, step).add_(z).round_()
        needs = ctx.needs_input_grad
        if any(needs[:3]):
            out = codes.clamp(0, top).sub_(z).mul_(step)
            ctx.save_for_backward(codes, x if needs[1] else None, out if needs[1] else None, s, index, factor)
            ctx.steps, ctx.top, ctx.lsq = len(scale), top, lsq
            return out
        return codes.clamp_(0, top).sub_(z).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        codes, x, out, s, index, factor = ctx.saved_tensors
        # The gradient where the code was in range, else 0, in one pass; codes are integers, so the open interval is the
        # closed range.
        gx = torch.ops.aten.hardtanh_backward(grad, codes, -0.5, ctx.top + 0.5)
        parts = 1 if index is None else len(index)  # sums by sample, or over everything
        gs = gz = None
        weight = (grad.numel() / parts * ctx.top) ** -0.5 if ctx.lsq else 1.0
        if ctx.needs_input_grad[1]:
            gs = (_dots(grad, out, parts) - _dots(gx, x, parts)) / s.view(-1) * weight
        if ctx.needs_input_grad[2]:
            lost = grad - gx if factor is None else (grad - gx).mul_(factor)
            lost = lost.reshape(parts, -1).sum(1)
            gz = -lost * s.view(-1) * weight
        if index is not None:
            gs, gz = (None if g is None else g.new_zeros(ctx.steps).index_add_(0, index, g) for g in (gs, gz))
        return (gx if ctx.needs_input_grad[0] else None), gs, gz, None, None, None, None


class _CompiledQuantizeActivation(torch.autograd.Function):
    """The same in one compiled pass each way, which keeps nothing but the input; codes are equal bit for bit."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        index: Tensor | None,
        factor: Tensor | None,
        top: int,
        lsq: bool,
    ) -> Tensor:
        x = x.detach().contiguous()
        s, z = stored_scale(scale), zero.round().clamp(0, top)
        if index is not None:
            s, z = s[index], z[index]
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(x, s, z, index, factor)
            ctx.steps, ctx.top, ctx.lsq = scale.shape[0], top, lsq
        out = torch.empty_like(x)
        rows, *constants = _rows_and_steps(x, s, z, factor)
        run_in_shares("fake_quantize", (rows, out.view_as(rows)), (*constants, np.float32(top)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, z, index, factor = ctx.saved_tensors
        grad, gx = grads[0].contiguous(), torch.empty_like(x)
        rows, *constants = _rows_and_steps(x, s, z, factor)
        sums = torch.empty(2, rows.shape[0], dtype=torch.float64)
        by_row = (rows, grad.view_as(rows), gx.view_as(rows), sums[0], sums[1])
        run_in_shares("fake_quantize_gradients", by_row, (*constants, np.float32(ctx.top)))
        parts = s.shape[0]
        gs, gz = (
            sums.view(2, parts, -1)
            .sum(2, dtype=torch.float32)
            .mul_((grad.numel() / parts * ctx.top) ** -0.5 if ctx.lsq else 1.0)
        )
        gs.div_(s)
        if index is not None:
            gs, gz = (g.new_zeros(ctx.steps).index_add_(0, index, g) for g in (gs, gz))
        return gx, gs, gz, None, None, None, None


def _rows_and_steps(x: Tensor, s: Tensor, z: Tensor, factor: Tensor | None) -> tuple[Tensor, Any, Any, int]:
    """``x`` as rows ``[R, L]``, steps ``[K, 1]`` or ``[K, L]``, zero points ``[K]`` and how many rows in turn share
    one: as the kernels take them."""
    if factor is None:
        rows, steps = x.view(x.shape[0], -1), s[:, None]
    elif factor.dim() == 1:  # of the last dimension
        rows, steps = x.view(-1, factor.shape[0]), s[:, None] * factor
    else:
        n, c = x.shape[0], factor.shape[0]
        rows, steps = x.view(n * c, -1), (s[:, None] * factor.view(1, c)).expand(n, c).reshape(-1, 1)
        z = z[:, None].expand(n, c).reshape(-1)
    return rows, steps.numpy(), z.numpy(), rows.shape[0] // steps.shape[0]


def _dots(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """``sum a b`` ``[parts]`` of each of equal parts; of a single one without the product in memory."""
    if parts == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1))[None]
    dots: Tensor = torch.linalg.vecdot(a.reshape(parts, -1), b.reshape(parts, -1))
    return dots


class ActivationQuantizer(nn.Module):
    """What the input of a layer passes through: ``x -> scale (clip(round(x / scale) + zero) - zero)``.

    ``scale`` and ``zero`` are float32 parameters ``[T]``; the forward pass rounds them to what is stored (half
    precision with a shared exponent, an integer in the code range). With smoothing factors the step of input channel
    ``i`` is ``scale / delta_i``: the same as quantizing ``x delta`` and dividing after, without a pass of its own.
    """

    scale: nn.Parameter
    zero: nn.Parameter
    factor: Tensor | None

    def __init__(
        self,
        layer: LayerSpec,
        bits: int,
        scale: Tensor,
        zero: Tensor,
        clock: TimestepClock | None,
        factor: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.name, self.bits, self.top = layer.name, bits, 2**bits - 1
        self.clock = clock
        self.channels_last = layer.kind == "Linear"
        self.scale = nn.Parameter(scale.detach().clone().float(), requires_grad=False)
        self.zero = nn.Parameter(zero.detach().clone().float(), requires_grad=False)
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized ``x``, in its dtype. Raises `ConfigError` when the timestep is not known or does not fit
        the batch."""
        index = self._index(len(x)) if len(self.scale) > 1 else None
        factor = self.factor
        if factor is not None and not self.channels_last:
            factor = factor.view(-1, *(1,) * (x.dim() - 2))
        wanted = x.float()
        quantize = _CompiledQuantizeActivation if takes_compiled(wanted) else _QuantizeActivation
        y: Tensor = quantize.apply(wanted, self.scale, self.zero, index, factor, self.top, True)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)

    def _index(self, n: int) -> Tensor:
        index = self.clock.index if self.clock is not None else None
        if index is None:
            raise ConfigError(
                f"{self.name}: scales by timestep, but no timestep is known. Call the whole denoiser, not the layer."
            )
        return index if len(index) == 1 else _fit_batch(index, n, self.name)

    def extra_repr(self) -> str:
        """Width and number of scales."""
        return f"bits={self.bits}, scales={len(self.scale)}"


def _fit_batch(values: Tensor, n: int, name: str) -> Tensor:
    """One value a sample for a batch of ``n``: one for all, or frames and windows folded into the batch sample by
    sample."""
    if len(values) == n:
        return values
    if n % len(values) == 0:
        return values.repeat_interleave(n // len(values))
    if bool((values == values[0]).all()):
        return values[:1].expand(n)
    raise ConfigError(
        f"{name}: a batch of {n} with {len(values)} different timesteps; which belongs to which is not known"
    )


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
        self._clock_before: Any = None
        self._histograms: dict[tuple[str, float], _Histogram] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> RangeCollector:
        self._handles += [m.register_forward_pre_hook(self._hook(n)) for n, m in self._modules.items()]
        if self._per_timestep:
            self._clock_before = getattr(self._root, "timestep_clock", None)
            self._handles += _watch(self._root, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._per_timestep:
            del self._root.timestep_clock
            if self._clock_before is not None:
                self._root.timestep_clock = self._clock_before

    def set(self, t: Tensor | float) -> None:
        """Take note of the timestep of the coming call; the denoiser does this by itself."""
        self._now = torch.as_tensor(t).detach().reshape(-1).double()

    def _hook(self, name: str) -> Any:
        factor = self._factors.get(name)
        channels_last = self._table[name].kind == "Linear"

        @torch.no_grad()
        def collect(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            if factor is not None:
                x = x / (factor if channels_last else factor.view(-1, *(1,) * (x.dim() - 2)))
            if not self._per_timestep:
                self._histograms.setdefault((name, 0), _Histogram(name)).add(x)
                return
            if self._now is None:
                raise ConfigError(
                    f"{name}: ranges by timestep, but no timestep is known. Call the whole denoiser, not the layer."
                )
            for t in torch.unique(self._now).tolist():
                mine = x
                if not bool((self._now == t).all()):
                    mine = x[_fit_batch(self._now == t, len(x), name)]
                self._histograms.setdefault((name, t), _Histogram(name)).add(mine)

        return collect

    def table(self, bits: Mapping[str, int], search: ActivationSearch | None = None) -> ActivationTable:
        """Scales for the given widths, from what was seen. Layers that never ran get a step of 1 and zero error.

        Raises `ConfigError` when a width is asked for a layer that was not collected, or nothing was seen at all.
        """
        search = search or ActivationSearch()
        bits = {n: int(b) for n, b in bits.items() if b != FULL_PRECISION}
        steps = sorted({t for _, t in self._histograms})
        if not steps:
            raise ConfigError("RangeCollector: no call of the denoiser was seen while it was open")
        scale, zero, error = {}, {}, {}
        for name, b in bits.items():
            if name not in self._modules:
                raise ConfigError(f"RangeCollector: {name!r} was not collected")
            found = [self._histograms.get((name, t)) for t in steps]
            scale[name], zero[name], error[name] = _search([h for h in found if h is not None], b, search)
            if len(scale[name]) != len(steps):
                scale[name], zero[name], error[name] = (
                    _spread(v, found) for v in (scale[name], zero[name], error[name])
                )
        return ActivationTable(
            model_digest=self._table.digest,
            bits=bits,
            scale=scale,
            zero=zero,
            error=error,
            timesteps=tuple(steps) if self._per_timestep and len(steps) > 1 else (),
        )


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


def search_range(values: Tensor, bits: int, search: ActivationSearch) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the best range of ``bits`` bits for some values, as `RangeCollector` finds it."""
    seen = _Histogram("values")
    seen.add(values)
    scale, zero, _ = _search([seen], bits, search)
    return scale[0].to(values), zero[0].to(values)


def _search(histograms: list[_Histogram], bits: int, search: ActivationSearch) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero and mean squared error ``[T]`` of the best range for each histogram."""
    if not histograms:
        return torch.ones(1), torch.zeros(1), torch.zeros(1)
    top = 2**bits - 1
    factors = 1 - 0.8 * torch.arange(search.n_candidates, dtype=torch.float32) / search.n_candidates
    low, high = (torch.tensor([getattr(h, side) for h in histograms]) for side in ("low", "high"))
    width = ((high - low) / top).clamp_min(1e-20)  # [T]; the range always holds zero
    zeros = (-low / width).round().clamp(0, top)  # shrinking both ends by one factor leaves the zero point as it is
    scales = stored_scale((width[:, None] * factors).flatten()).view(len(histograms), -1)
    out = []
    for h, scale, zero in zip(histograms, scales, zeros, strict=True):
        seen = h.counts > 0
        # The edge bins hold the extremes themselves: their centres may lie outside the values that were seen.
        values, counts = h.centres[seen].clamp(h.low, h.high), h.counts[seen]
        found = [_best(values, counts, scale, zero.expand(len(scale)), top, search.p)]
        if search.zero_points:
            coarse, zero_points = torch.meshgrid(scale[::8], torch.arange(top + 1.0), indexing="ij")
            rough = _best(values, counts, coarse.flatten(), zero_points.flatten(), top, search.p)
            found.append(_best(values, counts, scale, rough[1].expand(len(scale)), top, search.p))
        out.append(min(found, key=lambda f: float(f[3])))
    s, z, e, _ = (torch.stack(list(v)) for v in zip(*out, strict=True))
    return s, z, e


def _best(
    values: Tensor, counts: Tensor, scales: Tensor, zeros: Tensor, top: int, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of K quantizers ``[K]`` the one with the least ``sum |x - x_q|**p``: its scale, zero, mean squared error and that
    sum."""
    sums = torch.empty(len(scales))
    for part in range(0, len(scales), 128):  # as much as stays in cache
        s, z = scales[part : part + 128, None], zeros[part : part + 128, None]
        square = (values / s).add_(z).round_().clamp_(0, top).sub_(z).mul_(s).sub_(values).square_()
        sums[part : part + 128] = square.log2_().mul_(p / 2).exp2_() @ counts  # vectorised, which pow is not
    b = int(sums.argmin())
    square = (
        (values / scales[b])
        .add_(zeros[b])
        .round_()
        .clamp_(0, top)
        .sub_(zeros[b])
        .mul_(scales[b])
        .sub_(values)
        .square_()
    )
    return scales[b], zeros[b], square @ counts / counts.sum(), sums[b]


def _spread(values: Tensor, found: list[_Histogram | None]) -> Tensor:
    """Values ``[T]`` for all timesteps when a layer did not run at some: the nearest known one."""
    known = [i for i, h in enumerate(found) if h is not None]
    if not known:
        return values[:1].expand(len(found)).clone()
    nearest = [min(range(len(known)), key=lambda k: abs(known[k] - i)) for i in range(len(found))]
    return values[nearest]


def input_factors(layer: LayerSpec, factor: Tensor) -> Tensor:
    """Smoothing factors by input channel ``[inputs]`` from those by column ``[G, D]``."""
    per_input = layer.weights_per_channel // (layer.n_inputs // layer.groups)
    return factor.reshape(layer.groups, -1, per_input)[:, :, 0].flatten()


def smooth_inputs(
    module: nn.Module, table: LayerTable, bit_map: BitMap, input_max: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Factors ``[inputs]`` of the layers whose activations are quantized and whose format smooths: what
    `RangeCollector` divides by."""
    modules: dict[str, Any] = dict(module.named_modules())
    out = {}
    for name, bits in bit_map.activations.items():
        fmt = bit_map.format_of(name)
        if bits == FULL_PRECISION or not fmt.smooth:
            continue
        if input_max is None or name not in input_max:
            raise ConfigError(f"{name}: a smoothed format needs the input maxima of a profile")
        layer = table[name]
        rows = rows_of(modules[name].weight.detach().float(), layer)
        out[name] = input_factors(layer, stored_factors(rows, input_max[name], layer, fmt.alpha))
    return out


def input_quantizers(
    module: nn.Module,
    table: LayerTable,
    bit_map: BitMap,
    activations: ActivationTable | None,
    input_max: Mapping[str, Tensor] | None,
) -> dict[str, ActivationQuantizer]:
    """The quantizer of each layer's input that a map asks for, without a clock yet, on the device of the layer.

    Raises `ConfigError` when the map has activation widths and there is no table of scales.
    """
    if activations is None:
        if any(b != FULL_PRECISION for b in bit_map.activations.values()):
            raise ConfigError(
                "the bit map has activation widths: give the table of their scales (activations=...), calibrated for "
                "this map"
            )
        return {}
    activations.check(table, bit_map)
    factors = smooth_inputs(module, table, bit_map, input_max)
    modules: dict[str, Any] = dict(module.named_modules())
    return {
        name: ActivationQuantizer(
            table[name], bits, activations.scale[name], activations.zero[name], None, factors.get(name)
        ).to(modules[name].weight.device)
        for name, bits in activations.bits.items()
    }


def attach_quantizer(layer: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Put a quantizer in front of an ordinary layer, as its child ``input_quantizer``."""
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.input_quantizer(args[0]), *args[1:])  # type: ignore[operator]


def activation_table_of(module: nn.Module, table: LayerTable) -> ActivationTable | None:
    """The scales and zero points that a quantized model uses now, as they are stored; None when it quantizes no
    activations."""
    found = {m.name: m for m in module.modules() if isinstance(m, ActivationQuantizer)}
    if not found:
        return None
    clock = getattr(module, "timestep_clock", None)
    return ActivationTable(
        model_digest=table.digest,
        bits={n: q.bits for n, q in found.items()},
        scale={n: stored_scale(q.scale.detach()).cpu() for n, q in found.items()},
        zero={n: q.zero.detach().round().clamp(0, q.top).cpu() for n, q in found.items()},
        timesteps=() if clock is None else tuple(int(t) for t in clock.timesteps),
    )
