"""Activation quantization: a table of scales, and the quantizer that a layer's input passes through.

Asymmetric, with an integer zero point: ``x ~ scale * (code - zero)``. Scales are static and of the whole tensor, one a
timestep (TALSQ of EfficientDM), or one a token that is found as it comes (ZeroQuant, ViDiT-Q). A timestep-wise
quantizer looks its scale up by the *timestep that the denoiser is called with*, so guidance in one call or two, other
step counts and interrupted sampling all do what is meant; the released codes count calls instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable
from mpqsearch.core.formats import check_width
from mpqsearch.errors import ConfigError, LayerMismatchError, NumericsError
from mpqsearch.models.calls import TIMESTEP_ARGUMENTS
from mpqsearch.models.hooks import layer_input, with_input
from mpqsearch.models.runner import parts_of
from mpqsearch.quant.fake import as_stored, fake_quantize
from mpqsearch.quant.rows import stored_scale
from mpqsearch.quant.smoothing import along_input, smooth_inputs
from mpqsearch.quant.statistics import Statistics
from mpqsearch.untrusted import build


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
                    shape = "nothing" if name not in values else f"the shape {tuple(values[name].shape)}"
                    raise ConfigError(f"activation table, layer {name!r}: {what} needs {steps} values, found {shape}")
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
        wanted = bit_map.static_inputs(table)
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
        """Back from `to_data`. Raises `ArtifactError` for other data."""
        table = build(_StoredTable, data, "activation table")
        layers = table["layers"]
        return cls(
            model_digest=table["model_digest"],
            timesteps=table["timesteps"],
            bits={n: e["bits"] for n, e in layers.items()},
            scale={n: torch.tensor(e["scale"], dtype=torch.float32) for n, e in layers.items()},
            zero={n: torch.tensor(e["zero"], dtype=torch.float32) for n, e in layers.items()},
            error={n: torch.tensor(e["error"], dtype=torch.float32) for n, e in layers.items() if "error" in e},
        )


class _StoredRanges(TypedDict):
    bits: int
    scale: tuple[float, ...]
    zero: tuple[float, ...]
    error: NotRequired[tuple[float, ...]]


class _StoredTable(TypedDict):
    model_digest: str
    timesteps: tuple[float, ...]
    layers: Mapping[str, _StoredRanges]


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
    """Give ``module``, a whole denoiser or the `Parts` of several, a clock that each call sets; None for static scales.

    Calls of a denoiser are seen by a forward pre-hook, those of a method ``denoise`` by its runner. Raises
    `ConfigError` when a denoiser has no argument that could be the timestep.
    """
    if not timesteps:
        return None
    clock = TimestepClock(timesteps)
    watch_timesteps(module, clock)
    return clock


def watch_timesteps(module: nn.Module, clock: Any) -> list[Any]:
    """Let ``clock.set`` hear of the timestep of each call; handles of the hooks."""
    handles = []
    for part in parts_of(module).values():
        part.timestep_clock = clock
        if not hasattr(part, "denoise"):
            _timestep_argument(part)
            handles.append(part.register_forward_pre_hook(_read_clock, with_kwargs=True))
    return handles


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


class ActivationQuantizer(nn.Module):
    """What the input of a layer passes through: ``x -> scale (clip(round(x / scale) + zero) - zero)``.

    ``scale`` and ``zero`` are float32 parameters ``[T]``; the forward pass rounds them to what is stored (half
    precision with a shared exponent, an integer in the code range). Without them every token ``[..., features]`` has
    the scale that spans zero and all of its values. With smoothing factors the step of input channel ``i`` is
    ``scale / delta_i``: the same as quantizing ``x delta`` and dividing after, without a pass of its own.
    """

    scale: nn.Parameter | None
    zero: nn.Parameter | None
    top: Tensor
    factor: Tensor | None

    def __init__(
        self,
        layer: LayerSpec,
        bits: int,
        scale: Tensor | None,
        zero: Tensor | None,
        clock: TimestepClock | None,
        factor: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.bits, self.clock = layer, bits, clock
        for name, values in (("scale", scale), ("zero", zero)):
            stored = None if values is None else nn.Parameter(values.detach().clone().float(), requires_grad=False)
            self.register_parameter(name, stored)
        self.register_buffer("factor", factor, persistent=False)
        self.register_buffer("top", torch.tensor(float(2**bits - 1)), persistent=False)

    @property
    def static(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Scale and zero point; None where every token has its own."""
        return None if self.scale is None or self.zero is None else (self.scale, self.zero)

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized ``x``, in its dtype. Raises `ConfigError` when the timestep is not known or does not fit
        the batch."""
        factor = None if self.factor is None else along_input(self.layer, self.factor, x)
        values = x.float() if factor is None else x.float() / factor
        if self.static is None:
            rows = values.reshape(-1, x.shape[-1])
            scale, zero = spanning_range(rows, self.top)
        else:
            scale, zero = as_stored(*self.static, self.top)
            if len(scale) > 1:
                index = self._index(len(x)).to(scale.device)
                scale, zero = scale[index], zero[index]
            rows = values.reshape(len(scale), -1)  # one scale for all, or one a sample
        y = fake_quantize(rows, scale, zero, self.top.expand(len(scale))).reshape(x.shape)
        return (y if factor is None else y * factor).to(x.dtype)

    def _index(self, n: int) -> Tensor:
        index = self.clock.index if self.clock is not None else None
        if index is None:
            raise ConfigError(
                f"{self.layer.name}: scales by timestep, but no timestep is known. Call the whole denoiser, not the "
                "layer."
            )
        return index if len(index) == 1 else one_a_sample(index, n, self.layer.name)

    def extra_repr(self) -> str:
        """Width and number of scales."""
        return f"bits={self.bits}, scales={'by token' if self.scale is None else len(self.scale)}"


@torch.no_grad()
def spanning_range(rows: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[R]`` with which ``top + 1`` codes span zero and all values of a row of ``[R, L]``."""
    low, high = torch.aminmax(rows, dim=1)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / top).clamp_min(1e-20)
    return scale, (-low / scale).round()


