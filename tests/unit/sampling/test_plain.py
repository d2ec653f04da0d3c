from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from mpqsearch.errors import ConfigError, ModelError, NumericsError, UnknownNameError
from mpqsearch.models import Denoiser, Hooks, discover
from mpqsearch.prompts import Prompt, Prompts
from mpqsearch.sampling import SAMPLERS, PlainRunner, SamplerSpec, adapt, latents, samples, to_uint8
from mpqsearch.sampling.plain import noise_of
from tests.support import tiny_denoiser
from tests.support.tiny import DDPM


@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_i_is_the_same_at_any_batch_size(name: str) -> None:
    seeds = [3, 14, 15, 92, 65]
    whole, parts = (latents(tiny_denoiser(name=name, steps=4, guidance=2.0, batch=batch), seeds) for batch in (5, 2))
    # Other batches round differently, nothing more; DPM-Solver++ does not clip, and random weights give values of tens.
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-4)
    denoiser = tiny_denoiser(name=name, steps=4, guidance=2.0, batch=5)
    assert torch.equal(whole, latents(denoiser, seeds))
    torch.testing.assert_close(latents(denoiser, [92])[0], whole[3], rtol=1e-5, atol=1e-4)
    assert float((whole[0] - whole[1]).abs().max()) > 0.1


def test_ddim_equals_a_loop_over_diffusers_scheduler() -> None:
    denoiser = tiny_denoiser(steps=6, batch=2, guidance=3.0)
    runner = denoiser.runner
    assert isinstance(runner, PlainRunner)
    x, labels = noise_of([1, 2], (1, 8, 8)), torch.tensor([1, 2])
    assert runner.labels([1, 2]) == (1, 2)
    scheduler = DDIMScheduler.from_config(runner.scheduler)
    scheduler.set_timesteps(6)
    with torch.no_grad():
        for t in scheduler.timesteps:
            asked = denoiser.module(x, t, class_labels=labels).sample
            free = denoiser.module(x, t, class_labels=torch.full((2,), runner.null_class)).sample
            x = scheduler.step(free + 3 * (asked - free), t, x, use_clipped_model_output=True).prev_sample
    (drawn,) = samples(denoiser, [1, 2])
    torch.testing.assert_close(drawn.latents, x, rtol=0, atol=1e-5)
    assert torch.equal(drawn.images, to_uint8(drawn.latents))
    assert drawn.labels == (1, 2)


def test_hooks_see_every_call_and_every_step() -> None:
    denoiser = tiny_denoiser(steps=5)
    seen, after = [], []

    def call(_part: str, real: object, args: tuple, kwargs: dict) -> object:
        seen.append(args[0])
        return real(*args, **kwargs)  # type: ignore[operator]

    drawn = denoiser.runner.run(denoiser.module, [0], hooks=Hooks(call=call, step=after.append))
    assert len(seen) == len(after) == denoiser.runner.calls_per_run(denoiser.module) == 5
    assert torch.equal(seen[0], noise_of([0], (1, 8, 8)))
    assert all(torch.equal(a, b) for a, b in zip(after[:-1], seen[1:], strict=True))
    assert torch.equal(after[-1], drawn.latents)
    assert "forward" not in vars(denoiser.module), "the hook was left on the module"


def test_nan_is_stopped_with_the_timestep() -> None:
    denoiser = tiny_denoiser(steps=3)
    with torch.no_grad():
        denoiser.module.conv_out.bias[0] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(NumericsError, match=r"not finite at timestep 666 .*seeds 7\.\.8"):
        latents(denoiser, [7, 8])


def test_schedulers_that_ddim_would_read_wrongly_are_refused_by_name() -> None:
    for name in (
        "FlowMatchEulerDiscreteScheduler",
        "EDMEulerScheduler",
        "CMStochasticIterativeScheduler",
        "LCMScheduler",
    ):
        with pytest.raises(ModelError, match=f"{name}, which this sampler does not implement"):
            PlainRunner((1, 8, 8), scheduler={"_class_name": name, "num_train_timesteps": 1000})


def test_a_scheduler_that_does_not_clip_is_not_made_to_clip() -> None:
    pndm = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    scheduler, extra = PlainRunner((4, 8, 8), scheduler=pndm)._scheduler()
    assert scheduler.config.clip_sample is False
    assert extra == {}


