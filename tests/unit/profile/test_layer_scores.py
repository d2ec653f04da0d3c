"""Profiles of whole layers alone, against full ones and the layers themselves; totals with and without correction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import BitMap, LayerTable, Policy, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser, discover
from mpqsearch.profile import CalibrationSpec, profile_model
from mpqsearch.profile.probing import std_error_of
from mpqsearch.profile.weighing import SEEDS
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import SamplerSpec, adapt, latents
from tests.support import tiny_denoiser
from tests.support.everything import ALL
from tests.support.tiny import DDPM

FMT = QuantFormat(n_candidates=10)
SAMPLER = {"steps": 3, "batch": 8}
TOTALS = [f"layer_probe_{kind}/asymmetric" for kind in ("error", "error_corrected", "std_error", "std_error_corrected")]


def spec(**kwargs: object) -> CalibrationSpec:
    settings = {"samples": 4, "schemes": ("asymmetric",), "sampler_seeds": 0, "context_seeds": 0, **kwargs}
    return CalibrationSpec(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["unet", "dit"] if ALL else ["dit"])
def test_layer_scores_are_those_of_a_full_profile(kind: str) -> None:
    """The full profile projects every sample by itself, the scores a batch at a time: the same expectation."""
    denoiser = tiny_denoiser(kind, **SAMPLER)
    table = discover(denoiser)
    policy = Policy(widths=(3, 6))
    full = profile_model(denoiser, table, policy, spec(samples=16, probe_inputs=48, probes=8), FMT)
    scores = profile_model(denoiser, table, policy, spec(samples=96, granularity="layer"), FMT)
    assert set(scores.arrays) == set(TOTALS)
    for key in TOTALS[:2]:
        ratio = np.log(scores.arrays[key] / full.arrays[key])
        # 72 backward passes against 384, of which the first step's count: single totals are known to about 30 %.
        assert abs(float(np.median(ratio))) < 0.15, key
        assert float(np.corrcoef(np.log(scores.arrays[key]).ravel(), np.log(full.arrays[key]).ravel())[0, 1]) > 0.98
    assert set(scores.means) == set(table.by_name)


def test_layer_scores_take_one_pass_a_batch_and_leave_no_trace() -> None:
    denoiser = tiny_denoiser("dit", **SAMPLER)
    passes = []
    handle = denoiser.module.register_forward_pre_hook(lambda _m, args: passes.append(len(args[0])))
    profile_model(denoiser, discover(denoiser), Policy(widths=(4,)), spec(granularity="layer"), FMT)
    handle.remove()
    # Of four samples each: the scores, and a run for the mixes; of one: for gains a run and its way back.
    discovered, weighed = 2, 4 + 2 * SEEDS
    assert sum(passes) <= (4 + weighed) * 3 + discovered
    assert not any(p.requires_grad or p.grad is not None for p in denoiser.module.parameters())
    assert not any(m._forward_hooks for m in denoiser.module.modules())


def test_layer_scores_under_a_memory_limit_are_the_same() -> None:
    denoiser = tiny_denoiser("unet", **SAMPLER)
    given = (denoiser, discover(denoiser), Policy(widths=(3, 6)), spec(granularity="layer"), FMT)
    held = profile_model(*given)
    again = profile_model(*given, memory_limit=400_000)  # some rows of a layer at a time
    for key in TOTALS[:2]:
        np.testing.assert_allclose(again.arrays[key], held.arrays[key], rtol=1e-4, atol=1e-4 * held.arrays[key].max())
    with pytest.raises(ConfigError, match="Raise the limit"):
        profile_model(*given, memory_limit=1000)


def test_layer_scores_go_with_nothing_of_channels() -> None:
    for asked in ({"smooth": True}, {"final_widths": (3,)}, {"activation_bits": (4,)}):
        with pytest.raises(ConfigError, match="leave out"):
            spec(granularity="layer", **asked)
    with pytest.raises(ConfigError, match="granularity"):
        spec(granularity="channels")


class Guided(nn.Module):
    """A denoiser with an embedding of a guidance that is the same in every call, as Flux has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.guidance, self.inp, self.out = nn.Linear(6, 8), nn.Linear(16, 8), nn.Linear(8, 16)
        self.strength = 3.5

    def denoise(self, x: Tensor, _t: Tensor, _cond: object) -> Tensor:
        embedding = torch.cos(self.strength * torch.arange(6.0)).expand(len(x), 6)
        h = self.inp(x.flatten(1)) + self.guidance(embedding)
        return self.out(torch.tanh(h)).reshape(x.shape)


@pytest.fixture(scope="module")
def guided() -> tuple[Denoiser, LayerTable]:
    denoiser = adapt(Guided(), sample_shape=(1, 4, 4), scheduler=DDPM, sampler=SamplerSpec(**SAMPLER))
    return denoiser, discover(denoiser)


@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_a_layer_of_constant_input_costs_what_it_costs(guided: tuple[Denoiser, LayerTable], granularity: str) -> None:
    """With bias correction its error is folded away; without, it counts like any other."""
    denoiser, table = guided
    settings = {} if granularity == "layer" else {"sampler_seeds": 4, "final_widths": (2,)}
    profile = profile_model(denoiser, table, Policy(widths=(2, 4)), spec(granularity=granularity, **settings), FMT)
    assert profile.calibration["constant_inputs"] == ["guidance"]
    i = profile.index["guidance"]
    for family in {"layer": ["probe"], "channel": ["probe", "sampler", "final"]}[granularity]:
        plain, corrected = (
            profile.arrays[f"layer_{family}_error{s}/asymmetric"].astype(float) for s in ("", "_corrected")
        )
        assert plain[i, 0] > 1e-3 * np.nanmax(plain[:, 0]), family
        assert corrected[i, 0] < 1e-9 * plain[i, 0] + 1e-12, family
    if granularity == "channel":
        rows = profile.rows("guidance")
        assert profile.arrays["output_error/asymmetric"][rows, 0].sum() > 0
        weights = {la.name: np.array(2 if la.name == "guidance" else 16) for la in table}
        one = quantize_model(
            denoiser.module, table, BitMap(model_digest=table.digest, weights=weights, format=FMT)
        ).module
        seeds = range(1_000_000, 1_000_008)
        change = latents(denoiser.with_module(one), seeds) - latents(denoiser, seeds)
        measured = float(change.square().mean())
        assert profile.arrays["layer_final_error/asymmetric"][i, 0] == pytest.approx(measured, rel=1e-3)


def test_the_error_of_one_observation_is_unknown() -> None:
    assert np.isnan(std_error_of(np.ones((1, 3)))).all()
    values = np.array([[1.0], [3.0], [5.0]])
    assert std_error_of(values)[0] == pytest.approx(2 / 3**0.5)
    denoiser = tiny_denoiser("dit", **SAMPLER)
    settings = spec(samples=1, probe_inputs=1, probes=1, sampler_seeds=1, sampler_probes=2)
    profile = profile_model(denoiser, discover(denoiser), Policy(widths=(4,)), settings, FMT)
    for family in ("probe", "sampler"):
        assert np.isfinite(profile.arrays[f"layer_{family}_error/asymmetric"]).all()
        assert np.isnan(profile.arrays[f"layer_{family}_std_error/asymmetric"]).all()
