"""The five lines of the package's front door, on a tiny model."""

from __future__ import annotations

import torch

import mpqsearch as mpq
from mpqsearch.core import Policy, QuantFormat
from mpqsearch.profile import CalibrationSpec
from mpqsearch.sampling import SamplerSpec
from tests.support import tiny_denoiser


def test_five_lines_from_a_model_to_a_picture() -> None:
    model = tiny_denoiser()
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    policy, sampler = Policy(widths=(2, 3, 4)), SamplerSpec(steps=2, batch=4)
    calibration = CalibrationSpec(samples=2, probe_inputs=2, probes=1, schemes=("auto",), smooth=False)
    profile = mpq.profile_model(
        model, policy=policy, sampler=sampler, calibration=calibration, quantizer=QuantFormat(n_candidates=8)
    )
    made = mpq.allocate_bits(model, profile, "uniform:3", policy=policy)
    small = mpq.quantize(model, made, profile)
    figure = mpq.compare(model, small, seeds=range(3), sampler=sampler)
    assert made.within_budget
    assert made.result is not None
    assert made.result.lower_bound <= made.result.loss
    assert "PSNR" in figure.axes[0].get_title(loc="left")
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items()), "the original is left as it is"
    name = next(la.name for la in mpq.discover(model) if policy.fixed_width(la) is None)
    rows = dict(small.module.named_modules())[name].weight.flatten(1)
    assert len(rows[0].unique()) <= 16


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(mpq, "profil_model")
    assert "load_model" in dir(mpq)
