"""Output errors in blocks and by direct products against full second moments and the forward pass, for every kind of
layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import LayerSpec, LayerTable, Policy, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.models import discover
from mpqsearch.profile import CalibrationSpec, calibrate, profile_model
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.profile.recomputed import held_bytes, row_blocks, row_bytes
from mpqsearch.profile.second_moments import Piece, blocks_within, output_errors, plan_second_moments
from mpqsearch.profile.tables import tables_of
from mpqsearch.quant import RowStatistics, error_tables, width_errors
from mpqsearch.sampling import SamplerSpec
from tests.support import tiny_denoiser
from tests.unit.quant.test_tables import LAYERS, Wrap, collect

WIDTHS = (2, 4)
FORMATS = {"asymmetric": QuantFormat(n_candidates=10), "symmetric": QuantFormat(scheme="symmetric", n_candidates=10)}
K = len(WIDTHS) * len(FORMATS)


def errors_by(module: nn.Module, rows: int | None = None) -> Any:
    def errors_of(layer: LayerSpec, stats: RowStatistics) -> Iterator[tuple[slice, Mapping[str, Tensor]]]:
        weight = module.get_submodule(layer.name).weight
        for part in row_blocks(layer, K, None if rows is None else rows * row_bytes(layer, K)):
            yield part, {v: width_errors(weight, layer, WIDTHS, fmt, stats, part) for v, fmt in FORMATS.items()}  # type: ignore[arg-type]

    return errors_of


def whole(errors_of: Any, layer: LayerSpec, stats: RowStatistics) -> dict[str, Tensor]:
    parts = [some for _, some in errors_of(layer, stats)]
    return {v: torch.cat([some[v] for some in parts], 1) for v in FORMATS}


def pieces(layer: LayerSpec, how: str) -> list[list[Piece]]:
    if how == "full":
        return [[Piece(layer=layer.name, how="full", n_bytes=0)]]
    cuts = [0, K // 3, K]
    return [[Piece(layer=layer.name, how="direct", start=a, stop=b, n_bytes=0)] for a, b in pairwise(cuts) if b > a]


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("how", ["full", "direct"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_way_gives_the_errors_of_the_full_second_moment(name: str, how: str, rows: int | None) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    spec, stats, _ = collect(layer, x[:1], x[1:])
    model = Wrap(layer)
    errors_of = errors_by(model, rows)
    light = {"layer": replace(stats, second_moment=torch.empty(0))}

    def run() -> None:
        model(x[:1])
        model(x[1:])

    table = LayerTable(digest="d", layers=(spec,))
    found = output_errors(model, table, light, errors_of, pieces(spec, how), run, limit=1 << 14)["layer"]
    for fmt, error in whole(errors_of, spec, stats).items():
        expected = error_tables(error, stats)
        # float32 products of at most a few hundred terms, summed in another order.
        torch.testing.assert_close(found[f"output_error/{fmt}"], expected["output_error"].float(), rtol=1e-5, atol=1e-9)
        scale = float(expected["output_error"].max())
        torch.testing.assert_close(
            found[f"output_error_corrected/{fmt}"],
            expected["output_error_corrected"].float(),
            rtol=1e-4,
            atol=1e-6 * scale,
        )


@pytest.mark.parametrize(("share", "ways"), [(1.0, {"full"}), (0.3, {"full", "direct"}), (0.03, {"full", "direct"})])
def test_a_whole_model_under_a_limit(share: float, ways: set[str]) -> None:
    denoiser = tiny_denoiser()
    table = discover(denoiser)
    errors_of = errors_by(denoiser.module)
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 400, 900, 0])

    def run() -> None:
        denoiser.denoise(x, t, torch.arange(4))

    with torch.no_grad(), InputCollector(denoiser.module, table) as collector:
        run()
    stats = collector.statistics()
    largest = max(la.groups * la.weights_per_channel**2 * 12 for la in table)
    limit = int(largest * share * 4 / 3) + 1
    passes = plan_second_moments(table, K, limit)
    used = {p.how for part in passes for p in part}
    assert used == ways
    for part in passes:
        assert len(part) == 1 or sum(p.n_bytes for p in part) <= limit
    done: list[tuple[int, int]] = []
    found = output_errors(
        denoiser.module, table, stats, errors_of, passes, run, limit=limit, progress=lambda a, b: done.append((a, b))
    )
    assert done == [(i + 1, len(passes)) for i in range(len(passes))]
    assert set(found) == set(table.by_name)
    for layer in table:
        for fmt, error in whole(errors_of, layer, stats[layer.name]).items():
            expected = error_tables(error, stats[layer.name])
            scale = float(expected["output_error"].max())
            torch.testing.assert_close(
                found[layer.name][f"output_error/{fmt}"],
                expected["output_error"].float(),
                rtol=1e-4,
                atol=1e-7 * scale,
            )
    assert not any(m._forward_pre_hooks for m in denoiser.module.modules())


def test_plans_cover_every_candidate_once() -> None:
    wide = LayerSpec(name="wide", kind="Linear", weight_shape=(8, 4000))
    tall = LayerSpec(name="tall", kind="Linear", weight_shape=(4000, 400))
    table = LayerTable(digest="d", layers=(wide, tall))
    assert [[p.how for p in part] for part in plan_second_moments(table, 7, 10**10)] == [["full", "full"]]
    # a second moment of `wide` takes 192 MB, an error of it 0.26 MB; a second moment of `tall` 2 MB
    limit = 40_000_000
    assert {p.layer: p.how for part in plan_second_moments(table, 7, limit) for p in part} == {
        "wide": "direct",
        "tall": "full",
    }
    many = [p for part in plan_second_moments(table, 700, limit) for p in part if p.layer == "wide"]
    assert (many[0].start, many[-1].stop) == (0, 700)
    assert len(many) > 1
    assert all(a.stop == b.start for a, b in pairwise(many))


def test_a_layer_that_does_not_run_has_no_error() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    specs = tuple(LayerSpec(name=n, kind="Linear", weight_shape=(3, 4)) for n in model)
    stats = {
        n: RowStatistics(second_moment=torch.empty(0), mean=torch.zeros(1, 4), input_max=torch.ones(4), n_positions=0)
        for n in model
    }
    table = LayerTable(digest="d", layers=specs)

    def run() -> None:
        model["used"](torch.ones(2, 4))

    for how in ("full", "direct"):
        passes = [[p for s in specs for p in pieces(s, how)[0]]]
        found = output_errors(model, table, stats, errors_by(model), passes, run)
        assert float(found["unused"]["output_error/asymmetric"].abs().max()) == 0
        assert float(found["used"]["output_error/asymmetric"].max()) > 0


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_profile_under_a_memory_limit_has_the_same_numbers(kind: str) -> None:
    denoiser = tiny_denoiser(kind)
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
        SamplerSpec(steps=2, guidance=2.0, batch=2),
        spec,
        QuantFormat(n_candidates=10),
    )
    whole = profile_model(*given)
    seen: list[tuple[str, int, int]] = []
    limited = profile_model(*given, memory_limit=150_000, progress=lambda *a: seen.append(a))
    assert max(total for label, _, total in seen if label == "output errors") > 1
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


def test_at_the_smallest_limit_rows_are_measured_one_by_one() -> None:
    denoiser = tiny_denoiser("dit")
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
    given = (denoiser, table, Policy(widths=WIDTHS), SamplerSpec(steps=1), spec, QuantFormat(n_candidates=4))
    with pytest.raises(
        ConfigError, match=r"its gradient, which comes in one piece.*Raise the limit to [\d.]+ MB"
    ) as caught:
        profile_model(*given, memory_limit=100)
    least = math.ceil(float(str(caught.value).split("Raise the limit to ")[1].split(" MB")[0]) * 1e6)
    largest, n_candidates = max(table, key=lambda la: la.n_weights), len(WIDTHS)
    assert least < n_candidates * largest.n_weights * 4, "less than the errors of the layer take together"
    assert len(blocks_within(denoiser.module, table, n_candidates, least)[largest.name]) == largest.n_channels
    whole, smallest = profile_model(*given), profile_model(*given, memory_limit=least)
    for key, array in whole.arrays.items():
        # Float32 products in another order; centred errors are differences, and so relative to what they are taken
        # from.
        scale = np.abs(whole.arrays[key.replace("_corrected", "")]).max()
        np.testing.assert_allclose(smallest.arrays[key], array, rtol=1e-4, atol=1e-6 * scale, err_msg=key)


def test_errors_that_are_not_held_are_made_again_bit_for_bit() -> None:
    denoiser = tiny_denoiser("unet")
    table = discover(denoiser)
    stats = calibrate(denoiser, table, SamplerSpec(steps=2, batch=2), CalibrationSpec(samples=2)).statistics
    formats = {c: QuantFormat(scheme=c, n_candidates=10) for c in ("asymmetric", "auto")}
    arrays, held = tables_of(denoiser, table, WIDTHS, formats, stats)
    same, again = tables_of(denoiser, table, WIDTHS, formats, stats, hold=False)
    assert held.held
    assert not again.held
    for key, array in arrays.items():
        np.testing.assert_array_equal(same[key], array, err_msg=key)
    for fmt, by_layer in held.errors.items():
        assert list(again.errors[fmt]) == list(by_layer)
        for name, error in by_layer.items():
            assert torch.equal(again.errors[fmt][name], error)
            assert again.errors[fmt][name] is not again.errors[fmt][name]
    assert held_bytes(table, 3) == 12 * sum(
        p.numel() for p in [denoiser.module.get_submodule(la.name).weight for la in table]
    )
    with pytest.raises(KeyError):
        again.errors["auto"]["no such layer"]
