"""Layers that are called by keyword, scale their weight as they run, or hold half-precision weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpqsearch.core import BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.errors import LayerMismatchError
from mpqsearch.models import discover
from mpqsearch.models.hooks import uses_weight_as_it_is
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.quant import RangeCollector, build_student, convert, quantize_model
from tests.support import tiny_denoiser
from tests.support.inputs import known

TABLE = LayerTable(
    digest="0" * 64, layers=(LayerSpec(name="layer", kind="Conv2d", weight_shape=(4, 3, 3, 3), has_bias=True),)
)


class Equalised(nn.Conv2d):
    """Equalised learning rate: the weight is scaled as the layer runs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.weight[0].numel() ** -0.5, self.bias)


class Named(nn.Conv2d):
    """Another name for the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def root_of(layer: nn.Module) -> nn.Module:
    root = nn.Module()
    root.layer = layer
    return root


def inputs_of(n: int = 64) -> Tensor:
    return torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.5


@torch.no_grad()
def means_of(root: nn.Module, x: Tensor) -> Mapping[str, Tensor]:
    with InputCollector(root, TABLE) as collector:
        root.layer(x)  # type: ignore[operator]
    return {n: s.mean for n, s in collector.statistics().items()}


@pytest.mark.parametrize("kind", [nn.Conv2d, Equalised, Named])
@torch.no_grad()
def test_bias_correction_is_never_worse_than_none(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    root = root_of(kind(3, 4, 3))
    nn.init.normal_(root.layer.weight)  # type: ignore[union-attr, arg-type]
    x, bit_map = inputs_of(), BitMap(model_digest=TABLE.digest, weights={"layer": np.array(2)})
    errors = []
    for corrected in (False, True):
        given = known(means=means_of(root, x))
        module = quantize_model(root, TABLE, bit_map, statistics=given, bias_correction=corrected).module
        errors.append(float((module.layer(x) - root.layer(x)).norm()))  # type: ignore[operator]
    if kind is Equalised:
        assert errors[1] == errors[0], "its output does not follow from its input and weight: left alone"
    else:
        assert errors[1] < 0.9 * errors[0]


@torch.no_grad()
def test_a_layer_is_recognised_by_what_it_computes() -> None:
    x = inputs_of(2)
    for layer, expected in ((nn.Conv2d(3, 4, 3), True), (Named(3, 4, 3), True), (Equalised(3, 4, 3), False)):
        assert uses_weight_as_it_is(layer, (x,), {}, layer(x)) is expected
    patched = nn.Conv2d(3, 4, 3)
    patched.forward = lambda x: nn.Conv2d.forward(patched, x) * 2  # type: ignore[method-assign]
    assert not uses_weight_as_it_is(patched, (x,), {}, patched(x))


@pytest.mark.parametrize(("kind", "keyword"), [(nn.Conv2d, "input"), (Named, "x")])
def test_layers_called_by_keyword(kind: type[nn.Conv2d], keyword: str) -> None:
    torch.manual_seed(0)
    root, x = root_of(kind(3, 4, 3)), inputs_of(4)
    bit_map = BitMap(model_digest=TABLE.digest, weights={"layer": np.array(4)}, activations={"layer": 3})

    def scales(**kwargs: Tensor) -> Any:
        with RangeCollector(root, TABLE) as collector:
            root.layer(*() if kwargs else (x,), **kwargs)  # type: ignore[operator]
        return collector.table(bit_map.activations)

    activations = scales(**{keyword: x})
    assert torch.equal(activations.scale["layer"], scales().scale["layer"])
    module = quantize_model(root, TABLE, bit_map, activations=activations).module
    assert torch.equal(module.layer(**{keyword: x}), module.layer(x))  # type: ignore[operator]
    student = build_student(root, TABLE, bit_map, activations=activations)
    assert torch.equal(student.layer(**{keyword: x}), module.layer(x))  # type: ignore[operator]
    assert torch.equal(convert(student).module.layer(**{keyword: x}), module.layer(x))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_computed_with_in_float32_and_stay_as_they_are(dtype: torch.dtype) -> None:
    denoiser = tiny_denoiser("dit")
    module = denoiser.module.to(dtype)
    table = discover(denoiser)
    rng = np.random.default_rng(0)
    weights = {la.name: rng.choice([2, 4, 8, 16], la.n_channels) for la in table}
    bit_map = BitMap(model_digest=table.digest, weights=weights, format=QuantFormat(n_candidates=10))
    means = {la.name: torch.ones(la.groups, la.weights_per_channel) for la in table}
    given: dict[str, Any] = {"statistics": known(means=means), "bias_correction": True}
    expected = quantize_model(module.float(), table, bit_map, **given)
    found = quantize_model(module.to(dtype), table, bit_map, **given)
    student = build_student(module, table, bit_map, **given, rank=2)
    for name, parameter in found.module.named_parameters():
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter, expected.module.get_parameter(name).to(dtype))
    for layer in table:
        assert torch.equal(found.rows[layer.name].codes, expected.rows[layer.name].codes)
        start = student.get_submodule(layer.name).weight  # students train in float32
        assert start.dtype == torch.float32
        assert torch.equal(start.to(dtype), found.module.get_parameter(f"{layer.name}.weight"))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 500])
    out = student(x, t, class_labels=torch.tensor([0, 1])).sample
    assert out.dtype == torch.float32
    out.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_computed_from_others_is_refused_by_name(norm: Any) -> None:
    root = root_of(norm(nn.Conv2d(3, 4, 3)))
    with pytest.raises(LayerMismatchError, match="layer"):
        quantize_model(root, TABLE, BitMap(model_digest=TABLE.digest, weights={"layer": np.array(2)}))
