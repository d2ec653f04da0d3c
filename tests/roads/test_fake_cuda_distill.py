"""A training on a GPU, walked on tensors that only say that they lie there: the losses are those of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mpqsearch.core import BitMap
from mpqsearch.distill import DistillSpec, Trajectories, TRDSpec, distill
from mpqsearch.models import Denoiser, discover
from mpqsearch.quant import build_student, convert, param_groups
from tests.support import tiny_denoiser
from tests.support.fake_cuda import FakeCudaTensor, fake_cuda, on_gpu

SPEC = DistillSpec(
    steps=2, ema=0.9, check_every=1, checkpoint_every=1, relation=TRDSpec(pooled_size=2, feature="up_blocks.1")
)


def losses(denoiser: Denoiser, folder: Path) -> list[float]:
    """A step, and the other by the same call again."""
    table = discover(tiny_denoiser())
    bit_map = BitMap(model_digest=table.digest, weights={la.name: np.array(4) for la in table})
    source = Trajectories(denoiser, batch=2)
    found = []
    for stop in (1, 2):
        student = build_student(denoiser.module, table, bit_map, trainable="lora", rank=2)
        groups = param_groups(student)

        def measure(student: torch.nn.Module) -> float:
            return float(convert(student).module.conv_out.weight.square().sum())  # type: ignore[operator, union-attr]

        for state in distill(student, groups, source, SPEC, folder=folder, measure=measure):
            found.append(state.loss)
            if state.step == stop:
                break
    return found


def test_a_training_and_its_continuation(tmp_path: Path) -> None:
    denoiser = tiny_denoiser(steps=2, guidance=2.0)
    expected = losses(denoiser, tmp_path / "cpu")
    with fake_cuda():
        moved = denoiser.with_module(on_gpu(denoiser.module))
        assert isinstance(next(moved.module.parameters()), FakeCudaTensor)
        assert losses(moved, tmp_path / "gpu") == pytest.approx(expected, rel=1e-3)
    assert len(expected) == 2
