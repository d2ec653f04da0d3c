"""GPTQ against a column-by-column reference in numpy, and what it promises: never a worse output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION, SCHEMES, BitMap, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.models import discover
from mpqsearch.quant import (
    build_student,
    convert,
    decode,
    encode,
    fit_rows,
    gptq,
    gptq_rows,
    quantize_model,
    quantize_weight,
    rows_of,
)
from mpqsearch.quant.rows import RowQuantizer
from tests.support import tiny_denoiser
from tests.support.inputs import known

FORMATS = [QuantFormat(scheme=c) for c in SCHEMES]
GROUPED = [QuantFormat(scheme=c, group=16) for c in ("auto", "ternary")]


def inputs_of(groups: int, n: int, width: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Correlated inputs ``[G, n, D]``, of low rank where asked."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, rank or width, width, generator=g) * torch.rand(width, generator=g)
    return torch.randn(groups, n, rank or width, generator=g) @ mix


def moment_of_inputs(x: Tensor) -> Tensor:
    return torch.bmm(x.transpose(1, 2), x).double() / x.shape[1]


def output_error(error: Tensor, x: Tensor) -> Tensor:
    """Mean squared output error of every row over the inputs themselves."""
    grouped = error.reshape(len(x), -1, error.shape[1])
    return torch.bmm(x, grouped.transpose(1, 2)).square().mean(1).flatten()


def reference_codes(
    rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: np.ndarray, moment: np.ndarray
) -> np.ndarray:
    """One row and one column at a time: the rounded column is fixed, and the columns left are moved to the least output
    error given it.

    Scales and zeros are ``[C, n]``: each group of columns is finished before the next, the costliest first. That least
    is a linear system of the columns left, solved anew at each step; the Cholesky factor is a shortcut for
    all of them.
    """
    width = len(moment)
    damped = moment + 0.01 * np.trace(moment) / width * np.eye(width)
    cost = np.diag(damped).reshape(scale.shape[1], -1)
    groups = np.argsort(-cost.sum(1), kind="stable")
    order = np.concatenate([g * cost.shape[1] + np.argsort(-cost[g], kind="stable") for g in groups])
    scale, zero = (x.repeat(cost.shape[1], axis=1) for x in (scale, zero))
    codes = np.zeros(rows.shape, dtype=np.uint8)
    for r, row in enumerate(rows):
        free, wanted = list(order), row.astype(np.float64).copy()
        while free:
            j, *free = free
            code = np.clip(np.round(wanted[j] / scale[r, j] + zero[r, j]), 0, top[r])
            codes[r, j] = code
            off = (code - zero[r, j]) * scale[r, j] - wanted[j]
            if free:
                wanted[free] -= np.linalg.solve(damped[np.ix_(free, free)], damped[free, j] * off)
    return codes


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("fmt", [*FORMATS, *GROUPED], ids=lambda f: f.name)
def test_first_pass_is_the_column_by_column_reference(
    fmt: QuantFormat, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    monkeypatch.setattr(gptq, "BLOCK", block)
    g = torch.Generator().manual_seed(3)
    width = 48 if fmt.group else 11
    rows = torch.randn(8, width, generator=g)
    bits = torch.tensor([1, 2, 3, 4, 1, 2, 3, 8], dtype=torch.uint8)
    quantizer = fit_rows(rows, bits, fmt)
    moment = moment_of_inputs(inputs_of(1, 400, width))
    found, kept = gptq_rows(rows, quantizer, moment)
    assert torch.equal(kept.scale, quantizer.scale)
    scale, zero = (x.double().reshape(8, -1).numpy() for x in (quantizer.scale, quantizer.zero))
    top = [2 if fmt.scheme == "ternary" and b == 2 else 2**b - 1 for b in bits.tolist()]
    expected = reference_codes(rows.numpy(), scale, zero, np.array(top), moment[0].numpy())
    nearest = encode(rows, quantizer)
    through = [
        ((decode(torch.from_numpy(expected) if c is None else c, quantizer) - rows).double()) for c in (None, nearest)
    ]
    better = ((through[0] @ moment[0]) * through[0]).sum(1) < ((through[1] @ moment[0]) * through[1]).sum(1)
    assert (
        int(better.sum()) >= 5
    )  # the reference is worth something, so that the next line compares with it and not with rounding
    assert np.array_equal(encode(found, kept).numpy(), np.where(better[:, None].numpy(), expected, nearest.numpy()))


@pytest.mark.parametrize("rank", [None, 3], ids=["full rank", "rank 3"])
@pytest.mark.parametrize("fmt", [*FORMATS, *GROUPED], ids=lambda f: f.name)
@pytest.mark.parametrize("groups", [1, 2])
def test_no_row_is_worse_than_nearest_and_most_are_better(fmt: QuantFormat, groups: int, rank: int | None) -> None:
    g = torch.Generator().manual_seed(5)
    width = 48 if fmt.group else 24
    rows = torch.randn(40, width, generator=g)
    rows[3] = 0
    bits = torch.randint(1, 5, (40,), generator=g).to(torch.uint8)
    quantizer = fit_rows(rows, bits, fmt)
    x = inputs_of(groups, 500, width, rank=rank)
    x[:, :, 7] = 0  # a dead column
    found, fitted = gptq_rows(rows, quantizer, moment_of_inputs(x))
    before = output_error(decode(encode(rows, quantizer), quantizer) - rows, x)
    after = output_error(decode(encode(found, fitted), fitted) - rows, x)
    assert torch.isfinite(found).all()
    # Scales are kept in half precision with one exponent a layer: the last bit of a scale may change when that exponent
    # does.
    assert bool((after <= before * (1 + 2e-3) + 1e-9).all())
    assert float(after.sum()) < (0.75 if rank is None else 0.2) * float(before.sum())
    assert torch.equal(fitted.zero, quantizer.zero)
    assert torch.equal(fitted.bits, quantizer.bits)


def test_sweeps_lower_the_error_of_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    quantizer = fit_rows(rows, 2, QuantFormat(scheme="auto"))
    x = inputs_of(1, 600, 32)
    errors = []
    for sweeps in (0, 1, 3):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        found, fitted = gptq_rows(rows, quantizer, moment_of_inputs(x))
        errors.append(float(output_error(decode(encode(found, fitted), fitted) - rows, x).sum()))
    assert errors[2] < errors[1] < 0.95 * errors[0]


def test_uncorrelated_inputs_and_no_inputs_leave_the_nearest_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    quantizer = fit_rows(rows, 3, QuantFormat())
    found, kept = gptq_rows(rows, quantizer, torch.eye(9)[None])
    assert torch.equal(encode(found, kept), encode(rows, quantizer))
    found, kept = gptq_rows(rows, quantizer, torch.zeros(1, 9, 9))
    assert torch.equal(found, rows)
    assert torch.equal(kept.scale, quantizer.scale)


def test_rows_at_full_precision_stay_and_bad_moments_are_refused() -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    bits = torch.tensor([2, FULL_PRECISION, 3, 1], dtype=torch.uint8)
    searched = fit_rows(rows, torch.where(bits == FULL_PRECISION, 8, bits), QuantFormat())
    quantizer = RowQuantizer(scale=searched.scale, zero=searched.zero, bits=bits)
    found, _ = gptq_rows(rows, quantizer, moment_of_inputs(inputs_of(1, 100, 6)))
    assert torch.equal(found[1], rows[1])
    with pytest.raises(ConfigError, match=r"4 rows of 6 need second moments \[groups, 6, 6\].*got \(1, 5, 5\)"):
        gptq_rows(rows, quantizer, torch.eye(5)[None])


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(12, 8), lambda: nn.Conv2d(4, 8, 3, groups=2)], ids=["linear", "grouped"]
)
def test_pre_scaled_layers_compensate_what_their_inputs_see(make: object) -> None:
    torch.manual_seed(0)
    module: nn.Module = make()  # type: ignore[operator]
    root = nn.Sequential(module)
    from mpqsearch.core import LayerSpec

    layer = LayerSpec(
        name="0",
        kind=type(module).__name__,
        weight_shape=tuple(module.weight.shape),  # type: ignore[union-attr, arg-type]
        channel_axis=0,
        groups=int(getattr(module, "groups", 1)),
        has_bias=True,
    )
    weight: Tensor = root[0].weight  # type: ignore[assignment]
    rows = rows_of(weight.detach(), layer)
    x = inputs_of(layer.groups, 400, rows.shape[1])
    peak = torch.rand(layer.n_inputs) * 5 + 0.2
    widths = torch.tensor([1, 2, 2, 3, 1, 2, FULL_PRECISION, 3], dtype=torch.uint8)
    fmt = QuantFormat(scheme="auto", smooth=True, alpha=0.6)
    peaks = {"0": peak}
    plain = quantize_weight(weight, layer, widths, fmt, known(input_max=peaks)["0"])
    given = known(input_max=peaks, moments={"0": moment_of_inputs(x)})["0"]
    better = quantize_weight(weight, layer, widths, replace(fmt, rounding="gptq"), given)
    before, after = (output_error(q.rows() - rows, x) for q in (plain, better))
    assert bool((after <= before * (1 + 2e-3)).all())
    assert float(after.sum()) < 0.8 * float(before.sum())
    assert torch.equal(better.rows()[6], rows[6])
    assert better.start is not None
    factor = better.factor.repeat_interleave(len(rows) // layer.groups, dim=0)  # type: ignore[union-attr]
    codes = encode(
        better.start * factor,
        RowQuantizer(scale=better.quantizer.scale, zero=better.quantizer.zero, bits=widths.clamp(max=8)),
    )
    assert torch.equal(codes, better.codes)


@pytest.mark.parametrize("trainable", ["none", "lora", "all"])
def test_training_starts_from_the_compensated_model(trainable: str) -> None:
    denoiser = tiny_denoiser()
    table = discover(denoiser)
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(2, np.uint8) for la in table},
        format=QuantFormat(scheme="auto", rounding="gptq"),
    )
    moments, means = {}, {}
    for k, la in enumerate(table):
        x = inputs_of(la.groups, 300, la.weights_per_channel, seed=k) + 0.3
        moments[la.name], means[la.name] = moment_of_inputs(x), x.mean(1).double()
    given = {"statistics": known(means=means, moments=moments), "bias_correction": True}
    made = quantize_model(denoiser.module, table, bit_map, **given)  # type: ignore[arg-type]
    plain = replace(bit_map, format=QuantFormat(scheme="auto"))
    nearest = quantize_model(denoiser.module, table, plain, **given)  # type: ignore[arg-type]
    student = build_student(denoiser.module, table, bit_map, **given, trainable=trainable)  # type: ignore[arg-type]
    ended = convert(student)
    for la in table:
        assert torch.equal(ended.rows[la.name].codes, made.rows[la.name].codes)
        assert torch.equal(ended.module.get_submodule(la.name).weight, made.module.get_submodule(la.name).weight)
        assert torch.equal(ended.module.get_submodule(la.name).bias, made.module.get_submodule(la.name).bias)
    assert any(not torch.equal(made.rows[la.name].codes, nearest.rows[la.name].codes) for la in table)


def test_a_map_that_asks_for_compensation_says_what_it_needs() -> None:
    model = tiny_denoiser()
    table = discover(model)
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(3, dtype=np.uint8) for la in table},
        format=QuantFormat(rounding="gptq"),
    )
    with pytest.raises(ConfigError, match="second moments of the layers' inputs"):
        quantize_model(model.module, table, bit_map)
    with pytest.raises(ConfigError, match="second moments of the layers' inputs"):
        build_student(model.module, table, bit_map)
    assert BitMap.from_data(bit_map.to_data()).digest == bit_map.digest
    assert "rounding" not in QuantFormat().to_data(), "digests of maps from before it hold"
