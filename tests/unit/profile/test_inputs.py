"""Output errors of every kind of layer against the layer itself: unfolding, second moments, means, bias correction."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import BitMap, LayerTable, QuantFormat
from mpqsearch.models.discover import _spec
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.quant import error_tables, quantize_model, width_errors

BITS = (1, 2, 4, 8)
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 4)}


def kinds() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Every combination of dimension, groups, stride, dilation and padding that a layer can have; odd sizes and kernels
    of two lengths."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "Linear": (nn.Linear(8, 6), (5, 4, 8)),
        "Linear, no batch axis": (nn.Linear(8, 6), (40, 8)),
    }
    for dims, groups, stride, dilation in itertools.product((1, 2, 3), (1, 2, 4), (1, 2), (1, 2)):
        label = f"{dims}d, {groups} groups, stride {stride}, dilation {dilation}"
        kernel = (3, 2, 2)[:dims]
        settings: dict[str, Any] = {"groups": groups, "stride": stride, "dilation": dilation}
        modes = ("zeros", "circular", "reflect", "replicate") if groups < 4 else ("zeros",)
        for mode in modes:
            conv = CONV[dims](4, 8, kernel, padding=1, padding_mode=mode, **settings)
            made[f"Conv{label}, {mode}"] = (conv, (4, 4, *SIZES[dims]))
        out = (stride - 1,) * dims
        made[f"ConvTranspose{label}"] = (
            TRANSPOSED[dims](4, 8, kernel, padding=1, output_padding=out, **settings),
            (4, 4, *SIZES[dims]),
        )
    for dims in (1, 2, 3):
        made[f"Conv{dims}d, same"] = (CONV[dims](4, 8, 3, padding="same", dilation=2), (4, 4, *SIZES[dims]))
        made[f"Conv{dims}d, valid"] = (CONV[dims](4, 8, 2, padding="valid"), (4, 4, *SIZES[dims]))
        made[f"Conv{dims}d, no batch axis"] = (CONV[dims](4, 8, 2), (4, *SIZES[dims]))
        made[f"Conv{dims}d, depthwise"] = (CONV[dims](4, 4, 2, groups=4), (4, 4, *SIZES[dims]))
    return made


KINDS = kinds()


class Wrap(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def by_channel(y: Tensor, layer: nn.Module) -> Tensor:
    axis = y.dim() - 1 if isinstance(layer, nn.Linear) else y.dim() - 1 - len(layer.kernel_size)  # type: ignore[arg-type]
    return y.movedim(axis, 0).reshape(y.shape[axis], -1)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_predicted_errors_are_those_of_the_layer(name: str) -> None:
    layer, shape = KINDS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    spec = _spec("layer", layer, 0, "linear")
    model, table = Wrap(layer), LayerTable(digest="d", layers=(spec,))
    with InputCollector(model, table) as collector:
        model(x)
    stats = collector.statistics()["layer"]
    tables = error_tables(width_errors(layer.weight, spec, BITS, QuantFormat(), stats), stats)  # type: ignore[arg-type]
    exact = Wrap(layer).double()(x.double())
    layer.float()
    power = by_channel(exact, layer).square().mean(1)
    torch.testing.assert_close(collector.output_power()["layer"].double(), power, rtol=1e-5, atol=0)
    for j, bits in enumerate(BITS):
        bit_map = BitMap(model_digest="d", weights={"layer": np.array(bits)})
        for corrected in (False, True):
            given = {"layer": stats}
            quantized = quantize_model(model, table, bit_map, statistics=given, bias_correction=corrected).module
            change = by_channel(quantized.double()(x.double()) - exact, layer)
            # The weights are the same to the last bit; what is left is the rounding of float32 sums over positions and
            # taps.
            predicted = tables["output_error_corrected" if corrected else "output_error"][:, j].double()
            measured = change.square().mean(1)
            scale = tables["output_error"][:, j].double()  # of a centred error: what the mean shift was subtracted from
            assert float(((predicted - measured).abs() / scale).max()) < 1e-5, (bits, corrected)
            if not corrected:
                shift = change.mean(1)
                share = (tables["output_error"] - tables["output_error_corrected"])[:, j].double()
                assert float(((shift.square() - share).abs() / scale).max()) < 1e-5
            else:
                # The bias is stored in float32: its last bit (6e-8 of its size) against errors of a thousandth at 8
                # bits.
                assert float((change.mean(1).abs() / scale.sqrt()).max()) < 1e-3, "bias correction leaves a mean shift"


def collect(module: nn.Module, *calls: Any) -> InputCollector:
    """What a collector sees of the layer ``layer`` of a module over calls."""
    spec = _spec("layer", module.layer, 0, "linear")  # type: ignore[arg-type]
    with torch.no_grad(), InputCollector(module, LayerTable(digest="d", layers=(spec,))) as collector:
        for x in calls:
            module(x)
    return collector


class ByKeyword(Wrap):
    def forward(self, x: Tensor) -> Any:
        return self.layer(input=x)


def test_layers_that_are_called_by_keyword_are_seen() -> None:
    x = torch.randn(5, 8)
    layer = nn.Linear(8, 3)
    found = [collect(kind(layer), x).statistics()["layer"] for kind in (Wrap, ByKeyword)]
    assert torch.equal(found[0].second_moment, found[1].second_moment)
    torch.testing.assert_close(found[0].second_moment[0], (x.T @ x / 5).double())


def test_an_input_is_constant_when_no_call_changed_it() -> None:
    layer, x = nn.Linear(4, 3), torch.tensor([[1.0, -2.0, 0.0, 1e3]])
    assert collect(Wrap(layer), x, x.repeat(3, 1)).constant_inputs() == ("layer",)
    assert collect(Wrap(layer), x, x * (1 + 1e-7)).constant_inputs() == ("layer",), "up to rounding"
    assert collect(Wrap(layer), x, x + torch.tensor([0, 0, 1.0, 0])).constant_inputs() == ()
    assert collect(Wrap(layer)).constant_inputs() == (), "a layer that never ran has no input"


class Attention(nn.Module):
    """Three layers that are called with one tensor, which ``change`` may alter in between."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        if self.change:
            x.mul_(2)
        return q + k + self.v(x)


@pytest.mark.parametrize("change", [False, True])
def test_layers_that_share_an_input_have_its_second_moment_each(change: bool) -> None:
    module, x = Attention(change), torch.randn(6, 4)
    table = LayerTable(digest="d", layers=tuple(_spec(n, getattr(module, n), i, "linear") for i, n in enumerate("qkv")))
    exact = (x.T @ x / 6).double()
    with torch.no_grad(), InputCollector(module, table) as collector:
        module(x.clone())
        module(x.clone())
    for name, s in collector.statistics().items():
        torch.testing.assert_close(
            s.second_moment[0], exact * (4 if change and name == "v" else 1), rtol=1e-5, atol=1e-7
        )
