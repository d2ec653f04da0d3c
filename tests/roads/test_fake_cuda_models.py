"""Discovery, recorded calls and the sampler on a GPU give what they give on the CPU, and mix no devices."""

from __future__ import annotations

import pytest
import torch

from mpqsearch.models import capture, discover
from mpqsearch.sampling import adapt, latents, prediction_gains
from tests.support import tiny_denoiser
from tests.support.fake_cuda import fake_cuda, on_gpu

KINDS = ("unet", "dit")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_recorded_calls_are_those_of_the_cpu(kind: str) -> None:
    denoiser = tiny_denoiser(kind)
    with torch.no_grad(), capture(denoiser.module) as calls:
        denoiser.module(torch.randn(1, 1, 8, 8), torch.tensor([3]), class_labels=torch.tensor([1]))
    recorded = adapt(denoiser.module, calls=calls)
    with torch.no_grad():
        expected = calls[0].replay(denoiser.module)
    with fake_cuda(), torch.no_grad():
        moved = denoiser.with_module(on_gpu(denoiser.module))
        assert discover(moved) == discover(denoiser)
        assert discover(recorded.with_module(moved.module)).layers == discover(recorded).layers
        torch.testing.assert_close(calls[0].replay(moved.module).cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_samples_are_those_of_the_cpu(kind: str, name: str) -> None:
    denoiser = tiny_denoiser(kind, name=name, steps=2, guidance=2.0, batch=2)
    seeds = [0, 1, 2]
    expected, gains = latents(denoiser, seeds), prediction_gains(denoiser, seeds)
    with fake_cuda():
        moved = denoiser.with_module(on_gpu(denoiser.module))
        found = latents(moved, seeds)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)  # dpm++ gives values of tens
        for ours, theirs in zip(prediction_gains(moved, seeds), gains, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=0)
