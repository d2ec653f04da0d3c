"""Exact output errors: every kind of layer against the error of its own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mpqsearch.core import LayerSpec, LayerTable, QuantFormat
from mpqsearch.models.discover import _spec
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.quant import error_tables, kurtosis, rows_of, weight_of, width_errors
from mpqsearch.quant.smoothing import smoothing_factors

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (4, 7, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 6)),
    "strided": (nn.Conv2d(4, 6, 3, padding=1, stride=2), (3, 4, 8, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (3, 4, 8, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 8, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=(0, 1)), (3, 4, 8, 8)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 8, 8)),
    "circular": (nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="circular"), (3, 4, 8, 8)),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same"), (3, 4, 8, 8)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 8, 8)),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 5, 4)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (3, 4, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 6)),
    "transposed grouped dilated": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2, groups=2, padding=1),
        (3, 4, 5, 6),
    ),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 3, 3)),
}


class Wrap(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


def collect(layer: nn.Module, *inputs: torch.Tensor) -> tuple[LayerSpec, Any, Any]:
    spec = _spec("layer", layer, 0, "linear")
    model = Wrap(layer)
    with torch.no_grad(), InputCollector(model, LayerTable(digest="d", layers=(spec,))) as collector:
        for x in inputs:
            model(x)
    return spec, collector.statistics()["layer"], collector.output_power()["layer"]


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_output_error_is_the_error_of_the_forward_pass(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    spec, stats, power = collect(layer, x[:1], x[1:])
    errors = width_errors(layer.weight, spec, (2, 4), QuantFormat(), stats)  # type: ignore[arg-type]
    tables = error_tables(errors, stats)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    clean = layer(x)
    torch.testing.assert_close(power.float(), clean.movedim(axis, 0).flatten(1).square().mean(1), rtol=1e-4, atol=1e-6)
    for j in range(2):
        weight = layer.weight.clone()  # type: ignore[operator]
        layer.weight.copy_(weight_of(rows_of(weight, spec) + errors[j], spec))  # type: ignore[operator]
        difference = (layer(x) - clean).movedim(axis, 0).flatten(1)
        layer.weight.copy_(weight)  # type: ignore[operator]
        # float32 sums over a few hundred positions: 1e-4 relative is rounding, anything wrong in the unfolding is of
        # order one.
        torch.testing.assert_close(tables["output_error"][:, j], difference.square().mean(1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(
            tables["output_error_corrected"][:, j], difference.var(1, unbiased=False), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(tables["weight_error"][:, j], errors[j].square().sum(1))


def test_input_maxima_are_those_of_the_input_channels() -> None:
    layer = nn.Conv2d(3, 2, 3, padding=1)
    x = torch.randn(2, 3, 5, 5)
    _, stats, _ = collect(layer, x)
    torch.testing.assert_close(stats.input_max, x.abs().amax((0, 2, 3)))


def test_kurtosis_is_the_fourth_standardised_moment() -> None:
    rows = torch.stack([torch.randn(200_000), torch.rand(200_000), torch.zeros(200_000)])
    rows[0] *= 1e-6
    found = kurtosis(rows)
    assert float(found[0]) == pytest.approx(3.0, abs=0.08)  # Gaussian; standard error sqrt(24 / n) = 0.011
    assert float(found[1]) == pytest.approx(1.8, abs=0.02)  # uniform
    assert float(found[2]) == 0.0  # constant: defined as 0, not NaN


def test_prescaling_balances_inputs_and_survives_dead_channels() -> None:
    spec = LayerSpec(name="c", kind="Conv2d", weight_shape=(2, 3, 1, 1))
    rows = torch.tensor([[1.0, 0.0, 4.0], [-2.0, 0.0, 1.0]])
    factor = smoothing_factors(rows, torch.tensor([8.0, 5.0, 0.0]), spec)
    torch.testing.assert_close(factor, torch.tensor([[2.0, 1.0, 1.0]]))  # sqrt(8 / 2); no weight; no input
    for alpha, expected in ((0.0, 0.5), (0.25, 8**0.25 / 2**0.75), (1.0, 8.0)):  # 1 / max|w|, between, max|x|
        factor = smoothing_factors(rows, torch.tensor([8.0, 5.0, 0.0]), spec, alpha)
        torch.testing.assert_close(factor, torch.tensor([[expected, 1.0, 1.0]]))


@torch.no_grad()
def test_smoothd_errors_are_in_the_units_of_the_weight() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    x = torch.randn(3, 4, 8, 8) * torch.tensor([1.0, 10.0, 0.1, 3.0])[:, None, None]
    spec, stats, _ = collect(layer, x)
    fmt = QuantFormat(smooth=True)
    error = width_errors(layer.weight, spec, (4,), fmt, stats)
    clean, weight = layer(x), layer.weight.clone()
    layer.weight.copy_(weight_of(rows_of(weight, spec) + error[0], spec))
    measured = (layer(x) - clean).movedim(1, 0).flatten(1).square().mean(1)
    torch.testing.assert_close(error_tables(error, stats)["output_error"][:, 0], measured, rtol=1e-4, atol=1e-7)
