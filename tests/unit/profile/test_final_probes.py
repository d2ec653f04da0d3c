from __future__ import annotations

import numpy as np
import pytest
import torch

from mpqsearch.core import BitMap, Policy, QuantFormat
from mpqsearch.core.budget import uniform_map
from mpqsearch.errors import ConfigError
from mpqsearch.models import discover
from mpqsearch.profile import CalibrationSpec, final_probes, profile_base, relative_error, remeasure
from mpqsearch.profile.measure import MOST, calibrate
from mpqsearch.profile.probes import Prober, probe
from mpqsearch.quant import quantize_model, weight_of
from mpqsearch.sampling import SamplerSpec, noise_of, sample
from mpqsearch.sampling import sampler as sampler_module
from tests.support import tiny_denoiser

FMT = QuantFormat(n_candidates=20)


@pytest.mark.parametrize(("kind", "name"), [("unet", "ddim"), ("dit", "ddim"), ("dit", "dpm++")])
def test_effects_are_the_derivative_of_the_final_sample(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Central differences of ``v . x_final`` along a random change of a layer, through all steps and guidance, in
    float64."""
    denoiser = tiny_denoiser(kind)
    table = discover(denoiser)
    denoiser.module.double()
    monkeypatch.setattr(sampler_module, "noise_of", lambda seeds, shape: noise_of(seeds, shape).double())
    sampler = SamplerSpec(name=name, steps=2, guidance=2.0, batch=1)
    generator = torch.Generator().manual_seed(5)
    change = {
        la.name: 0.01 * torch.randn((1, la.n_channels, la.weights_per_channel), generator=generator).double()
        for la in table
    }
    means = {la.name: torch.zeros(la.groups, la.weights_per_channel) for la in table}
    found = final_probes(denoiser, table, sampler, [3], {"x": change}, means, probes=1, seed=7)
    shape = (1, 1, *denoiser.sample_shape)
    v = torch.randn(shape, generator=torch.Generator().manual_seed(7))[0].double() / np.prod(shape) ** 0.5
    analytic = found.effect["x"][0, :, :, 0].sum(0)
    # diffusers' DPM-Solver++ rounds its samples to float32, so its differences need a long step; the clip of DDIM a
    # short one.
    step, tolerance = (1e-4, 1e-4) if name == "ddim" else (0.05, 1e-2)
    for i, layer in list(enumerate(table))[:: len(table) // 6]:
        weight = denoiser.module.get_submodule(layer.name).weight
        kept, ends = weight.detach().clone(), []
        for sign in (1, -1):
            weight.data = kept + sign * step * weight_of(change[layer.name][0], layer)
            ends.append(float((v * sample(denoiser, [3], sampler)).sum()))
        weight.data = kept
        measured = (ends[0] - ends[1]) / (2 * step)
        assert measured == pytest.approx(float(analytic[i]), rel=tolerance, abs=1e-6), layer.name


def test_rows_sum_to_layers_and_probes_leave_no_trace() -> None:
    denoiser = tiny_denoiser("unet")
    table = discover(denoiser)
    change = {la.name: torch.full((2, la.n_channels, la.weights_per_channel), 1e-3) for la in table}
    means = {la.name: torch.zeros(la.groups, la.weights_per_channel) for la in table}
    found = final_probes(denoiser, table, SamplerSpec(steps=2, batch=1), [1], {"x": change}, means, probes=1)
    starts = np.cumsum([0, *(la.n_channels for la in table)])[:-1]
    # One probe: a layer's effect is the sum of its rows' effects, so its square is at most C times the sum of their
    # squares.
    layer = np.square(found.effect["x"].sum(1)[0])
    rows = np.add.reduceat(found.row_square["x"], starts, axis=0)
    assert (layer <= rows * np.array([[la.n_channels] for la in table]) * (1 + 1e-4)).all()
    assert found.gain.shape == (2, table.n_channels)
    for module in denoiser.module.modules():
        assert not module._forward_hooks
    for parameter in denoiser.module.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    with pytest.raises(ConfigError, match="reference"):
        final_probes(denoiser, table, SamplerSpec(steps=2, batch=1), [1], {"x": change}, means, along_residual=True)


def test_checkpointing_changes_memory_and_no_number() -> None:
    denoiser = tiny_denoiser("unet")
    table = discover(denoiser)
    stats, _, inputs = calibrate(
        denoiser, table, SamplerSpec(steps=2, batch=2), CalibrationSpec(samples=2, probe_inputs=2)
    )
    means = {n: s.mean.float() for n, s in stats.items()}
    errors = {"x": {la.name: torch.full((1, la.n_channels, la.weights_per_channel), 1e-3) for la in table}}
    results, saved = [], []
    for checkpoint in (False, True):
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        prober = Prober(denoiser, table, 1.0, errors, means, probes=1, checkpoint=checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            prober.run(inputs[:1])
        results.append(prober.result())
        saved.append(sum(sizes))
        assert not denoiser.module.is_gradient_checkpointing
    assert saved[1] < 0.8 * saved[0]  # what autograd keeps outside of the recomputed blocks
    for name in table.by_name:
        # Recomputation repeats the same float32 operations; only the order of sums over hooks may differ.
        torch.testing.assert_close(results[0].gain[name], results[1].gain[name], rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(
            results[0].layer_error["x"][name], results[1].layer_error["x"][name], rtol=1e-4, atol=1e-14
        )


def test_buckets_of_timesteps_add_up_to_the_gain() -> None:
    denoiser = tiny_denoiser("dit")
    table = discover(denoiser)
    stats, _, inputs = calibrate(
        denoiser, table, SamplerSpec(steps=4, batch=2), CalibrationSpec(samples=2, probe_inputs=8)
    )
    means = {n: s.mean.float() for n, s in stats.items()}
    errors = {"x": {la.name: torch.zeros(1, la.n_channels, la.weights_per_channel) for la in table}}
    found = probe(denoiser, table, inputs, 1.0, errors, means, probes=1)
    counts = np.bincount([i.timestep * 5 // 1000 for i in inputs], minlength=5)
    for layer in table:
        weighted = found.step_sensitivity[layer.name] @ torch.from_numpy(counts / counts.sum())
        torch.testing.assert_close(weighted, found.gain[layer.name], rtol=1e-10, atol=0)


def test_remeasured_changes_are_those_of_the_final_samples() -> None:
    """Oracle: give one layer of a map another width and sample again, same seeds. Fine widths, so that the changes are
    small."""
    denoiser = tiny_denoiser("dit")
    table = discover(denoiser)
    sampler = SamplerSpec(steps=2, guidance=2.0, batch=2)
    policy = Policy(widths=(5, 6, 7), roles={})
    spec = CalibrationSpec(samples=2, probe_inputs=2, schemes=("asymmetric",), smooth=False, sampler_seeds=0)
    base = profile_base(denoiser, table, policy, sampler, spec, FMT)
    at = uniform_map(table, policy, 6, FMT)
    seeds = range(1_000_000, 1_000_002)
    found = remeasure(denoiser, table, base, at, sampler, seeds, probes=24)
    reference = sample(denoiser, seeds, sampler)
    means = {n: torch.from_numpy(np.array(m)) for n, m in base.means.items()}

    def error(bit_map: BitMap) -> float:
        module = quantize_model(denoiser.module, table, bit_map, means=means).module
        return float((sample(denoiser.with_module(module), seeds, sampler) - reference).square().mean())

    now = error(at)
    assert found.calibration["operating_mse"] == pytest.approx(now, rel=1e-3)
    assert found.calibration["operating_points"] == [at.digest]
    predicted = found.arrays["layer_operating_error/asymmetric"]
    assert np.abs(predicted[:, 1]).max() < 1e-4 * now  # staying where one is costs nothing
    layers = list(range(0, len(table), 2))
    names = [table.layers[i].name for i in layers]
    maps = [BitMap(model_digest=table.digest, weights={**at.weights, n: np.array(5)}, format=FMT) for n in names]
    measured = np.array([error(m) - now for m in maps])
    # The curvature is a mean over 46 random projections (relative error 0.2 where one direction dominates); the slope
    # is exact.
    assert np.corrcoef(predicted[layers, 0], measured)[0, 1] > 0.9
    assert (np.sign(predicted[layers, 0]) == np.sign(measured))[np.abs(measured) > 0.2 * np.abs(measured).max()].all()
    with pytest.raises(ConfigError, match="at least one seed"):
        remeasure(denoiser, table, base, [at, at], sampler, [1])


def test_the_target_error_is_reached_by_going_on() -> None:
    denoiser = tiny_denoiser("dit")
    table = discover(denoiser)
    settings = {"samples": 2, "probe_inputs": 4, "probes": 1, "schemes": ("asymmetric",), "smooth": False}
    sampler, policy = SamplerSpec(steps=2, batch=2), Policy(widths=(4, 8))
    few = profile_base(
        denoiser, table, policy, sampler, CalibrationSpec(**settings, sampler_seeds=2, sampler_probes=1), FMT
    )  # type: ignore[arg-type]
    more = CalibrationSpec(**settings, sampler_seeds=2, sampler_probes=1, target_error=0.35)  # type: ignore[arg-type]
    many = profile_base(denoiser, table, policy, sampler, more, FMT)
    assert few.calibration["spent"].items() >= {"probe_inputs": 4, "sampler_seeds": 2}.items()
    for loss, key, first in (("probe", "probe_inputs", 4), ("sampler", "sampler_seeds", 2)):
        assert relative_error(few, loss) > 0.35 or many.calibration["spent"][key] == first
        assert relative_error(many, loss) <= 0.35 or many.calibration["spent"][key] >= MOST * first
    assert many.calibration["spent"]["probe_inputs"] > 4


def test_a_batch_along_its_residual_is_the_mean_of_its_samples() -> None:
    denoiser = tiny_denoiser("dit")
    table = discover(denoiser)
    sampler = SamplerSpec(steps=2, guidance=2.0, batch=4)
    seeds = [1, 2, 3]
    generator = torch.Generator().manual_seed(0)
    reference = sample(denoiser, seeds, sampler) + 0.1 * torch.randn((3, *denoiser.sample_shape), generator=generator)
    change = {
        la.name: 0.01 * torch.randn((2, la.n_channels, la.weights_per_channel), generator=generator) for la in table
    }
    means = {la.name: torch.zeros(la.groups, la.weights_per_channel) for la in table}
    slopes, along = [], []
    for batch in (1, 2, 3):
        found = final_probes(
            denoiser,
            table,
            sampler,
            seeds,
            {"x": change},
            means,
            probes=1,
            batch=batch,
            reference=reference,
            along_residual=True,
        )
        assert found.samples.tolist() == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[batch]
        each = (
            2
            * found.residual[:, None, None]
            * found.effect["x"].sum(1)
            / (found.samples * reference[0].numel())[:, None, None]
        )
        slopes.append(np.average(each, axis=0, weights=found.samples))
        along.append(found.row_along["x"])
    for other in (1, 2):  # float32 sums over another batch
        np.testing.assert_allclose(slopes[other], slopes[0], rtol=1e-3, atol=1e-5 * np.abs(slopes[0]).max())
        np.testing.assert_allclose(along[other], along[0], rtol=1e-3, atol=1e-5 * np.abs(along[0]).max())
    with pytest.raises(ConfigError, match="batch"):
        final_probes(denoiser, table, sampler, seeds, {"x": change}, means, batch=0)
