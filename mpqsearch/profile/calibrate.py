"""One calibration pass over what the runner calls the denoiser with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.models import Denoiser
from mpqsearch.models.calls import Call
from mpqsearch.models.runner import device_of
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.profile.weighing import Weighing
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import RowStatistics
from mpqsearch.sampling import each_call, n_calls
from mpqsearch.sources import kind_of
from mpqsearch.specs import CalibrationSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What one pass has seen: ``statistics`` of the inputs of every layer (zeros where it never ran), ``output_power``
    ``[C]``, the ``steps`` (their calls) to measure sensitivities at, the layers whose input was ``constant``, and how
    many different ``timesteps`` the denoiser was called with."""

    statistics: Mapping[str, RowStatistics]
    output_power: Mapping[str, Tensor]
    steps: Sequence[Sequence[Call]]
    constant: tuple[str, ...]
    timesteps: int

    @property
    def means(self) -> dict[str, Tensor]:
        """Mean input ``[G, D]`` of every layer, float32."""
        return {name: s.mean.float() for name, s in self.statistics.items()}


def rehearse(denoiser: Denoiser) -> None:
    """Let a pipeline that has not run yet make its rehearsal, whose predictions are made up, before hooks look on."""
    denoiser.runner.calls_per_run(denoiser.module)


def run_sampler(
    denoiser: Denoiser,
    seeds: Sequence[int],
    label: str,
    progress: Progress = silent,
    *,
    take: Callable[[Call, Tensor], None] | None = None,
    batch: int = 0,
) -> None:
    """Make the calls of a run (`mpqsearch.sampling.each_call`), for the sake of hooks on the layers or of ``take``."""
    total, done = n_calls(denoiser, len(seeds), batch=batch), 0

    def took(call: Call, prediction: Tensor) -> None:
        nonlocal done
        if take is not None:
            take(call, prediction)
        done += 1
        progress(label, done, total)

    each_call(denoiser, seeds, took, batch=batch)


@torch.no_grad()
def calibrate(
    denoiser: Denoiser,
    table: LayerTable,
    spec: CalibrationSpec,
    progress: Progress = silent,
    *,
    weighing: Weighing | None = None,
    second_moments: bool = True,
) -> Calibration:
    """Run the model for the calibration seeds, one at a time; keep input statistics of every layer and, with
    ``weighing``, steps to measure sensitivities at, spread evenly over seeds and runs, and as many prompts of text
    encoders and pictures of the autoencoder that are parts of the model.

    Without ``second_moments`` these are left empty.
    """
    seeds = range(spec.first_seed, spec.first_seed + spec.samples)
    weighs = weighing or Weighing()
    total = len(seeds) * len(weighs.steps) or n_calls(denoiser, len(seeds), batch=1)
    most = 0 if weighing is None else spec.probe_inputs
    wanted = {kind: _spread(round(total * share), most) for kind, share in (weighs.shares or {"": 1.0}).items()}
    seen = dict.fromkeys(wanted, 0)
    times: list[float] = []
    pool: dict[str, Tensor] = {}
    steps: list[list[Call]] = []

    def take(calls: list[Call], _predictions: list[Tensor]) -> None:
        kind = kind_of(calls[0].part)
        if seen[kind] in wanted[kind]:
            steps.append([call.kept(pool) for call in calls])
        times.extend(call.timestep for call in calls if not kind)
        seen[kind] += 1

    with InputCollector(denoiser.module, table, second_moments=second_moments) as collector:
        run_sampler(denoiser, seeds, "calibrate", progress, take=weighs.by_step(take), batch=1)
    return collected(denoiser, table, collector, times, steps)


def collected(
    denoiser: Denoiser,
    table: LayerTable,
    collector: InputCollector,
    times: Sequence[float],
    steps: Sequence[Sequence[Call]] = (),
) -> Calibration:
    """What a collector has seen, with zeros for the layers that never ran; ``times`` are the timesteps of all calls."""
    device = device_of(denoiser.module)
    statistics, power = collector.statistics(), collector.output_power()
    full = any(s.second_moment.numel() for s in statistics.values())
    for layer in table:
        if layer.name not in statistics:
            statistics[layer.name] = no_input(layer, device, second_moment=full)
            power[layer.name] = torch.zeros(layer.n_channels, device=device)
    return Calibration(
        statistics=statistics,
        output_power=power,
        steps=steps,
        constant=collector.constant_inputs(),
        timesteps=len(np.unique(times)),
    )


def no_input(layer: LayerSpec, device: torch.device, *, second_moment: bool) -> RowStatistics:
    """Statistics of a layer that never ran: no input, so no error reaches the output."""
    g, d = layer.groups, layer.weights_per_channel
    return RowStatistics(
        second_moment=torch.zeros((g, d, d) if second_moment else 0, device=device),
        mean=torch.zeros(g, d, device=device),
        input_max=torch.zeros(layer.n_inputs, device=device),
    )


def _spread(total: int, n: int) -> frozenset[int]:
    """``n`` of ``total`` positions (all, if there are fewer), spread evenly."""
    return frozenset(int(i) for i in np.linspace(0, total - 1, min(n, total)).round())
