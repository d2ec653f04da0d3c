"""Slopes of layers among the errors of the others, against the measured error of the quantized models themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpqsearch.core import LayerTable, Policy, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.models import discover
from mpqsearch.profile import CalibrationSpec, WeightErrors, profile_model
from mpqsearch.profile.contexts import latin_contexts, quantized_at
from mpqsearch.profile.slopes import slopes_at
from mpqsearch.profile.tables import shift_of
from mpqsearch.quant import weight_of, width_errors
from mpqsearch.sampling import chain, plain
from tests.support import tiny_denoiser

FMT = QuantFormat(n_candidates=10)


def with_shifts(table: LayerTable, errors: dict[str, torch.Tensor], mean: float) -> WeightErrors:
    """Errors whose layers all see an input with this mean."""
    shifts = {
        la.name: shift_of(errors[la.name], la, torch.full((la.groups, la.weights_per_channel), mean))
        for la in table
        if la.has_bias
    }
    return WeightErrors(table, {"a": errors}, {"a": shifts})


def test_contexts_are_a_latin_square() -> None:
    table = discover(tiny_denoiser("dit"))
    policy = Policy(groups={"fused": ("qkv",)})
    maps = latin_contexts(table, policy, (2, 3, 4), seed=1)
    assert maps.shape == (3, len(table))
    shared: dict[str, list[int]] = {}
    for layer, column in zip(table, maps.T.tolist(), strict=True):
        fixed = policy.fixed_width(layer)
        assert sorted(column) == ([2, 3, 4] if fixed is None else [fixed] * 3)
        if fixed is None and layer.fuse:
            assert shared.setdefault(layer.fuse, column) == column
    assert shared
    assert not np.array_equal(maps, latin_contexts(table, policy, (2, 3, 4), seed=2))


def test_slopes_are_the_derivative_of_the_measured_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: central differences of the error of the final samples along the error of one layer, in float64, at both
    contexts."""
    denoiser = tiny_denoiser("dit", steps=2, guidance=2.0)
    table, noise_of = discover(denoiser), plain.noise_of
    widths, policy = (3, 5), Policy(widths=(3, 5))
    errors = {
        la.name: width_errors(denoiser.module.get_submodule(la.name).weight, la, widths, FMT, None).double()  # type: ignore[arg-type]
        for la in table
    }
    given = with_shifts(table, errors, 0.05)
    denoiser.module.double()
    monkeypatch.setattr(plain, "noise_of", lambda seeds, shape: noise_of(seeds, shape).double())
    contexts, seeds = latin_contexts(table, policy, widths, seed=3), [5, 6, 7, 8]
    found = slopes_at(denoiser, table, contexts, widths, "a", seeds, given, batch=2)
    assert len(found.mse) == 2
    reference = chain(denoiser, seeds).final.detach()
    step = 1e-4
    for i, layer in list(enumerate(table))[:: len(table) // 4]:
        for j in range(2):
            measured, seen = [], []
            for number, context in enumerate(contexts):
                part = seeds[number::2]
                module = quantized_at(denoiser.module, table, context, widths, "a", given)
                target = module.get_submodule(layer.name)
                error, ends = errors[layer.name][j], []
                shift = 0.05 * error.sum(1)

                def mse(module: torch.nn.Module = module, part: list[int] = part, number: int = number) -> float:
                    final = chain(denoiser.with_module(module), part).final.detach()
                    return float((final - reference[number::2]).square().mean())

                seen.append(mse())
                kept = [p.detach().clone() for p in target.parameters()]
                for sign in (1, -1):
                    target.weight.data = kept[0] + sign * step * weight_of(error, layer)
                    if layer.has_bias:
                        target.bias.data = kept[1] - sign * step * shift
                    ends.append(mse())
                measured.append((ends[0] - ends[1]) / (2 * step))
            assert found.slope["a"][i, j] == pytest.approx(np.mean(measured), rel=2e-3, abs=1e-7), layer.name
            assert found.mse == pytest.approx(seen, rel=1e-4)
    with pytest.raises(ConfigError, match="at least one seed"):
        slopes_at(denoiser, table, contexts, widths, "a", [1], given)


def test_a_profile_holds_slopes_where_widths_can_be_mixed() -> None:
    denoiser = tiny_denoiser("dit", steps=2, batch=2)
    table = discover(denoiser)
    spec = CalibrationSpec(
        samples=2,
        probe_inputs=2,
        probes=1,
        sampler_seeds=1,
        sampler_probes=1,
        context_seeds=3,
        schemes=("asymmetric",),
        smooth=False,
    )
    whole = profile_model(denoiser, table, Policy(widths=(2, 3, 4, 8)), spec, FMT)
    assert whole.arrays["layer_context_slope/asymmetric"].shape == (len(table), 4)
    assert whole.arrays["layer_context_std_error/asymmetric"].shape == (len(table), 4)
    for policy, changed in (
        (Policy(widths=(4, 8)), spec),
        (Policy(widths=(2, 3, 4, 8)), replace(spec, context_seeds=0)),
    ):
        assert "layer_context_slope/asymmetric" not in profile_model(denoiser, table, policy, changed, FMT).arrays


def test_slopes_over_a_context_add_up_to_its_error() -> None:
    """Oracle: with errors so small that the sampler is linear in them, ``|r|^2 = sum r'J e``, the error that its
    samples measure."""
    denoiser = tiny_denoiser("dit", steps=3)
    table = discover(denoiser)
    errors = {
        la.name: width_errors(denoiser.module.get_submodule(la.name).weight, la, (7, 8), FMT, None) / 8  # type: ignore[arg-type]
        for la in table
    }
    contexts = latin_contexts(table, Policy(widths=(7, 8), roles={}), (7, 8), seed=1)[:1]
    given = WeightErrors(table, {"a": errors})
    found = slopes_at(denoiser, table, contexts, (7, 8), "a", [1, 2, 3, 4], given)
    chosen = (contexts[0] == 8).astype(int)
    assert found.slope["a"][np.arange(len(table)), chosen].sum() / 2 == pytest.approx(found.mse[0], rel=0.02)
