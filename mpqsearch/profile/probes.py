"""Gains from random probes: what an error in one channel or layer does to the model's output, to first order.

For an output ``f`` and a random ``v ~ N(0, I)``, ``E_v <d(v.f)/dy, dy>**2 = ||J dy||**2``: the squared change of the output that
``dy`` causes, with one backward pass a probe and no second derivatives (Gauss-Newton; no labels, no Hessian).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.core import LayerTable
from mpqsearch.errors import NumericsError
from mpqsearch.models import Denoiser, Given
from mpqsearch.quant import rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeInput:
    """One input of the denoiser as the sampler gives it: ``x`` ``[1, ...]``, timestep, condition and weight of its step."""

    x: Tensor
    timestep: int
    cond: Given
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """``gain``, ``gain_std_error``: layer -> ``[C]``. ``layer_error``, ``layer_error_std``: variant -> layer -> ``[W]``."""

    gain: Mapping[str, Tensor]
    gain_std_error: Mapping[str, Tensor]
    layer_error: Mapping[str, Mapping[str, Tensor]]
    layer_error_std: Mapping[str, Mapping[str, Tensor]]


class _Moments:
    """Running mean and standard error of a vector."""

    def __init__(self) -> None:
        self.n = 0
        self.total: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, value: Tensor) -> None:
        value = value.double()
        self.n += 1
        self.total = value.clone() if self.total is None else self.total + value
        self.square = value.square() if self.square is None else self.square + value.square()

    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.n

    def std_error(self) -> Tensor:
        assert self.square is not None
        variance = (self.square / self.n - self.mean().square()).clamp_min(0)
        return (variance / max(self.n - 1, 1)).sqrt()


def probe(
    denoiser: Denoiser,
    table: LayerTable,
    inputs: Sequence[ProbeInput],
    guidance: float,
    errors: Mapping[str, Mapping[str, Tensor]],
    means: Mapping[str, Tensor],
    *,
    probes: int = 2,
    seed: int = 0,
    tick: Callable[[int], Any] | None = None,
) -> ProbeResult:
    """Measure gains and first-order layer errors.

    errors
        Variant -> layer -> weight errors ``[W, C, D]`` of every width, as the quantizer makes them.
    means
        Layer -> mean unfolded input ``[G, D]``: the shift that bias correction takes out, in layers with a bias.

    One forward pass an input and one backward pass a probe. Leaves the model as it was. Raises `NumericsError` when the output
    is not finite.
    """
    modules = {name: m for name, m in denoiser.module.named_modules() if name in table.by_name}
    gains = {name: _Moments() for name in modules}
    layer_errors = {variant: {name: _Moments() for name in modules} for variant in errors}
    weights: dict[str, Any] = {name: m.weight for name, m in modules.items()}
    generator = torch.Generator().manual_seed(seed)
    captured: dict[str, list[Tensor]] = {}
    handles = [m.register_forward_hook(_keep_output(name, captured)) for name, m in modules.items()]
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for item in inputs:
            captured.clear()
            t = torch.full((1,), item.timestep, dtype=torch.long, device=item.x.device)
            output = denoiser.guided(item.x, t, item.cond, guidance)
            if not bool(torch.isfinite(output).all()):
                raise NumericsError(f"{denoiser.name}: the output is not finite at timestep {item.timestep}")
            flat = [(name, out) for name, outs in captured.items() for out in outs]
            for k in range(probes):
                v = torch.randn(output.shape, generator=generator).to(output)
                targets = [out for _, out in flat] + [weights[name] for name in captured]
                grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                    (v * output).sum(), targets, retain_graph=k + 1 < probes, allow_unused=True
                )
                by_output: dict[str, Tensor] = {}
                bias_grads: dict[str, Tensor] = {}
                for (name, _), g in zip(flat, grads[: len(flat)], strict=True):
                    if g is None:
                        continue
                    rows = g.movedim(-1 if isinstance(modules[name], nn.Linear) else 1, 0).flatten(1)
                    by_output[name] = by_output.get(name, 0) + rows.square().sum(1)
                    bias_grads[name] = bias_grads.get(name, 0) + rows.sum(1)
                for name, value in by_output.items():
                    gains[name].add(item.weight * value)
                for name, g in zip(captured, grads[len(flat) :], strict=True):
                    if g is None:
                        continue
                    _add_layer_errors(layer_errors, errors, means, table, name, g, bias_grads[name], item.weight)
            if tick is not None:
                tick(1)
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    n_widths = {v: next(iter(e.values())).shape[0] for v, e in errors.items()}

    def filled(m: _Moments, size: int, spread: bool) -> Tensor:
        if not m.n:  # a layer that never ran: its errors cost nothing
            return torch.zeros(size, dtype=torch.float64)
        return m.std_error() if spread else m.mean()

    return ProbeResult(
        gain={n: filled(m, table[n].n_channels, spread=False) for n, m in gains.items()},
        gain_std_error={n: filled(m, table[n].n_channels, spread=True) for n, m in gains.items()},
        layer_error={v: {n: filled(m, n_widths[v], spread=False) for n, m in e.items()} for v, e in layer_errors.items()},
        layer_error_std={v: {n: filled(m, n_widths[v], spread=True) for n, m in e.items()} for v, e in layer_errors.items()},
    )


def _add_layer_errors(
    store: dict[str, dict[str, _Moments]],
    errors: Mapping[str, Mapping[str, Tensor]],
    means: Mapping[str, Tensor],
    table: LayerTable,
    name: str,
    weight_grad: Tensor,
    bias_grad: Tensor,
    weight: float,
) -> None:
    """Add ``<grad - bias_grad m', E_b>**2`` for every width ``b``: the effect after the mean shift is folded into the bias."""
    layer = table[name]
    rows = rows_of(weight_grad.float(), layer)
    if layer.has_bias:
        mean = means[name].to(rows)
        rows = rows - bias_grad[:, None] * mean.repeat_interleave(len(rows) // len(mean), dim=0)
    for variant, by_layer in errors.items():
        error = by_layer[name]
        effect = error.flatten(1) @ rows.flatten()
        store[variant][name].add(weight * effect.square())


def _keep_output(name: str, captured: dict[str, list[Tensor]]) -> Any:
    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        captured.setdefault(name, []).append(output)

    return keep
