"""Quantizers, students and calibration on a GPU, walked on tensors that only say that they lie there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import BitMap, LayerTable, QuantFormat
from mpqsearch.models import Denoiser, discover
from mpqsearch.quant import (
    RangeCollector,
    activation_table_of,
    build_student,
    convert,
    error_tables,
    param_groups,
    quantize_model,
    smooth_inputs,
    width_errors,
)
from mpqsearch.quant.rows import rows_of
from mpqsearch.quant.tables import RowStatistics, weight_error_tables
from tests.support import tiny_denoiser
from tests.support.everything import ALL
from tests.support.fake_cuda import DEVICE, FakeCudaTensor, fake_cuda, on_gpu


@pytest.fixture
def device() -> Iterator[torch.device]:
    with fake_cuda():
        yield DEVICE


def call(module: nn.Module, device: str | torch.device = "cpu") -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    t, labels = torch.tensor([800, 200]).to(device), torch.tensor([0, 3]).to(device)
    out: Tensor = module(x, t, class_labels=labels).sample  # type: ignore[operator]
    return out


def bit_map_of(table: LayerTable, **changes: Any) -> BitMap:
    rng = np.random.default_rng(0)
    weights = {la.name: rng.choice([1, 2, 4, 8, 16], la.n_channels) for la in table}
    return BitMap(model_digest=table.digest, weights=weights, **changes)


def statistics(table: LayerTable, seed: int = 0) -> dict[str, RowStatistics]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for la in table:
        x = torch.randn(la.groups, 50, la.weights_per_channel, generator=g) + 0.3
        y = torch.randn(la.groups, la.n_channels // la.groups, 50, generator=g)
        out[la.name] = RowStatistics(
            second_moment=torch.bmm(x.transpose(1, 2), x).double() / 50,
            mean=x.mean(1).double(),
            input_max=torch.rand(la.n_inputs, generator=g) + 0.5,
            output_moment=torch.bmm(y, y.mT),
            input_moment=torch.bmm(x.mT, x),
        )
    return out


PLACES = [("unet", "on the device"), ("dit", "on the CPU"), ("unet", "on the CPU"), ("dit", "on the device")]


@pytest.mark.parametrize(("kind", "corrected"), PLACES if ALL else PLACES[:2])
def test_quantize_model(kind: str, corrected: str, device: torch.device) -> None:
    denoiser: Denoiser = tiny_denoiser(kind)
    table = discover(denoiser)
    stats = statistics(table)
    bit_map = bit_map_of(table, format=QuantFormat(scheme="auto", smooth=True, rounding="kfac", n_candidates=4))
    for la in list(table)[4:]:  # GPTQ goes by column: slow here
        stats[la.name] = replace(stats[la.name], second_moment=torch.empty(0))
    expected = quantize_model(denoiser.module, table, bit_map, statistics=stats, bias_correction=True)
    module = on_gpu(denoiser.module)
    if corrected == "on the device":
        stats = {n: RowStatistics(**{k: on_gpu(getattr(s, k)) for k in s.__slots__}) for n, s in stats.items()}
    found = quantize_model(module, table, bit_map, statistics=stats, bias_correction=True)
    for name, rows in expected.rows.items():
        assert torch.equal(found.rows[name].codes.cpu(), rows.codes)
    torch.testing.assert_close(call(found.module, device).cpu(), call(expected.module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", ["scales", "lora", "all"] if ALL else ["lora"])
def test_students_and_activation_widths(trainable: Any, device: torch.device) -> None:
    denoiser = tiny_denoiser("unet")
    table = discover(denoiser)
    stats = statistics(table)
    bit_map = bit_map_of(
        table,
        format=QuantFormat(scheme="symmetric", smooth=True, n_candidates=4),
        activations={la.name: 4 for la in table},
        activation_steps=2,
    )

    def student_of(module: nn.Module, device: str | torch.device) -> nn.Module:
        factors = smooth_inputs(module, table, bit_map, stats)
        with RangeCollector(module, table, factors=factors, per_timestep=True) as collector:
            call(module, device)
        scales = collector.table(bit_map.activations)
        student = build_student(
            module, table, bit_map, statistics=stats, activations=scales, trainable=trainable, rank=2
        )
        optimizer = torch.optim.AdamW(param_groups(student))
        for _ in range(2):
            call(student, device).square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return student

    expected, found = student_of(denoiser.module, "cpu"), student_of(on_gpu(denoiser.module), device)
    # AdamW's steps are of one size whatever the gradient, so that the last digit of one may be seen.
    torch.testing.assert_close(call(found, device).cpu(), call(expected), rtol=1e-3, atol=1e-4)
    ended = convert(found)
    assert torch.equal(call(ended.module, device).cpu(), call(found, device).cpu())
    learned = activation_table_of(ended.module, table)
    assert learned is not None
    assert not any(isinstance(v, FakeCudaTensor) for v in (*learned.scale.values(), *learned.zero.values()))


def test_tables_of_errors(device: torch.device) -> None:
    table = discover(tiny_denoiser("unet"))
    layer = next(la for la in table if la.kind == "Conv2d")
    weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(1))
    stats, fmt = statistics(table)[layer.name], QuantFormat(smooth=True, n_candidates=4)
    expected = error_tables(width_errors(weight, layer, (2, 4), fmt, stats), stats)
    found = error_tables(width_errors(on_gpu(weight), layer, (2, 4), fmt, stats), stats)
    for key, values in expected.items():
        assert torch.equal(found[key].cpu(), values)
    rows = rows_of(weight, layer)
    given = ((2, 4), ("asymmetric", "auto"), QuantFormat(n_candidates=4))
    fused = weight_error_tables(on_gpu(rows), *given)
    for key, values in weight_error_tables(rows, *given).items():
        torch.testing.assert_close(fused[key].cpu(), values)
    assert fused["auto"].device == device
