from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from mpqsearch.core import LayerTable
from mpqsearch.errors import NumericsError
from mpqsearch.models import Denoiser, discover
from mpqsearch.models.calls import Call
from mpqsearch.profile import CalibrationSpec, WeightErrors, calibrate, final_effects, projected_effects
from mpqsearch.profile.probing import Probing
from mpqsearch.profile.recomputed import RecomputedErrors
from mpqsearch.profile.tables import shift_of
from mpqsearch.profile.weighing import Weighing
from mpqsearch.quant import weight_of
from mpqsearch.sampling import chain, plain
from tests.support import tiny_denoiser

SHAPE = (1, 8, 8)


def random_errors(table: LayerTable, n_widths: int, scale: float = 0.01) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        la.name: scale * torch.randn((n_widths, la.n_channels, la.weights_per_channel), generator=generator)
        for la in table
    }


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("kind", "name"), [("unet", "ddim"), ("dit", "ddim"), ("dit", "dpm++")])
def test_effects_are_the_derivative_of_the_final_sample(
    kind: str, name: str, corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences of ``v . x_final`` along a random change of a layer, with and without what bias correction
    takes off its bias, through all steps and guidance, in float64."""
    denoiser = tiny_denoiser(kind, name=name, steps=2, guidance=2.0)
    table, noise_of = discover(denoiser), plain.noise_of
    denoiser.module.double()
    monkeypatch.setattr(plain, "noise_of", lambda seeds, shape: noise_of(seeds, shape).double())
    change = {n: e.double() for n, e in random_errors(table, 1).items()}
    means = {la.name: torch.full((la.groups, la.weights_per_channel), 0.3) for la in table}
    shifts = {la.name: shift_of(change[la.name], la, means[la.name]) for la in table if la.has_bias}
    errors = WeightErrors(table, {"x": change}, {"x": shifts})
    effects = projected_effects(denoiser, table, [3], errors, probes=1, seed=7)
    shape = (1, 1, *SHAPE)
    v = torch.randn(shape, generator=torch.Generator().manual_seed(7))[0].double() / np.prod(shape) ** 0.5
    analytic = effects["x"][0, int(corrected), :, 0]
    # diffusers' DPM-Solver++ rounds its samples to float32, so its differences need a long step; the clip of DDIM a
    # short one.
    step, tolerance = (1e-4, 1e-4) if name == "ddim" else (0.05, 1e-2)
    for i, layer in list(enumerate(table))[:: len(table) // 6]:
        target = denoiser.module.get_submodule(layer.name)
        before, ends = [p.detach().clone() for p in target.parameters()], []
        for sign in (1, -1):
            target.weight.data = before[0] + sign * step * weight_of(change[layer.name][0], layer)
            if corrected and layer.has_bias:
                target.bias.data = before[1] - sign * step * shifts[layer.name][0]
            ends.append(float((v * chain(denoiser, [3]).final.detach()).sum()))
            for parameter, value in zip(target.parameters(), before, strict=True):
                parameter.data = value
        measured = (ends[0] - ends[1]) / (2 * step)
        assert measured == pytest.approx(float(analytic[i]), rel=tolerance, abs=1e-6), layer.name


def test_effects_leave_no_trace_and_are_the_same_when_errors_are_made_again() -> None:
    denoiser = tiny_denoiser("unet", steps=3)
    table = discover(denoiser)
    change = random_errors(table, 2)
    run = partial(projected_effects, denoiser, table, [1, 2], probes=2)
    held = run(WeightErrors(table, {"x": change}))["x"]
    made = RecomputedErrors(
        list(change), lambda n, part: change[n][:, part], lambda n: [slice(0, 3), slice(3, table[n].n_channels)]
    )
    again = run(WeightErrors(table, {"x": made}))["x"]
    assert held.shape == (4, 2, len(table), 2)
    # Gradients are summed over calls before the multiplication, or products after it.
    np.testing.assert_allclose(held, again, rtol=1e-3, atol=1e-5 * np.abs(held).max())
    for module in denoiser.module.modules():
        assert not module._forward_hooks
    for parameter in denoiser.module.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks


def test_a_sample_that_is_not_finite_is_named_by_its_seed() -> None:
    denoiser = tiny_denoiser("dit")
    table = discover(denoiser)
    next(denoiser.module.parameters()).data.fill_(torch.nan)
    with pytest.raises(NumericsError, match=r"not finite at timestep .* \(seeds 5..5\)"):
        final_effects(denoiser, table, [5], WeightErrors(table, {}), lambda x: x[None])


def steps_of(denoiser: Denoiser, table: LayerTable, n: int) -> list[Sequence[Call]]:
    spec = CalibrationSpec(samples=2, probe_inputs=n)
    return list(calibrate(denoiser, table, spec, weighing=Weighing()).steps)


def test_checkpointing_changes_memory_and_no_number() -> None:
    denoiser = tiny_denoiser("unet", steps=2)
    table = discover(denoiser)
    steps = steps_of(denoiser, table, 2)
    errors = WeightErrors(
        table, {"x": {la.name: torch.full((1, la.n_channels, la.weights_per_channel), 1e-3) for la in table}}
    )
    results, saved = [], []
    for checkpoint in (False, True):
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        probing = Probing(denoiser=denoiser, table=table, errors=errors, n_widths=1, probes=1, checkpoint=checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results.append(probing.measure(steps[:1]))
        saved.append(sum(sizes))
        assert not denoiser.module.is_gradient_checkpointing
    assert saved[1] < 0.8 * saved[0]  # what autograd keeps outside of the recomputed blocks
    for key in ("sensitivity", "layer_probe_error/x"):
        # Recomputation repeats the same float32 operations; only the order of sums over hooks may differ.
        np.testing.assert_allclose(results[0][key], results[1][key], rtol=1e-4, atol=1e-14)


def test_parts_of_a_run_add_up_to_the_sensitivity() -> None:
    denoiser = tiny_denoiser("dit", steps=4)
    table = discover(denoiser)
    steps = steps_of(denoiser, table, 8)
    assert [call.index for (call,) in steps] == [0, 1, 2, 3] * 2
    arrays = Probing(denoiser=denoiser, table=table, errors=WeightErrors(table, {}), n_widths=0, probes=1).measure(
        steps
    )
    counts = np.array([2, 2, 2, 2, 0])
    assert not arrays["step_sensitivity"][:, 4].any(), "four calls leave one of five parts empty"
    np.testing.assert_allclose(arrays["step_sensitivity"] @ (counts / counts.sum()), arrays["sensitivity"], rtol=1e-5)


def test_the_effect_of_a_batch_along_one_direction_is_the_sum_of_its_samples() -> None:
    denoiser, seeds = tiny_denoiser("dit", steps=2, guidance=2.0), [1, 2, 3]
    table = discover(denoiser)
    v = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(0))
    errors = WeightErrors(table, {"x": random_errors(table, 2)})
    whole = final_effects(denoiser, table, seeds, errors, lambda _: v[None])["x"]
    alone = [
        final_effects(denoiser, table, [s], errors, lambda _, i=i: v[None, i : i + 1])["x"] for i, s in enumerate(seeds)
    ]
    # float32 sums over another batch
    np.testing.assert_allclose(whole, sum(alone), rtol=1e-3, atol=1e-5 * np.abs(whole).max())