class Shifted(torch.nn.Module):
    """A module of the user's, with a condition of its own."""

    sample_shape = (2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def denoise(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        shift = 0 if cond is None else cond.view(-1, 1, 1)
        return self.linear(x) * 0.1 + shift + t.view(-1, 1, 1) / 1000


class Narrow(Shifted):
    def denoise(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        return self.linear(x)[:, :1]


def test_a_module_with_denoise_is_called_by_it() -> None:
    denoiser = adapt(Shifted(), sample_shape=(2, 4), n_classes=3, scheduler=DDPM, sampler=SamplerSpec(steps=3))
    calls = []

    def call(_part: str, real: object, args: tuple, kwargs: dict) -> object:
        calls.append(args)
        return real(*args, **kwargs)  # type: ignore[operator]

    denoiser.runner.run(denoiser.module, [4, 5], hooks=Hooks(call=call))
    assert [int(t[0]) for _, t, _ in calls] == [666, 333, 0]
    assert calls[0][2].tolist() == [1, 2]


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="no null class, so guidance must be 1, got 3"):
        PlainRunner((1, 8, 8), spec=SamplerSpec(guidance=3.0), n_classes=10)
    with pytest.raises(ConfigError, match="is for pipelines"):
        PlainRunner((1, 8, 8), spec=SamplerSpec(call={"height": 512}))
    with pytest.raises(UnknownNameError, match="euler"):
        SamplerSpec(name="euler")
    with pytest.raises(ConfigError, match=r"1\.\.1000 steps"):
        SamplerSpec(steps=0)
    with pytest.raises(ModelError, match=r"predicts \(1, 1, 4\) for samples \(1, 2, 4\)"):
        latents(adapt(Narrow(), sample_shape=(2, 4), scheduler=DDPM), [0])


def test_images_are_rounded_and_clipped() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(x, 0.0, 10.0).tolist() == [0, 0, 0, 26, 178]


def test_the_range_of_the_data_is_part_of_the_model_and_never_assumed() -> None:
    """Samples of a model that predicts its own input decay to known values, far outside [-1, 1]."""

    def model(data_range: tuple[float, float] | None) -> Denoiser:
        scheduler = DDPM | {"clip_sample": False}
        torch.manual_seed(0)
        given = {"sample_shape": (1, 2, 4), "scheduler": scheduler, "sampler": SamplerSpec(steps=2)}
        return adapt(Shifted(), data_range=data_range, **given)

    (plain,), (wide,) = samples(model(None), [3]), samples(model((-40.0, 40.0)), [3])
    assert float(plain.latents.abs().max()) > 2
    assert torch.equal(plain.latents, wide.latents)
    assert plain.images is None
    assert model(None).runner.picture(model(None).module) is None
    assert torch.equal(wide.images, ((plain.latents + 40) * (255 / 80)).round().to(torch.uint8))
    with pytest.raises(ConfigError, match="smallest and the largest value"):
        model((1.0, 1.0))


def test_a_model_without_a_scheduler_has_layers_and_no_samples() -> None:
    denoiser = adapt(Shifted(), sample_shape=(2, 4))
    assert [layer.name for layer in discover(denoiser)] == ["linear"]
    with pytest.raises(ModelError, match=r"names no scheduler.*scheduler_config\.json"):
        latents(denoiser, [0])


def test_classes_may_be_named_and_prompts_have_none(tmp_path: Path) -> None:
    runner = PlainRunner((1, 8, 8), n_classes=10, prompts=Prompts(classes=(3, 7)))
    assert runner.labels(range(3)) == (3, 7, 3)
    assert runner.identity != PlainRunner((1, 8, 8), n_classes=10).identity
    with pytest.raises(ConfigError, match=r"the class 10 does not exist"):
        PlainRunner((1, 8, 8), n_classes=10, prompts=Prompts(classes=(10,)))
    text = Prompts(splits={"report": (Prompt(text="a cat"),)})
    with pytest.raises(ConfigError, match="asked for classes"):
        PlainRunner((1, 8, 8), n_classes=10, prompts=text)
