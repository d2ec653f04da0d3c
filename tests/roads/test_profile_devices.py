"""A profile of a model on a GPU, and of models in half precision, against that of the same model in float32 on the
CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mpqsearch.core import BitMap, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.models import Denoiser, discover
from mpqsearch.profile import (
    CalibrationSpec,
    gptq_profile,
    input_statistics,
    profile_model,
)
from tests.support.fake_cuda import fake_cuda, on_gpu
from tests.support.inputs import calibrated
from tests.support.tiny import tiny_denoiser

SAMPLER: dict[str, Any] = {"steps": 2, "guidance": 2.0, "batch": 2}
POLICY = Policy(widths=(2, 4))
FORMAT = QuantFormat(n_candidates=4)
FULL = CalibrationSpec(
    samples=2,
    probe_inputs=2,
    probes=1,
    sampler_seeds=2,
    sampler_probes=1,
    context_seeds=2,
    smooth=True,
    final_widths=(2,),
    final_seeds=2,
    activation_bits=(4,),
)
LAYERS = CalibrationSpec(granularity="layer", samples=4)
SEEDS = range(1_000_000, 1_000_002)


def moved(denoiser: Denoiser) -> Denoiser:
    """The same denoiser with a copy of its module on the fake GPU."""
    return denoiser.with_module(on_gpu(denoiser.module))


def same(found: SensitivityProfile, expected: SensitivityProfile) -> None:
    assert found.arrays.keys() == expected.arrays.keys()
    for key, array in expected.arrays.items():
        scale = np.nanmax(np.abs(array))
        np.testing.assert_allclose(found.arrays[key], array, rtol=1e-3, atol=1e-5 * scale, err_msg=key)
    for name, mean in expected.means.items():
        assert isinstance(found.means[name], np.ndarray)
        np.testing.assert_allclose(found.means[name], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [FULL, LAYERS])
def test_a_profile_on_a_gpu_has_the_numbers_of_the_cpu(spec: CalibrationSpec) -> None:
    denoiser = tiny_denoiser("dit", **SAMPLER)
    table = discover(denoiser)
    given = (table, POLICY, spec, FORMAT)
    expected = profile_model(denoiser, *given)
    with fake_cuda():
        found = profile_model(moved(denoiser), *given)
    same(found, expected)


def test_what_follows_a_profile_runs_on_a_gpu() -> None:
    denoiser = tiny_denoiser("dit", **SAMPLER)
    table = discover(denoiser)
    spec = replace(FULL, final_widths=(), context_seeds=0, activation_bits=())
    profile = profile_model(denoiser, table, POLICY, spec, FORMAT)
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(4) for la in table},
        activations={la.name: 4 for la in table},
        format=replace(FORMAT, smooth=True),
    )

    def follow(model: Denoiser) -> tuple[Any, ...]:
        statistics = input_statistics(model, table, SEEDS)
        scales = calibrated(model, table, bit_map, seeds=SEEDS, statistics=statistics)
        return gptq_profile(model, table, profile, statistics, replace(FORMAT, scheme="auto")), scales

    expected = follow(denoiser)
    with fake_cuda():
        found = follow(moved(denoiser))
    same(found[0], expected[0])
    for name, scale in expected[1].scale.items():
        torch.testing.assert_close(found[1].scale[name].cpu(), scale, rtol=1e-4, atol=0)


def half(denoiser: Denoiser, dtype: torch.dtype) -> tuple[Denoiser, LayerTable]:
    model = denoiser.with_module(copy.deepcopy(denoiser.module).to(dtype))
    return model, discover(model)


@pytest.mark.parametrize(("dtype", "spec"), [(torch.bfloat16, FULL), (torch.float16, LAYERS)])
def test_models_in_half_precision_are_measured_in_float32(dtype: torch.dtype, spec: CalibrationSpec) -> None:
    """Oracle: the same rounded weights in float32. The model runs in its own precision, so the numbers differ by
    that."""
    model, table = half(tiny_denoiser("dit", **SAMPLER), dtype)
    exact = profile_model(model.with_module(copy.deepcopy(model.module).float()), table, POLICY, spec, FORMAT)
    found = profile_model(model, table, POLICY, spec, FORMAT)
    assert all(a.dtype == np.float32 for a in found.arrays.values())
    for key, array in exact.arrays.items():
        if "std_error" in key or "slope" in key:
            continue
        known = np.isfinite(array)
        assert np.isfinite(found.arrays[key][known]).all(), key
        total, wanted = float(found.arrays[key][known].sum()), float(array[known].sum())
        assert total == pytest.approx(wanted, rel=0.3), key
    assert next(model.module.parameters()).dtype == dtype
