"""Gains from random probes: what an error in one channel or layer does to the model's output, to first order.

For an output ``f`` and a random ``v ~ N(0, I)``, ``E_v <d(v.f)/dy, dy>**2 = ||J dy||**2``: the squared change of the
output that ``dy`` causes, with one backward pass a probe and no second derivatives (Gauss-Newton; no labels, no
Hessian).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.errors import NumericsError
from mpqsearch.models import Denoiser, Given
from mpqsearch.profile.taps import GradientTap, checkpointed
from mpqsearch.quant.tables import EVERY, error_part, error_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeInput:
    """One input of the denoiser as the sampler gives it: ``x`` ``[1, ...]``, timestep, condition and weight of its
    step."""

    x: Tensor
    timestep: int
    cond: Given
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What probes found, each with its standard error over inputs and probes.

    ``sensitivity``, ``sensitivity_std_error``: layer -> ``[C]``. ``layer_error``, ``layer_error_std``: variant -> layer -> ``[W]``.
    ``step_sensitivity``, ``step_sensitivity_std``: layer -> ``[C, B]``, the gain inside each bucket of timesteps (0 where a bucket
    had no input).
    """

    gain: Mapping[str, Tensor]
    sensitivity_std_error: Mapping[str, Tensor]
    layer_error: Mapping[str, Mapping[str, Tensor]]
    layer_error_std: Mapping[str, Mapping[str, Tensor]]
    step_sensitivity: Mapping[str, Tensor]
    step_sensitivity_std: Mapping[str, Tensor]


class Moments:
    """Running mean and standard error of a vector; `add` may be called again after the mean has been read."""

    def __init__(self) -> None:
        self.n = 0
        self.total: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, value: Tensor) -> None:
        """One more observation."""
        value = value.double()
        self.n += 1
        self.total = value.clone() if self.total is None else self.total + value
        self.square = value.square() if self.square is None else self.square + value.square()

    def mean(self, size: int) -> Tensor:
        """Mean ``[size]``; zeros when nothing was observed: a layer that never ran costs nothing."""
        return torch.zeros(size, dtype=torch.float64) if self.total is None else self.total / self.n

    def std_error(self, size: int) -> Tensor:
        """Standard error of the mean ``[size]``; zeros from fewer than two observations."""
        if self.square is None or self.n < 2:
            return torch.zeros(size, dtype=torch.float64)
        variance = (self.square / self.n - self.mean(size).square()).clamp_min(0)
        return (variance / (self.n - 1)).sqrt()


class Prober:
    """Probes of the denoiser's output that can go on: call `run` with more inputs until `result` is precise enough.

    errors
        Variant -> layer -> weight errors ``[W, C, D]`` of every width, as the quantizer makes them.
    means
        Layer -> mean unfolded input ``[G, D]``: the shift that bias correction takes out, in layers with a bias.
    buckets
        Number of buckets of equal width into which the timesteps of the schedule are divided.
    checkpoint
        Recompute activations in the backward pass where the model can: memory of one block for twice the forward time.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        table: LayerTable,
        guidance: float,
        errors: Mapping[str, Mapping[str, Tensor]],
        means: Mapping[str, Tensor],
        *,
        probes: int = 2,
        seed: int = 0,
        buckets: int = 5,
        checkpoint: bool = False,
    ) -> None:
        self._denoiser, self._table, self._guidance = denoiser, table, guidance
        self._errors, self._means, self._probes, self._checkpoint = errors, means, probes, checkpoint
        self._generator = torch.Generator().manual_seed(seed)
        self._timesteps = int(denoiser.scheduler.get("num_train_timesteps", 1000))
        self._gain = {la.name: Moments() for la in table}
        self._step_sensitivity = {la.name: [Moments() for _ in range(buckets)] for la in table}
        self._layer_error = {v: {la.name: Moments() for la in table} for v in errors}

    def run(self, inputs: Sequence[ProbeInput], tick: Callable[[int], Any] | None = None) -> None:
        """One forward pass an input and one backward pass a probe. Leaves the model as it was.

        Raises `NumericsError` when the output is not finite.
        """
        with (
            checkpointed(self._denoiser.module, self._checkpoint),
            GradientTap(self._denoiser.module, self._table) as tap,
        ):
            for item in inputs:
                t = torch.full((1,), item.timestep, dtype=torch.long, device=item.x.device)
                with torch.enable_grad():
                    output = self._denoiser.guided(item.x, t, item.cond, self._guidance)
                if not bool(torch.isfinite(output).all()):
                    raise NumericsError(f"{self._denoiser.name}: the output is not finite at timestep {item.timestep}")
                sink = self._sink(item)
                for k in range(self._probes):
                    v = torch.randn(output.shape, generator=self._generator).to(output)
                    tap.backward((v * output).sum(), sink, keep_graph=k + 1 < self._probes)
                if tick is not None:
                    tick(1)

    def result(self) -> ProbeResult:
        """What has been found so far."""
        n_widths = {v: next(iter(e.values())).shape[0] for v, e in self._errors.items()}
        size = {la.name: la.n_channels for la in self._table}
        return ProbeResult(
            gain={n: m.mean(size[n]) for n, m in self._gain.items()},
            sensitivity_std_error={n: m.std_error(size[n]) for n, m in self._gain.items()},
            layer_error={v: {n: m.mean(n_widths[v]) for n, m in e.items()} for v, e in self._layer_error.items()},
            layer_error_std={
                v: {n: m.std_error(n_widths[v]) for n, m in e.items()} for v, e in self._layer_error.items()
            },
            step_sensitivity={
                n: torch.stack([m.mean(size[n]) for m in ms], 1) for n, ms in self._step_sensitivity.items()
            },
            step_sensitivity_std={
                n: torch.stack([m.std_error(size[n]) for m in ms], 1) for n, ms in self._step_sensitivity.items()
            },
        )

    def _sink(self, item: ProbeInput) -> Callable[[str, Tensor, Tensor, Tensor], None]:
        def take(name: str, rows: Tensor, bias: Tensor, square: Tensor) -> None:
            gain = item.weight * square.cpu()
            self._gain[name].add(gain)
            buckets = self._step_sensitivity[name]
            buckets[min(item.timestep * len(buckets) // self._timesteps, len(buckets) - 1)].add(gain)
            layer = self._table[name]
            effect: dict[str, Tensor] = {}
            for part in error_rows(next(iter(self._errors.values())), layer):
                some = corrected(rows, bias, self._means[name], layer, part)
                for variant, by_layer in self._errors.items():
                    error = error_part(by_layer, name, part)
                    found = (error.flatten(1) @ some.flatten().to(error)).cpu()
                    effect[variant] = effect[variant] + found if variant in effect else found
            for variant, whole in effect.items():
                self._layer_error[variant][name].add(item.weight * whole.square())

        return take


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
    """Measure gains and first-order layer errors of the denoiser's output in one go: see `Prober`."""
    prober = Prober(denoiser, table, guidance, errors, means, probes=probes, seed=seed)
    prober.run(inputs, tick)
    return prober.result()


def corrected(rows: Tensor, bias: Tensor, mean: Tensor, layer: LayerSpec, part: slice = EVERY) -> Tensor:
    """Weight gradient ``[C, D]``, or that of some rows, after the mean shift of a weight error is folded into the bias:
    ``dW - db m'``.

    No bias, no change.
    """
    if not layer.has_bias:
        return rows[part]
    groups = torch.arange(len(rows), device=rows.device)[part] // (len(rows) // len(mean))
    return rows[part] - bias[part, None] * mean.to(rows)[groups]
