from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from mpqsearch.errors import ConfigError, NumericsError, UnknownNameError
from mpqsearch.models import Denoiser
from mpqsearch.sampling import (
    SAMPLERS,
    SamplerSpec,
    chain_of,
    labels_of,
    noise_of,
    prediction_sensitivities,
    sample,
    timesteps_of,
    to_uint8,
    trajectory,
)
from tests.support import tiny_denoiser


@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_i_is_the_same_at_any_batch_size(name: str) -> None:
    denoiser = tiny_denoiser()
    seeds = [3, 14, 15, 92, 65]
    whole = sample(denoiser, seeds, SamplerSpec(name=name, steps=4, guidance=2.0, batch=5))
    parts = sample(denoiser, seeds, SamplerSpec(name=name, steps=4, guidance=2.0, batch=2))
    # Other batches round differently, nothing more; DPM-Solver++ does not clip, and random weights give values of tens.
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-4)
    again = sample(denoiser, seeds, SamplerSpec(name=name, steps=4, guidance=2.0, batch=5))
    assert torch.equal(whole, again)
    alone = sample(denoiser, [92], SamplerSpec(name=name, steps=4, guidance=2.0, batch=5))
    torch.testing.assert_close(alone[0], whole[3], rtol=1e-5, atol=1e-4)
    assert float((whole[0] - whole[1]).abs().max()) > 0.1


def test_ddim_equals_a_loop_over_diffusers_scheduler() -> None:
    denoiser = tiny_denoiser()
    x = noise_of([1, 2], (1, 8, 8))
    labels = labels_of(denoiser, [1, 2])
    assert isinstance(labels, torch.Tensor)
    scheduler = DDIMScheduler.from_config(dict(denoiser.scheduler))
    scheduler.set_timesteps(6)
    with torch.no_grad():
        expected = x
        for t in scheduler.timesteps:
            prediction = denoiser.module(expected, t, class_labels=labels).sample
            expected = scheduler.step(prediction, t, expected, use_clipped_model_output=True).prev_sample
    got = sample(denoiser, [1, 2], SamplerSpec(steps=6, batch=2))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_trajectory_shows_what_the_model_saw() -> None:
    denoiser = tiny_denoiser()
    x = noise_of([0], (1, 8, 8))
    with torch.no_grad():
        steps = list(trajectory(denoiser, x, labels_of(denoiser, [0]), SamplerSpec(steps=5)))
    assert [s.index for s in steps] == list(range(5))
    assert torch.equal(steps[0].x, x)
    assert all(torch.equal(a.after, b.x) for a, b in itertools.pairwise(steps))
    assert [s.timestep for s in steps] == sorted((s.timestep for s in steps), reverse=True)


def test_nan_is_stopped_with_the_timestep() -> None:
    denoiser = tiny_denoiser()
    with torch.no_grad():
        denoiser.module.conv_out.bias[0] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(NumericsError, match="not finite at timestep"):
        sample(denoiser, [0], SamplerSpec(steps=3))


class Proportional(torch.nn.Module):
    """Predicts a multiple of what it sees."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def denoise(self, x: torch.Tensor, _t: torch.Tensor, _cond: object) -> torch.Tensor:
        return self.factor * x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_gains_are_what_ddim_makes_of_a_prediction(prediction_type: str, factor: float) -> None:
    scheduler = dict(tiny_denoiser().scheduler) | {"clip_sample": False, "prediction_type": prediction_type}
    denoiser = Denoiser(name="line", module=Proportional(factor), sample_shape=(1, 8, 8), scheduler=scheduler)
    spec = SamplerSpec(steps=4)
    ddim = DDIMScheduler.from_config(scheduler)
    times = [*timesteps_of(denoiser, spec), None]
    alphas = [float(ddim.alphas_cumprod[t]) if t is not None else float(ddim.final_alpha_cumprod) for t in times]
    # x' = a x + b prediction, by hand: the predicted sample and noise, put together again at the next level.
    steps = []
    for now, then in itertools.pairwise(alphas):
        p, q, r, s = now**0.5, (1 - now) ** 0.5, then**0.5, (1 - then) ** 0.5
        steps.append((r / p, s - r * q / p) if prediction_type == "epsilon" else (r * p + s * q, s * p - r * q))
    expected, later = [], 1.0
    for a, b in reversed(steps):
        expected.append((b * later) ** 2)
        later *= a + b * factor
    # Every entry of the sample depends on one entry of each prediction, so that a direction of random signs is exact.
    assert prediction_sensitivities(denoiser, [3, 4], spec) == pytest.approx(expected[::-1], rel=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_gains_of_a_model_are_those_of_finite_differences(name: str) -> None:
    denoiser, spec = tiny_denoiser(), SamplerSpec(name=name, steps=3, guidance=2.0)
    denoiser = replace(denoiser, scheduler={**denoiser.scheduler, "clip_sample": False}, sample_shape=(1, 4, 4))
    chain = chain_of(denoiser, [5], spec)
    signs = torch.randint(0, 2, chain.final.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def along(index: int, entry: int, change: float) -> float:
        class Changed(torch.nn.Module):
            calls = 0

            def __init__(self) -> None:
                super().__init__()
                self.inner = denoiser.module

            def denoise(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
                out = denoiser.guided(x, t, cond[:1], 2.0)
                if self.calls == index:
                    out = out.clone()
                    out.view(-1)[entry] += change
                self.calls += 1
                return out

        final = sample(replace(denoiser, module=Changed()), [5], replace(spec, guidance=1.0))
        return float((final * signs).sum())

    for index, value in enumerate(prediction_sensitivities(denoiser, [5], spec)):
        slopes = [(along(index, e, 0.02) - along(index, e, -0.02)) / 0.04 for e in range(chain.final.numel())]
        assert value == pytest.approx(sum(s * s for s in slopes) / len(slopes), rel=0.02)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ddim'"):
        SamplerSpec(name="dimm")
    with pytest.raises(ConfigError, match="steps"):
        SamplerSpec(steps=0)
    with pytest.raises(ConfigError, match="guidance"):
        SamplerSpec(guidance=-1)


def test_pixels_cover_the_range() -> None:
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
