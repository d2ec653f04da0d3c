"""Discovery, recorded calls and the sampler on a GPU give what they give on the CPU, and mix no devices."""

from __future__ import annotations

import pytest
import torch

from mpqsearch.models import capture, discover
from mpqsearch.sampling import SamplerSpec, prediction_sensitivities, sample
from tests.support import tiny_denoiser
from tests.support.fake_cuda import fake_cuda, on_gpu

KINDS = ("unet", "dit")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_recorded_calls_are_those_of_the_cpu(kind: str) -> None:
    denoiser = tiny_denoiser(kind)
    with torch.no_grad(), capture(denoiser.module) as calls:
        denoiser.denoise(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1]))
    with torch.no_grad():
        expected = calls[0].replay(denoiser.module)
    with fake_cuda(), torch.no_grad():
        moved = denoiser.with_module(on_gpu(denoiser.module))
        assert discover(moved) == discover(denoiser)
        assert discover(moved.with_calls(calls)).layers == discover(denoiser.with_calls(calls)).layers
        torch.testing.assert_close(calls[0].replay(moved.module).cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_samples_are_those_of_the_cpu(kind: str, name: str) -> None:
    denoiser, spec = tiny_denoiser(kind), SamplerSpec(name=name, steps=2, guidance=2.0, batch=2)
    seeds = [0, 1, 2]
    samples, values = sample(denoiser, seeds, spec), prediction_sensitivities(denoiser, seeds, spec)
    with fake_cuda():
        moved = denoiser.with_module(on_gpu(denoiser.module))
        torch.testing.assert_close(
            sample(moved, seeds, spec), samples, rtol=1e-4, atol=1e-3
        )  # dpm++ gives values of tens
        assert prediction_sensitivities(moved, seeds, spec) == pytest.approx(values, rel=1e-3)