def one_a_sample(values: Tensor, n: int, name: str) -> Tensor:
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


def input_quantizers(
    module: nn.Module,
    table: LayerTable,
    bit_map: BitMap,
    activations: ActivationTable | None,
    statistics: Statistics,
) -> dict[str, ActivationQuantizer]:
    """The quantizer of each layer's input that a map asks for, without a clock yet, on the device of the layer.

    Raises `ConfigError` when the map stores scales of inputs and there is no table of them.
    """
    wanted = {n: b for n, b in bit_map.activations.items() if b != FULL_PRECISION}
    if activations is not None:
        activations.check(table, bit_map)
    elif bit_map.static_inputs(table):
        raise ConfigError(
            "the bit map has activation widths: give the table of their scales (activations=...), calibrated for "
            "this map"
        )
    scales, zeros = ({}, {}) if activations is None else (activations.scale, activations.zero)
    factors = smooth_inputs(module, table, bit_map, statistics)
    modules: dict[str, Any] = dict(module.named_modules())
    return {
        name: ActivationQuantizer(table[name], bits, scales.get(name), zeros.get(name), None, factors.get(name)).to(
            modules[name].weight.device
        )
        for name, bits in wanted.items()
    }


def attach_quantizer(layer: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Put a quantizer in front of an ordinary layer, as its child ``input_quantizer``."""
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return with_input(args, kwargs, module.input_quantizer(layer_input(args, kwargs)))


def activation_table_of(module: nn.Module, table: LayerTable) -> ActivationTable | None:
    """The scales and zero points that a quantized model uses now, as they are stored; None when it stores none."""
    quantizers = {m.layer.name: m for m in module.modules() if isinstance(m, ActivationQuantizer)}
    ranges = {n: q.static for n, q in quantizers.items() if q.static is not None}
    if not ranges:
        return None
    clock = quantizers[next(iter(ranges))].clock
    return ActivationTable(
        model_digest=table.digest,
        bits={n: quantizers[n].bits for n in ranges},
        scale={n: stored_scale(s.detach()).cpu() for n, (s, _) in ranges.items()},
        zero={n: z.detach().round().clamp_min(0).minimum(quantizers[n].top).cpu() for n, (_, z) in ranges.items()},
        timesteps=() if clock is None else tuple(clock.timesteps.tolist()),
    )
