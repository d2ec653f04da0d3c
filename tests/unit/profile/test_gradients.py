"""Second moments of output gradients against gradients by autograd, and what rounding by them does to samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mpqsearch.core import BitMap, QuantFormat
from mpqsearch.models import discover
from mpqsearch.profile import WithGradients, gradient_bytes, gradient_moments, input_statistics
from mpqsearch.profile.gradients import MOST, together
from mpqsearch.quant import quantize_model, rows_of
from mpqsearch.sampling import latents
from tests.support import tiny_denoiser


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_moments_are_those_of_the_gradient_of_the_final_sample(kind: str) -> None:
    """Central differences of ``v . x`` for every weight of one layer, through both steps of the sampler."""
    denoiser = tiny_denoiser(kind, steps=2)
    table = discover(denoiser)
    layer = min((la for la in table if la.n_channels > 2), key=lambda la: la.n_weights)
    known = input_statistics(denoiser, table, [3])
    found = gradient_moments(denoiser, table, [3], known, seed=7)
    final = latents(denoiser, [3])
    v = torch.randn((1, *final.shape), generator=torch.Generator().manual_seed(7))[0]
    module = denoiser.module.get_submodule(layer.name)

    def slope(parameter: torch.Tensor, at: int) -> float:
        flat, ends = parameter.data.view(-1), []
        before = float(flat[at])
        for sign in (1, -1):
            flat[at] = before + sign * 1e-2
            ends.append(float((v * latents(denoiser, [3])).sum()))
        flat[at] = before
        return (ends[0] - ends[1]) / 2e-2

    weight = module.weight
    gradient = rows_of(torch.tensor([slope(weight, i) for i in range(weight.numel())]).reshape(weight.shape), layer)
    if layer.has_bias:
        bias = torch.tensor([slope(module.bias, i) for i in range(layer.n_channels)])
        gradient = gradient - bias[:, None] * known[layer.name].mean[0].float()
    for side, by in (("outputs", gradient), ("inputs", gradient.T)):
        unit, (one,) = by / by.norm(dim=0).clamp_min(1e-20), found[f"{layer.name}/{side}"]
        assert torch.allclose(one, unit @ unit.T, atol=0.02 * float(one.diagonal().mean()) * len(one) ** 0.5)


def test_rounding_by_them_brings_samples_nearer_than_gptq() -> None:
    denoiser = tiny_denoiser("dit", steps=3)
    table = discover(denoiser)
    inputs = input_statistics(denoiser, table, range(8))
    both = WithGradients(inputs, gradient_moments(denoiser, table, range(100, 108), inputs))
    assert set(both) == set(inputs)
    assert len(both) == len(inputs)
    seeds = range(200, 216)
    truth, errors = latents(denoiser, seeds), {}
    bit_map = BitMap(
        model_digest=table.digest, weights=dict.fromkeys(table.by_name, torch.tensor(2).to(torch.uint8).numpy())
    )
    for rounding in ("nearest", "gptq", "kfac"):
        one = replace(bit_map, format=QuantFormat(rounding=rounding, scheme="auto"))
        small = quantize_model(denoiser.module, table, one, statistics=both, bias_correction=True)
        errors[rounding] = float((latents(denoiser.with_module(small.module), seeds) - truth).square().mean())
    assert errors["kfac"] < 0.9 * errors["gptq"] < errors["nearest"], errors


def test_wide_layers_are_taken_in_parts() -> None:
    assert together(320) == 320
    assert together(1280) == 320
    assert together(10240) == MOST
    assert together(64, groups=8) == 8
    table = discover(tiny_denoiser("unet"))
    sides = sum(la.n_channels**2 // la.groups + la.groups * la.weights_per_channel**2 for la in table)
    assert gradient_bytes(table) == 4 * (sum(la.n_weights for la in table) + sides)
