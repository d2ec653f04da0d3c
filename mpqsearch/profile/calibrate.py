"""One calibration pass over the sampler's own trajectory, or over recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.models import Denoiser
from mpqsearch.models.denoiser import Given
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.quant import RowStatistics
from mpqsearch.sampling import labels_of, noise_of, trajectory
from mpqsearch.specs import CalibrationSpec, SamplerSpec

Progress = Callable[[str, int, int], None]
"""Called with a label, the number of finished units and their total."""


def silent(_label: str, _done: int, _total: int) -> None:
    """Progress of callers that want none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeInput:
    """One input of the denoiser as the sampler gives it: ``x`` ``[N, ...]``, its timestep and condition."""

    x: Tensor
    timestep: int
    cond: Given

    def times(self) -> Tensor:
        """The timestep of every sample ``[N]``."""
        return torch.full((len(self.x),), self.timestep, dtype=torch.long, device=self.x.device)

    def singles(self) -> list[ProbeInput]:
        """Every sample by itself; a recorded call stays whole."""
        if isinstance(self.cond, Tensor) or self.cond is None:
            conditions = [self.cond if self.cond is None else self.cond[i : i + 1] for i in range(len(self.x))]
            return [replace(self, x=self.x[i : i + 1].clone(), cond=c) for i, c in enumerate(conditions)]
        return [self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What one pass has seen: ``statistics`` of the inputs of every layer (zeros where it never ran), ``output_power``
    ``[C]``, the ``inputs`` to measure sensitivities at, and the layers whose input was ``constant``."""

    statistics: Mapping[str, RowStatistics]
    output_power: Mapping[str, Tensor]
    inputs: Sequence[ProbeInput]
    constant: tuple[str, ...]

    @property
    def means(self) -> dict[str, Tensor]:
        """Mean input ``[G, D]`` of every layer, float32."""
        return {name: s.mean.float() for name, s in self.statistics.items()}


def n_calls(denoiser: Denoiser, sampler: SamplerSpec, n_seeds: int) -> int:
    """How many calls `calls_of` makes."""
    return len(denoiser.calls) or -(-n_seeds // sampler.batch) * sampler.steps


def calls_of(
    denoiser: Denoiser, sampler: SamplerSpec, seeds: Sequence[int], *, batch: int = 0
) -> Iterator[tuple[ProbeInput, Tensor]]:
    """Call the denoiser on all calibration inputs, the same each time: yields the input of every call and its
    prediction.

    The trajectories of ``seeds``, ``batch`` (default: the sampler's) at a time; or the denoiser's recorded calls, if it
    has any.
    """
    device = next(denoiser.module.parameters()).device
    for call in denoiser.calls:
        time = int(call.timestep) if np.isfinite(call.timestep) else 0
        yield ProbeInput(x=call.sample.to(device), timestep=time, cond=call), call.replay(denoiser.module)
    if len(denoiser.calls):
        return
    for start in range(0, len(seeds), batch or sampler.batch):
        part = seeds[start : start + (batch or sampler.batch)]
        cond = labels_of(denoiser, part)
        cond = cond.to(device) if isinstance(cond, Tensor) else cond
        for step in trajectory(denoiser, noise_of(part, denoiser.sample_shape).to(device), cond, sampler):
            yield ProbeInput(x=step.x, timestep=step.timestep, cond=cond), step.prediction


@torch.no_grad()
def run_sampler(
    denoiser: Denoiser, sampler: SamplerSpec, seeds: Sequence[int], label: str, progress: Progress = silent
) -> None:
    """Make the calls of `calls_of` for the sake of hooks on the layers."""
    total = n_calls(denoiser, sampler, len(seeds))
    for done, _ in enumerate(calls_of(denoiser, sampler, seeds), start=1):
        progress(label, done, total)


@torch.no_grad()
def calibrate(
    denoiser: Denoiser,
    table: LayerTable,
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    progress: Progress = silent,
    *,
    second_moments: bool = True,
) -> Calibration:
    """Run the sampler once, or the denoiser's recorded calls; keep input statistics of every layer and the inputs to
    measure sensitivities at.

    Without ``second_moments`` these are left empty.
    """
    seeds = range(spec.first_seed, spec.first_seed + spec.samples)
    total, inputs = n_calls(denoiser, sampler, len(seeds)), []
    with InputCollector(denoiser.module, table, second_moments=second_moments) as collector:
        for done, (item, _) in enumerate(calls_of(denoiser, sampler, seeds), start=1):
            inputs += item.singles()
            progress("calibrate", done, total)
    chosen = [inputs[i] for i in _spread(len(inputs), spec.probe_inputs)]
    return collected(denoiser, table, collector, chosen)


def collected(
    denoiser: Denoiser, table: LayerTable, collector: InputCollector, inputs: Sequence[ProbeInput] = ()
) -> Calibration:
    """What a collector has seen, with zeros for the layers that never ran."""
    device = next(denoiser.module.parameters()).device
    statistics, power = collector.statistics(), collector.output_power()
    full = any(s.second_moment.numel() for s in statistics.values())
    for layer in table:
        if layer.name not in statistics:
            statistics[layer.name] = no_input(layer, device, second_moment=full)
            power[layer.name] = torch.zeros(layer.n_channels, device=device)
    constant = collector.constant_inputs()
    return Calibration(statistics=statistics, output_power=power, inputs=inputs, constant=constant)


def no_input(layer: LayerSpec, device: torch.device, *, second_moment: bool) -> RowStatistics:
    """Statistics of a layer that never ran: no input, so no error reaches the output."""
    g, d = layer.groups, layer.weights_per_channel
    return RowStatistics(
        second_moment=torch.zeros((g, d, d) if second_moment else 0, device=device),
        mean=torch.zeros(g, d, device=device),
        input_max=torch.zeros(layer.n_inputs, device=device),
        n_positions=0,
    )


def _spread(total: int, n: int) -> list[int]:
    """``n`` of ``total`` positions (all, if there are fewer), spread evenly."""
    return sorted({int(i) for i in np.linspace(0, total - 1, min(n, total)).round()})
