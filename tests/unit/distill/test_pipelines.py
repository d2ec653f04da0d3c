"""Training on trajectories of pipelines: several calls a step, several rows a call, two denoisers, any scheduler."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpqsearch.core import BitMap
from mpqsearch.distill import DistillSpec, TeacherCall, Trajectories, TRDSpec, distill
from mpqsearch.models import Denoiser, discover
from mpqsearch.quant import build_student, param_groups
from tests.support.pipelines import denoiser_of as opened

KINDS = (
    "StableDiffusionPipeline",  # PNDM calls one timestep twice; both halves of guidance in one call
    "StableDiffusion3Pipeline",  # flow matching
    "FluxPipeline",  # timesteps in 0..1, guidance embedded
    "DiTPipeline",  # classes, learned variance
    "WanPipeline:2.2",  # two denoisers, two calls a step, video
    "StableAudioPipeline",  # a continuous scheduler, sound
)


def student_of(denoiser: Denoiser) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """A student of 3 bits whose LoRA and scales are trained."""
    table = discover(denoiser)
    bit_map = BitMap(model_digest=table.digest, weights={layer.name: np.array(3) for layer in table})
    student = build_student(denoiser.module, table, bit_map, trainable="lora", rank=4)
    return student, param_groups(student, lr_factor=2)


def spec(**settings: Any) -> DistillSpec:
    return DistillSpec(**{"steps": 16, "checkpoint_every": 3, "relation": TRDSpec(pooled_size=2)} | settings)


class Repeated(Trajectories):
    """One trajectory over and over, so that a few steps tell whether anything is learned."""

    @functools.cache  # noqa: B019  (of a test)
    def run(self, index: int, relation: TRDSpec | None = None) -> list[TeacherCall]:
        return super().run(0, relation) if not index else self.run(0, relation)


@pytest.mark.parametrize("name", KINDS)
def test_training_lowers_the_loss(name: str) -> None:
    denoiser = opened(name)
    student, groups = student_of(denoiser)
    states = list(distill(student, groups, Repeated(denoiser, batch=2), spec(steps=20)))
    assert all(s.relation > 0 for s in states)
    first, last = (sum(s.loss for s in part) for part in (states[:2], states[-2:]))  # a trajectory each
    assert last < 0.8 * first, f"{first} -> {last}"


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiTPipeline", "WanPipeline:2.2"])
def test_the_loss_is_that_of_the_guided_prediction(name: str) -> None:
    """Whatever the order of the halves, and whether they are rows of one call or two calls."""
    denoiser, guidance = opened(name, guidance_scale=3.0), 3.0
    student = copy.deepcopy(denoiser.module)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    student.requires_grad_(True)
    source = Trajectories(denoiser, batch=2)
    options = spec(steps=1, relation=TRDSpec(weight=0.0, window=1), clip_norm=0.0)
    (state,) = distill(student, [{"params": list(student.parameters()), "lr": 0.0}], source, options)
    calls = source.run(0)
    with torch.no_grad():
        errors = [c.call.replay(student) - c.prediction for c in (calls[:2] if "Wan" in name else calls[:1])]
    first, second = errors if len(errors) == 2 else errors[0].chunk(2)
    asked, free = (second, first) if "Diffusion" in name else (first, second)
    expected = (free + guidance * (asked - free)).square().mean()
    assert state.task == pytest.approx(float(expected), rel=1e-4)


def test_a_stop_changes_nothing(tmp_path: Path) -> None:
    """Bit for bit, in the middle of a trajectory, with two denoisers and weights of steps."""
    denoiser, options = opened("WanPipeline:2.2"), spec(steps=6, timestep_weights="sampler")
    whole, groups = student_of(denoiser)
    expected = [s.loss for s in distill(whole, groups, Trajectories(denoiser, batch=2), options)]
    half, groups = student_of(denoiser)
    for state in distill(half, groups, Trajectories(denoiser, batch=2), options, folder=tmp_path):
        if state.step == 4:
            break
    again, groups = student_of(opened("WanPipeline:2.2"))
    states = list(distill(again, groups, Trajectories(denoiser, batch=2), options, folder=tmp_path))
    assert [s.step for s in states] == [4, 5, 6]
    assert [s.loss for s in states] == expected[3:]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


def test_embedded_prompts_are_kept_once_a_trajectory() -> None:
    calls = Trajectories(opened("StableDiffusion3Pipeline"), batch=2).run(0)
    assert len(calls) == 3
    assert len({id(c.call.kwargs["encoder_hidden_states"]) for c in calls}) == 1
    assert len({id(c.call.sample) for c in calls}) == 3
