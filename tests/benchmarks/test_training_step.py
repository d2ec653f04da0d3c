"""What a training step of the mixed-width student costs in units of a full-precision step of the same model."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch

from mpqsearch.core import BitMap
from mpqsearch.distill import Trajectories, TRDSpec, find_feature_module, window_relation_loss
from mpqsearch.distill.trd import FeatureTap
from mpqsearch.models import discover
from mpqsearch.quant import build_student
from mpqsearch.sampling import SamplerSpec, load_model
from tests.support.inputs import calibrated

REPEATS = 5


@pytest.mark.parametrize("name", ["fmnist-unet", "fmnist-dit"])
def test_training_step_of_a_mixed_width_student(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    """Forward and backward of a window of two timesteps, eight samples with guidance: W1-W8 by channel, A4 by timestep,
    rank 32, TRD.

    The ratio is between medians of CPU seconds of alternating runs in one process.
    """
    denoiser = load_model(name, sampler=SamplerSpec(steps=10, guidance=2.0, batch=8))
    table = discover(denoiser)
    rng = np.random.default_rng(0)
    weights = {la.name: rng.integers(1, 9, la.n_channels).astype(np.uint8) for la in table}
    bit_map = BitMap(
        model_digest=table.digest, weights=weights, activations={la.name: 4 for la in table}, activation_steps=10
    )
    activations = calibrated(denoiser, table, bit_map, seeds=range(2))
    student = build_student(denoiser.module, table, bit_map, activations=activations, trainable="lora")
    full = copy.deepcopy(denoiser.module).requires_grad_(True)
    feature = find_feature_module(denoiser.module)
    window = Trajectories(denoiser, batch=8).run(0, TRDSpec(pooled_size=14))[:2]

    def step(module: torch.nn.Module, relation: bool) -> float:
        began = time.process_time()
        students, teachers = [], []
        loss = torch.zeros(())
        with FeatureTap(module, feature, 14) as tap:
            for given in window:
                prediction = given.call.replay(module)
                loss = loss + torch.nn.functional.mse_loss(prediction, given.prediction) / len(window)
                if relation and given.features is not None:
                    students.append(tap.take())
                    teachers.append(given.features)
            if relation:
                loss = loss + 0.1 * window_relation_loss(students, teachers, 0.1)
            loss.backward()
        module.zero_grad()
        return time.process_time() - began

    cases = {
        "full precision": (full, False),
        "student": (student, False),
        "student with relation loss": (student, True),
    }
    seconds: dict[str, list[float]] = {label: [] for label in cases}

    def run() -> None:
        for label, (module, relation) in cases.items():
            seconds[label].append(step(module, relation))

    benchmark.pedantic(run, rounds=REPEATS, warmup_rounds=1)
    medians = {label: float(np.median(values[1:])) for label, values in seconds.items()}
    base = medians["full precision"]
    for label, value in medians.items():
        print(f"{name}: {label}: {value:.3f} s, {value / base:.2f} of full precision")
        benchmark.extra_info[label] = value / base
