"""KFAC rounding against brute force, against its own definition, and against GPTQ where it counts: in final samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from mpqsearch.core import QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.quant import decode, encode, fit_rows, gptq_rows, kernel, search
from mpqsearch.quant.kfac import DOUBT, LEAST, input_side, kfac_rows
from mpqsearch.quant.rows import RowQuantizer


def spread(n: int, size: int, seed: int, rank: int | None = None) -> Tensor:
    """Second moments ``[n, size, size]`` of correlated values."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank or 3 * size, size, generator=g) @ torch.randn(n, size, size, generator=g)
    return torch.bmm(x.mT, x).double() / x.shape[1]


def believed(outputs: Tensor) -> Tensor:
    """The output side as the module states it: less of what channels share, and no channel free."""
    level = outputs.diagonal().mean()
    made = (1 - DOUBT) * outputs / level
    made.diagonal().copy_((outputs.diagonal() / level).clamp_min(LEAST))
    return made


def value(error: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    """``tr(S E H E')``, with the damping of `gptq`."""
    damped = inputs / inputs.diagonal().mean() + 0.01 * torch.eye(len(inputs), dtype=torch.float64)
    e = error.double()
    return float(torch.trace(believed(outputs) @ e @ damped @ e.T))


def made(
    rows: Tensor, bits: Tensor, fmt: QuantFormat, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor, RowQuantizer]:
    """Quantized rows by GPTQ and by KFAC, and the quantizer of the latter."""
    start, quantizer = gptq_rows(rows, fit_rows(rows, bits, fmt), inputs)
    chosen, fitted = kfac_rows(rows, start, quantizer, inputs, outputs)
    return decode(encode(start, quantizer), quantizer), decode(encode(chosen, fitted), fitted), fitted


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "auto"])
@pytest.mark.parametrize("group", [0, 16])
def test_no_single_code_or_scale_could_be_chosen_better(scheme: str, group: int) -> None:
    rows = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))  # more columns than one block has
    bits = torch.tensor([1, 2, 2, 3, 3, 4, 8, 2], dtype=torch.uint8)
    inputs, outputs = spread(1, 96, 2), spread(1, 8, 3)
    fmt = QuantFormat(scheme=scheme, group=group)
    gptq, kfac, quantizer = made(rows, bits, fmt, inputs, outputs)
    before, after = (value(q - rows, inputs[0], outputs[0]) for q in (gptq, kfac))
    assert after < 0.9 * before
    codes = encode(kfac, quantizer)
    g = torch.Generator().manual_seed(4)
    for _ in range(200):
        i, j = int(torch.randint(8, (), generator=g)), int(torch.randint(96, (), generator=g))
        for step in (-1, 1):
            other = codes.int()
            other[i, j] += step
            if 0 <= other[i, j] < 2 ** int(bits[i]):
                changed = decode(other.to(torch.uint8), quantizer)
                assert value(changed - rows, inputs[0], outputs[0]) > after * (1 - 1e-3)
        k = int(torch.randint(len(quantizer.scale), (), generator=g))
        for factor in (0.99, 1.01):
            scale = quantizer.scale.clone()
            scale[k] *= factor
            changed = decode(codes, replace(quantizer, scale=scale))
            assert value(changed - rows, inputs[0], outputs[0]) > after * (1 - 1e-3)


def test_small_problems_come_near_the_optimum() -> None:
    """Two rows of three weights at two bits: 4096 codes."""
    ratios = []
    for seed in range(12):
        rows = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        inputs, outputs = spread(1, 3, seed + 50), spread(1, 2, seed + 90)
        bits = torch.full((2,), 2, dtype=torch.uint8)
        gptq, kfac, quantizer = made(rows, bits, QuantFormat(), inputs, outputs)
        all_codes = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.uint8).reshape(-1, 2, 3)
        best = min(value(decode(c, quantizer) - rows, inputs[0], outputs[0]) for c in all_codes)
        found = value(kfac - rows, inputs[0], outputs[0])
        assert (
            best * (1 - 1e-5) <= found <= value(gptq - rows, inputs[0], outputs[0]) * (1 + 1e-3)
        )  # scales are rounded to storage
        ratios.append(found / best)
    assert sorted(ratios)[len(ratios) // 2] < 1.2, ratios


def test_groups_parts_full_rows_and_what_no_gradient_reached() -> None:
    """Two groups of inputs, four parts of outputs: each part is chosen by itself, with the input of its group."""
    rows = torch.randn(16, 60, generator=torch.Generator().manual_seed(1))
    bits = torch.full((16,), 2, dtype=torch.uint8)
    inputs, outputs = spread(2, 60, 2), spread(4, 4, 3)
    outputs[3] = 0
    start, quantizer = gptq_rows(rows, fit_rows(rows, bits, QuantFormat()), inputs)
    bits[1] = 16
    quantizer = replace(quantizer, bits=bits)
    chosen, fitted = kfac_rows(rows, start, quantizer, inputs, outputs)
    for k in range(3):
        part = slice(4 * k, 4 * k + 4)
        alone, own = kfac_rows(rows[part], start[part], quantizer.of(part), inputs[k // 2][None], outputs[k][None])
        assert torch.equal(chosen[part], alone)
        assert torch.equal(fitted.scale[part], own.scale)
        assert not torch.equal(chosen[part], start[part])
    assert torch.equal(chosen[12:], start[12:])
    assert torch.equal(chosen[1], start[1])
    kept = [1, *range(12, 16)]
    assert torch.equal(fitted.scale[kept], quantizer.scale[kept])
    with pytest.raises(ConfigError, match="KFAC rounding: 16 rows of 60 need second moments"):
        kfac_rows(rows, start, quantizer, inputs, outputs[:3])


def test_the_kernel_is_its_own_text_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(6, 70, generator=torch.Generator().manual_seed(1))
    bits = torch.tensor([1, 2, 3, 4, 2, 8], dtype=torch.uint8)
    inputs, outputs = spread(1, 70, 2), spread(1, 6, 3)
    _, compiled, _ = made(rows, bits, QuantFormat(), inputs, outputs)
    plain = getattr(kernel.choose_codes, "py_func")  # noqa: B009
    monkeypatch.setattr(kernel, "choose_codes", plain)
    _, interpreted, _ = made(rows, bits, QuantFormat(), inputs, outputs)
    assert torch.equal(compiled, interpreted)


def test_the_input_side_is_the_mean_of_what_inputs_and_gradients_say() -> None:
    values, gradient = spread(2, 5, 1), spread(2, 5, 2).float()
    mean = input_side(values, 7 * gradient)
    assert torch.allclose(mean.diagonal(dim1=1, dim2=2).mean(1), values.diagonal(dim1=1, dim2=2).mean(1))
    assert torch.allclose(mean, input_side(values, gradient))
    assert torch.equal(input_side(values, torch.empty(0)), values)
    assert torch.equal(input_side(values, torch.zeros(2, 5, 5)), values)


def test_without_numba_the_codes_are_those_of_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpqsearch.quant.kfac.kernel_problem", lambda: "no numba")
    assert search.kernel_problem() == ""
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    bits = torch.full((4,), 2, dtype=torch.uint8)
    gptq, kfac, _ = made(rows, bits, QuantFormat(), spread(1, 8, 2), spread(1, 4, 3))
    assert torch.equal(gptq, kfac)
