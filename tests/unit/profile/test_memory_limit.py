"""A profile under a memory limit against one without: groups of second moments, and errors made again by rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpqsearch.core import LayerSpec, Policy, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.models import discover
from mpqsearch.profile import CalibrationSpec, calibrate, inputs, profile_model
from mpqsearch.profile.recomputed import blocks_within, row_bytes, slices_of
from mpqsearch.profile.tables import tables_of
from tests.support import tiny_denoiser
from tests.unit.quant.test_tables import LAYERS, collect

WIDTHS = (2, 4)


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_unfolded_in_parts_have_the_same_second_moment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    _, whole, _ = collect(layer, x)
    monkeypatch.setattr(inputs, "UNFOLDED", 1)
    _, parts, _ = collect(layer, x)
    torch.testing.assert_close(parts.second_moment, whole.second_moment, rtol=1e-5, atol=1e-6)


def test_rows_come_in_whole_groups_or_inside_one() -> None:
    layer = LayerSpec(name="x", kind="Conv2d", weight_shape=(12, 2, 3, 3), groups=3)
    for size in (1, 3, 4, 7, 8, 100):
        slices = slices_of(layer, size)
        assert [i for s in slices for i in range(12)[s]] == list(range(12))
        for part in slices:
            rows = part.stop - part.start
            assert rows <= size
            assert (part.start % 4 == 0 and rows % 4 == 0) or part.start // 4 == (part.stop - 1) // 4


@pytest.mark.parametrize(("kind", "limit"), [("unet", 3_000_000), ("dit", 1_800_000)])
def test_a_profile_under_a_memory_limit_has_the_same_numbers(kind: str, limit: int) -> None:
    denoiser = tiny_denoiser(kind, steps=2, guidance=2.0, batch=2)
    table = discover(denoiser)
    spec = CalibrationSpec(
        samples=3,
        probe_inputs=2,
        probes=1,
        sampler_seeds=1,
        sampler_probes=1,
        context_seeds=len(WIDTHS),
        schemes=("asymmetric",),
    )
    given = (
        denoiser,
        table,
        Policy(widths=WIDTHS),
        spec,
        QuantFormat(n_candidates=10),
    )
    whole = profile_model(*given)
    seen: list[tuple[str, int, int]] = []
    limited = profile_model(*given, memory_limit=limit, progress=lambda *a: seen.append(a))
    assert sum(label == "input moments" and done == total for label, done, total in seen) > 1, "groups of layers"
    assert set(limited.arrays) == set(whole.arrays)
    for key, array in whole.arrays.items():
        # Float32 products in another order; centred errors are differences, and so relative to what they are taken
        # from.
        scale = np.abs(whole.arrays[key.replace("_corrected", "")]).max()
        np.testing.assert_allclose(limited.arrays[key], array, rtol=1e-4, atol=1e-6 * scale, err_msg=key)
    assert ("layer_context_slope/asymmetric" in whole.arrays) == (len(set(WIDTHS) & set(spec.context_widths)) > 1)
    for name, mean in whole.means.items():
        np.testing.assert_allclose(limited.means[name], mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="the memory limit of .* is too small"):
        profile_model(*given, memory_limit=100)


def test_the_smallest_limit_that_the_message_names_works() -> None:
    denoiser = tiny_denoiser("dit", steps=1)
    table = discover(denoiser)
    spec = CalibrationSpec(
        samples=1,
        probe_inputs=1,
        probes=1,
        sampler_seeds=1,
        sampler_probes=1,
        context_seeds=2,
        context_widths=WIDTHS,
        schemes=("asymmetric",),
        smooth=False,
    )
    given = (denoiser, table, Policy(widths=WIDTHS), spec, QuantFormat(n_candidates=4))
    with pytest.raises(ConfigError, match=r"come in one piece each. Raise the limit to [\d.]+ MB") as caught:
        profile_model(*given, memory_limit=100)
    least = math.ceil(float(str(caught.value).split("Raise the limit to ")[1].split(" MB")[0]) * 1e6)
    whole, smallest = profile_model(*given), profile_model(*given, memory_limit=least)
    for key, array in whole.arrays.items():
        # Float32 products in another order; centred errors are differences, and so relative to what they are taken
        # from.
        scale = np.abs(whole.arrays[key.replace("_corrected", "")]).max()
        np.testing.assert_allclose(smallest.arrays[key], array, rtol=1e-4, atol=1e-6 * scale, err_msg=key)


def test_rows_one_by_one_have_the_same_errors() -> None:
    denoiser = tiny_denoiser("dit", steps=1)
    table = discover(denoiser)
    largest = max(table, key=lambda la: la.n_weights)
    least = largest.n_weights * 4 + row_bytes(largest, len(WIDTHS))
    blocks = blocks_within(denoiser.module, table, len(WIDTHS), least, second_moments=False)
    assert len(blocks[largest.name]) == largest.n_channels
    with pytest.raises(ConfigError, match="too small for the layer"):
        blocks_within(denoiser.module, table, len(WIDTHS), least - 1, second_moments=False)
    seen = calibrate(denoiser, table, CalibrationSpec(samples=1)).statistics
    formats = {"asymmetric": QuantFormat(n_candidates=4), "asymmetric+smooth": QuantFormat(n_candidates=4, smooth=True)}
    given = (denoiser, table, WIDTHS, formats, lambda la: seen[la.name])
    whole, _ = tables_of(*given)
    rows, _ = tables_of(*given, blocks=blocks, hold=False)
    for key, array in whole.items():
        scale = np.abs(whole[key.replace("_corrected", "")]).max()
        np.testing.assert_allclose(rows[key], array, rtol=1e-4, atol=1e-6 * scale, err_msg=key)


def test_a_layer_that_does_not_run_has_no_error() -> None:
    denoiser = tiny_denoiser(steps=1)
    denoiser.module.register_module("unused", torch.nn.Linear(4, 3))
    table = discover(denoiser)
    spec = CalibrationSpec(samples=1, probe_inputs=1, probes=1, sampler_seeds=0, schemes=("asymmetric",))
    for limit in (None, 3_000_000):
        measured = profile_model(denoiser, table, Policy(widths=WIDTHS), spec, QuantFormat(), memory_limit=limit)
        assert not measured.arrays["output_error/asymmetric"][measured.rows("unused")].any()


def test_errors_that_are_not_held_are_made_again_bit_for_bit() -> None:
    denoiser = tiny_denoiser("unet", steps=2)
    table = discover(denoiser)
    stats = calibrate(denoiser, table, CalibrationSpec(samples=2)).statistics
    formats = {c: QuantFormat(scheme=c, n_candidates=10) for c in ("asymmetric", "auto")}
    arrays, held = tables_of(denoiser, table, WIDTHS, formats, lambda la: stats[la.name])
    same, again = tables_of(denoiser, table, WIDTHS, formats, lambda la: stats[la.name], hold=False)
    assert held.held
    assert not again.held
    for key, array in arrays.items():
        np.testing.assert_array_equal(same[key], array, err_msg=key)
    for fmt, by_layer in held.errors.items():
        assert list(again.errors[fmt]) == list(by_layer)
        for name, error in by_layer.items():
            assert torch.equal(again.errors[fmt][name], error)
            assert again.errors[fmt][name] is not again.errors[fmt][name]
    with pytest.raises(KeyError):
        again.errors["auto"]["no such layer"]
