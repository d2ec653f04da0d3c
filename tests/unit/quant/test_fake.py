"""Gradients of fake quantization against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.quant import build_student
from mpqsearch.quant.fake import as_stored, fake_quantize
from tests.support.inputs import known


def frozen(x: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, where they are not clipped, and the rounding errors, in float64."""
    units = x.double() / scale.double()[:, None] + zero.double()[:, None]
    code = units.round().clamp_min(0).minimum(top.double()[:, None])
    inside = code == units.round()
    return code, inside, (code - units).where(inside, 0)


def central_differences(function, leaf: int, start: list[Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
    numeric = torch.empty_like(start[leaf])
    for i in range(numeric.numel()):
        ends = []
        for sign in (1, -1):
            moved = [t.clone() for t in start]
            moved[leaf].view(-1)[i] += sign * 1e-5
            ends.append(function(*moved))
        numeric.view(-1)[i] = (ends[0] - ends[1]) / 2e-5
    return numeric


def test_gradients_against_finite_differences_away_from_ties() -> None:
    # A straight-through gradient is the derivative of the quantizer with its rounding error e held fixed: y = s (c - z)
    # where clipped, else y = x + s e. Both are smooth, so central differences in float64 are its oracle.
    torch.manual_seed(0)
    x, weight = torch.randn(5, 9), torch.randn(5, 9)
    top = torch.tensor([1.0, 3, 7, 15, 7])
    scale, zero = torch.tensor([0.6875, 0.375, 0.25, 0.109375, 0.3125]), torch.tensor([0.0, 2, 3.5, 8, 4])
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero)]
    (fake_quantize(*leaves, top) * weight).sum().backward()
    code, inside, error = frozen(x, scale, zero, top)

    def smooth(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return (torch.where(inside, x + s[:, None] * error, s[:, None] * (code - z[:, None])) * weight).sum()

    lsq = (9 * top.double()).rsqrt()
    for k, leaf in enumerate(leaves):
        numeric = central_differences(smooth, k, [x.double(), scale.double(), zero.double()])
        expected = numeric if k == 0 else numeric * lsq
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    assert 0 < int(inside.sum()) < 45, "both branches must be seen"


def test_rounding_to_what_is_stored_passes_gradients() -> None:
    scale, zero = torch.tensor([0.30001, 0.7]).requires_grad_(), torch.tensor([2.4, -3.0]).requires_grad_()
    s, z = as_stored(scale, zero, torch.tensor([7.0, 7.0]))
    assert z.tolist() == [2.0, 0.0]
    assert torch.equal(s.detach(), scale.detach().half().float())
    (s.sum() * 2 + z.sum() * 3).backward()
    assert scale.grad is not None
    assert zero.grad is not None
    assert scale.grad.tolist() == [2, 2]
    assert zero.grad.tolist() == [3, 3]


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_gradients_of_a_layer_with_smoothing_and_a_row_at_full_precision(scheme: str) -> None:
    torch.manual_seed(0)
    layer = LayerSpec(name="layer", kind="Linear", weight_shape=(5, 9), has_bias=True)
    root = nn.Module()
    root.layer = nn.Linear(9, 5)
    table = LayerTable(digest="0" * 64, layers=(layer,))
    bit_map = BitMap(
        model_digest=table.digest,
        weights={"layer": [1, 2, 3, 4, 16]},  # type: ignore[dict-item]
        format=QuantFormat(scheme=scheme, smooth=True),
    )
    student = build_student(
        root, table, bit_map, statistics=known(input_max={"layer": torch.rand(9) * 5 + 0.5}), trainable="all"
    )
    q, weight = student.layer.weight_quantizer, torch.randn(5, 9)  # type: ignore[union-attr]
    (q() * weight).sum().backward()  # type: ignore[operator]
    units = [q.weight_unit[:, None], q.scale_unit, torch.ones(5)]  # type: ignore[union-attr, index]
    parameters = [q.base, q.scale, q.zero]  # type: ignore[union-attr]
    start = [(p.detach() * u).double() for p, u in zip(parameters, units, strict=True)]  # type: ignore[union-attr, operator]
    f, top = q.group_factor.double(), q.top.double()  # type: ignore[union-attr, operator]
    code, inside, error = frozen(start[0] * f, start[1], start[2], top)

    def smooth(w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        y = torch.where(inside, w + s[:, None] * error / f, s[:, None] * (code - z[:, None]) / f)
        return (torch.cat([y[:4], w[4:]]) * weight).sum()

    lsq = (9 * top).rsqrt()
    gradients = [p.grad for p in parameters]  # type: ignore[union-attr]
    for k, gradient in enumerate(gradients):
        expected = central_differences(smooth, k, start) * (1 if k == 0 else lsq) * units[k]
        if k == 2 and scheme == "symmetric":
            assert gradient is None, "the zero of a symmetric scheme is no parameter"
            continue
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
