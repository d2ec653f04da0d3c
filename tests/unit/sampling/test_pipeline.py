"""Pipelines run by their own code: the samples are theirs, whatever stands in for the denoiser."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mpqsearch.errors import ConfigError, ModelError, NumericsError, UnknownNameError
from mpqsearch.models import Denoiser, Hooks, Parts
from mpqsearch.models.runner import watched_scheduler
from mpqsearch.prompts import Prompt, Prompts
from mpqsearch.sampling import PipelineRunner, SamplerSpec, each_call, latents, load_model, prediction_gains, samples
from tests.support.pipelines import MISFITS, PROMPTS, TINY, arguments, denoiser_of, modules

ASKED = Prompts(splits={"report": tuple(Prompt(text=text) for text in PROMPTS)})
KINDS = (
    "DDPMPipeline",
    "DiTPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline:turbo",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline:2.2",
    "StableAudioPipeline",
)


def opened(
    folder: Path, name: str, *, batch: int = 4, into: Any = TINY, **call: Any
) -> tuple[Denoiser, Any, dict[str, Any]]:
    """A denoiser from a folder, the bare pipeline from the same folder, and the arguments of its call."""
    pipe, given = into[name]()
    pipe.save_pretrained(folder)
    for part in modules(pipe):
        part.eval()
    asked = ASKED if "prompt" in arguments(pipe, given, (0,)) else None
    spec = SamplerSpec(batch=batch, call=given | call)
    pipe.set_progress_bar_config(disable=True)
    return load_model(str(folder), sampler=spec, prompts=asked), pipe, given


@pytest.mark.parametrize("name", KINDS)
def test_samples_are_those_of_the_pipelines_own_call_with_any_denoiser(name: str, tmp_path: Path) -> None:
    denoiser, bare, given = opened(tmp_path, name)
    if hasattr(bare, "vae") and hasattr(bare.vae, "enable_slicing"):
        bare.vae.enable_slicing()
    changed = copy.deepcopy(denoiser.module)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.05)
    for module in (denoiser.module, changed):
        (drawn,) = samples(denoiser.with_module(module), [1, 2])
        for part, owner in module.items() if isinstance(module, Parts) else [(denoiser.runner._components[0], module)]:
            setattr(bare, part, owner)
        with torch.no_grad():
            out = bare(**arguments(bare, given, (1, 2)))
        expected = np.asarray(next(iter(out.values())))
        if drawn.images is None:
            assert expected.ndim == 3, "only sound has no pictures"
        else:
            pictures = np.moveaxis(drawn.images.numpy(), -3, -1)
            assert np.array_equal(pictures, (expected * 255).round().astype(np.uint8))
    assert float((latents(denoiser, [1, 2]) - drawn.latents).abs().max()) > 1e-4, "the changed weights changed nothing"


@pytest.mark.parametrize("name", KINDS)
def test_sample_i_is_the_same_in_any_batch(name: str, tmp_path: Path) -> None:
    denoiser, _, _ = opened(tmp_path, name)
    together, alone = latents(denoiser, [1, 2]), latents(denoiser, [2])
    torch.testing.assert_close(together[-len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_mixes_its_batch_makes_samples_one_at_a_time(tmp_path: Path, caplog: Any) -> None:
    denoiser, _, _ = opened(tmp_path, "ScoreSdeVePipeline", into=MISFITS)
    assert torch.equal(latents(denoiser, [1, 2])[1:], latents(denoiser, [2]))
    assert "a sample depends on the others of its batch" in caplog.text


@pytest.mark.parametrize("name", ["CogView4Pipeline", "LattePipeline"])
def test_a_pipeline_that_pads_to_the_longest_prompt_makes_samples_one_at_a_time(
    name: str, tmp_path: Path, caplog: Any
) -> None:
    denoiser, _, _ = opened(tmp_path, name)
    assert torch.equal(latents(denoiser, [0, 2])[:1], latents(denoiser, [0]))
    assert "a sample depends on the others of its batch" in caplog.text


def test_prompts_are_encoded_once_and_the_encoders_go(tmp_path: Path) -> None:
    pipe, given = TINY["StableDiffusion3Pipeline"]()
    pipe.save_pretrained(tmp_path / "model")
    spec = SamplerSpec(batch=2, call=given)

    def load() -> Denoiser:
        return load_model(str(tmp_path / "model"), sampler=spec, prompts=ASKED, encoded=tmp_path / "prompts")

    first = load()
    expected = latents(first, [0, 1, 2])
    runner = first.runner
    assert isinstance(runner, PipelineRunner)
    assert not isinstance(runner._pipe.text_encoder, torch.nn.Module), "the text encoder is let go"
    assert torch.equal(latents(first, [0, 1, 2]), expected), "with the encoders gone samples must be the same"
    stored = sorted(p.name for p in (tmp_path / "prompts").iterdir())
    assert torch.equal(latents(load(), [0, 1, 2]), expected)
    assert stored == sorted(p.name for p in (tmp_path / "prompts").iterdir()), "a second run encodes nothing again"
    assert len(latents(first, [5, 6])) == 2, "new prompts bring the encoders back"


def test_every_call_comes_with_its_raw_prediction(tmp_path: Path) -> None:
    denoiser, _, given = opened(tmp_path, "WanPipeline:2.2")
    found: list[tuple[str, int, int]] = []

    def take(call: Any, prediction: torch.Tensor) -> None:
        found.append((call.part, call.index, call.batch))
        torch.testing.assert_close(call.replay(denoiser.module), prediction, rtol=0, atol=0)

    with torch.no_grad():
        each_call(denoiser, [1, 2], take)
    assert [index for _, index, _ in found] == list(range(denoiser.runner.calls_per_run(denoiser.module)))
    assert {part for part, _, _ in found} == {"transformer", "transformer_2"}
    assert {c.part for c in denoiser.runner.examples(denoiser.module)} == {"transformer", "transformer_2"}
    assert given["num_inference_steps"] * 2 == len(found), "two calls a step: guidance"


def test_gains_weigh_the_halves_of_guidance(tmp_path: Path) -> None:
    """For a sampler that is linear in the guided prediction the halves matter as (1 - g)^2 and g^2, where later calls
    hardly depend on earlier ones."""
    denoiser, _, _ = opened(tmp_path, "StableDiffusionPipeline:v-prediction", guidance_scale=3.0, num_inference_steps=1)
    (gains,) = prediction_gains(denoiser, [0, 1])
    free, asked = gains.view(2, 2).mean(1)
    assert float(asked / free) == pytest.approx(9 / 4, rel=1e-4)


def test_what_is_wrong_with_a_call_is_said_before_it_runs(tmp_path: Path) -> None:
    denoiser, _, given = opened(tmp_path, "StableDiffusionPipeline")
    folder = denoiser.source
    with pytest.raises(ConfigError, match="draws prompts: name a file of them"):
        latents(load_model(folder, sampler=SamplerSpec(call=given)), [0])
    with pytest.raises(UnknownNameError, match="guidance_scal"):
        latents(load_model(folder, sampler=SamplerSpec(call={"guidance_scal": 2.0}), prompts=ASKED), [0])
    with pytest.raises(ModelError, match="StableDiffusionPipeline with PNDMScheduler cannot be run: ValueError"):
        latents(load_model(folder, sampler=SamplerSpec(call=given | {"height": 13}), prompts=ASKED), [0])


def test_classes_out_of_range_and_unfit_schedulers(tmp_path: Path) -> None:
    denoiser, _, given = opened(tmp_path / "dit", "DiTPipeline")
    with pytest.raises(ConfigError, match="the class 4000 does not exist"):
        latents(load_model(denoiser.source, sampler=SamplerSpec(call=given), prompts=Prompts(classes=(4000,))), [0])
    unfit, _, _ = opened(tmp_path / "flow", "DiTPipeline:flow", into=MISFITS)
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler cannot be run"):
        latents(unfit, [0])


def test_a_black_picture_is_named_with_seed_and_prompt(tmp_path: Path) -> None:
    denoiser, _, _ = opened(tmp_path, "StableDiffusionPipeline")
    assert isinstance(denoiser.runner, PipelineRunner)
    with torch.no_grad():
        next(denoiser.runner.pipe(denoiser.module).vae.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match=f"seed 1 \\('{PROMPTS[1]}'\\) is not finite"):
        list(samples(denoiser, [1]))


def test_the_safety_checker_is_switched_off_and_said(tmp_path: Path, caplog: Any) -> None:
    pipe, given = TINY["StableDiffusionPipeline"]()

    class Checker(torch.nn.Module):
        dtype = torch.float32

        def forward(self, images: Any, **_: Any) -> Any:
            return images * 0, [True] * len(images)

    denoiser = opened(tmp_path, "StableDiffusionPipeline")[0]
    runner = PipelineRunner(
        lambda _: with_checker(pipe, Checker()), ("unet",), spec=SamplerSpec(call=given), prompts=ASKED
    )
    drawn = runner.run(denoiser.module, [0])
    assert drawn.images is not None
    assert int(drawn.images.max()) > 0
    assert "safety checker of StableDiffusionPipeline is switched off" in caplog.text


def with_checker(pipe: Any, checker: torch.nn.Module) -> Any:
    pipe.register_modules(safety_checker=checker)
    return pipe


def test_hooks_leave_nothing_behind(tmp_path: Path) -> None:
    denoiser, _, _ = opened(tmp_path, "StableDiffusionPipeline")
    runner = denoiser.runner
    assert isinstance(runner, PipelineRunner)
    runner.run(denoiser.module, [0], hooks=Hooks(call=lambda _p, real, a, k: real(*a, **k), step=lambda _: None))
    assert "forward" not in vars(denoiser.module)
    assert type(runner._pipe.scheduler) is diffusers.PNDMScheduler
    assert "encode_prompt" not in vars(runner._pipe)


def test_a_folder_says_how_it_is_meant_to_be_drawn(tmp_path: Path) -> None:
    pipe, given = TINY["StableDiffusionPipeline"]()
    pipe.save_pretrained(tmp_path)
    steps = given.pop("num_inference_steps")
    (tmp_path / "sampler.json").write_text(json.dumps({"steps": steps - 1, "guidance": 2.0, "call": given}))
    (tmp_path / "prompts.txt").write_text("".join(f"a house with {n} windows\n" for n in range(20)))
    runner = load_model(str(tmp_path)).runner
    assert isinstance(runner, PipelineRunner)
    assert (runner.spec.steps, runner.spec.guidance, dict(runner.spec.call)) == (steps - 1, 2.0, given)
    assert str(runner.labels([0])[0]).startswith("a house with")
    asked = load_model(str(tmp_path), sampler=SamplerSpec(steps=7), prompts=ASKED).runner
    assert isinstance(asked, PipelineRunner)
    assert (asked.spec.steps, asked.spec.guidance, asked.labels([1])) == (7, 2.0, (PROMPTS[1],))
    (tmp_path / "sampler.json").write_text('{"step": 3}')
    with pytest.raises(ModelError, match="unknown key 'step'"):
        load_model(str(tmp_path))


def test_a_watched_scheduler_keeps_its_class_and_its_copies_step_themselves() -> None:
    scheduler, seen = FlowMatchEulerDiscreteScheduler(), list[Tensor]()
    scheduler.set_timesteps(4)
    before = inspect.signature(scheduler.step)
    with watched_scheduler(scheduler, seen.append):
        assert type(scheduler) is FlowMatchEulerDiscreteScheduler  # some pipelines ask for it
        assert inspect.signature(scheduler.step) == before  # and whether a step takes a generator
        other = copy.deepcopy(scheduler)
        for _ in range(2):
            other.step(torch.ones(1, 2), other.timesteps[other.step_index or 0], torch.ones(1, 2))
        assert (other.step_index, scheduler.step_index, seen) == (2, None, [])
        stepped = scheduler.step(torch.ones(1, 2), scheduler.timesteps[0], torch.ones(1, 2), return_dict=False)[0]
    assert len(seen) == 1
    assert torch.equal(seen[0], stepped)
    assert "step" not in vars(scheduler)


def test_a_pipeline_that_makes_one_sample_whatever_it_is_asked_for_is_called_for_each() -> None:
    denoiser = denoiser_of("Cosmos3OmniPipeline")
    first, second = latents(denoiser, [0, 1])
    assert not torch.equal(first, second)
    assert torch.equal(second, latents(denoiser, [1])[0])
