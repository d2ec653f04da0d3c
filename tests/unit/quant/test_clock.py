"""Activation scales by timestep in pipelines: each call of each denoiser finds its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpqsearch.core import BitMap
from mpqsearch.models import Call, discover
from mpqsearch.quant import RangeCollector, quantize_model
from mpqsearch.sampling import each_call
from tests.unit.distill.test_pipelines import opened


@pytest.mark.parametrize("name", ["WanPipeline:2.2", "FluxPipeline"])
def test_timesteps_of_two_denoisers_and_of_fractions(name: str) -> None:
    denoiser = opened(name)
    table = discover(denoiser)
    times: list[float] = []
    with torch.no_grad(), RangeCollector(denoiser.module, table, per_timestep=True) as ranges:
        each_call(denoiser, [2_000_000, 2_000_001], lambda call, _: times.append(call.timestep))
    assert not any(hasattr(m, "timestep_clock") for m in denoiser.module.modules()), "calibration leaves none"
    activations = ranges.table({la.name: 4 for la in table})
    assert activations.timesteps == tuple(sorted(set(times)))
    assert len(activations.timesteps) == 3
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(8) for la in table},
        activations={la.name: 4 for la in table},
        activation_steps=3,
    )
    made = denoiser.with_module(quantize_model(denoiser.module, table, bit_map, activations=activations).module)
    heard: list[float] = []

    def look(call: Call, _: torch.Tensor) -> None:
        (index,) = made.module.get_submodule(call.part).timestep_clock.index.tolist()
        heard.append(activations.timesteps[index])

    with torch.no_grad():
        each_call(made, [2_000_000], look)
    assert heard == times
