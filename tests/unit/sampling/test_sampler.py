from __future__ import annotations

import itertools

import pytest
import torch

from mpqsearch.errors import ConfigError, NumericsError, UnknownNameError
from mpqsearch.sampling import SAMPLERS, SamplerSpec, labels_of, noise_of, sample, to_uint8, trajectory
from mpqsearch.testing import tiny_denoiser


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
    from diffusers import DDIMScheduler

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


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ddim'"):
        SamplerSpec(name="dimm")
    with pytest.raises(ConfigError, match="steps"):
        SamplerSpec(steps=0)
    with pytest.raises(ConfigError, match="guidance"):
        SamplerSpec(guidance=-1)


def test_pixels_cover_the_range() -> None:
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
