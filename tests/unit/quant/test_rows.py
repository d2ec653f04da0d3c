"""The vectorised quantizer against one Python loop over channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpqsearch.core import SCHEMES, LayerSpec, QuantFormat
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.quant import decode, encode, fit_rows, rows_of, weight_of
from mpqsearch.quant.tables import weight_error_tables


def top_of(bits: int, scheme: str) -> int:
    return 2 if (bits, scheme) == (2, "ternary") else 2**bits - 1


def best_level(row: Tensor) -> float:
    """Level of the three-level quantizer with the least squared error, by trying every number of zeros."""
    size = np.sort(row.abs().double().numpy())[::-1]
    errors = {}
    for k in range(1, len(size) + 1):
        level = float(size[:k].mean())
        errors[level] = float(((size[:k] - level) ** 2).sum() + (size[k:] ** 2).sum())
    return min(errors, key=lambda level: errors[level])


def loop_search(row: Tensor, bits: int, scheme: str, p: float, n: int = 80) -> tuple[float, float]:
    """Least error and its scale, one candidate at a time in float64: the oracle."""
    # The candidate scales are float32 numbers, formed as the quantizer forms them: at 7 bits their last bit alone moves
    # the error by 2e-6. Everything after them is float64.
    top = top_of(bits, scheme)
    if scheme == "asymmetric":
        low, high = row.min().clamp(max=0), row.max().clamp(min=0)
        widest = (high - low) / top
        zero = min(float((-low / widest).round()), top)
    else:
        reach = row.abs().max()
        if bits == 1:
            reach = reach.minimum(2.5 * row.square().mean().sqrt())
        if top == 2:
            reach = reach.minimum(2.5 * torch.tensor(best_level(row)))
        widest, zero = 2 * reach / top, top / 2
    factors = 1 - 0.8 * torch.arange(n, dtype=torch.float32) / n
    row = row.double()
    best, scale = float("inf"), 0.0
    for i in range(n):
        s = float(widest * factors[i])
        q = ((row / s + zero).round().clamp(0, top) - zero) * s
        error = float((row - q).abs().pow(p).sum())
        if error < best:
            best, scale = error, s
    return best, scale


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "ternary"])
@pytest.mark.parametrize("p", [2.4, 2.0, 1.0])
def test_range_search_equals_the_loop(bits: int, scheme: str, p: float) -> None:
    rows = torch.randn(12, 60, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-4, 2, 12)[:, None]
    found = fit_rows(rows, bits, QuantFormat(scheme=scheme, p=p))
    for c, row in enumerate(rows):
        error, scale = loop_search(row, bits, scheme, p)
        # Errors rather than scales: two candidates may tie. 1e-3 on the scale is the rounding to the stored half
        # precision.
        got = float((decode(encode(rows, found), found)[c].double() - row.double()).abs().pow(p).sum())
        stored = float(
            (loop_decode(row, float(found.scale[c]), float(found.zero[c]), top_of(bits, scheme)) - row.double())
            .abs()
            .pow(p)
            .sum()
        )
        assert got == pytest.approx(stored, rel=1e-4)
        if abs(float(found.scale[c]) / scale - 1) > 1e-3:
            assert got <= error * 1.01


def loop_decode(row: Tensor, scale: float, zero: float, top: int) -> Tensor:
    q = (row.double() / scale + zero).round().clamp(0, top)
    return (q - zero) * scale


def test_search_error_equals_the_loop_to_1e_6_before_the_scale_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpqsearch.quant import rows as module

    monkeypatch.setattr(module, "stored_scale", lambda scale: scale)
    rows = torch.randn(32, 100, generator=torch.Generator().manual_seed(3))
    for scheme in ("asymmetric", "symmetric", "ternary"):
        for bits in (2, 4, 7):
            found = fit_rows(rows, bits, QuantFormat(scheme=scheme))
            for c, row in enumerate(rows):
                got = float(
                    (loop_decode(row, float(found.scale[c]), float(found.zero[c]), top_of(bits, scheme)) - row.double())
                    .abs()
                    .pow(2.4)
                    .sum()
                )
                assert got == pytest.approx(loop_search(row, bits, scheme, 2.4)[0], rel=1e-6)


def test_mixed_widths_equal_every_width_alone() -> None:
    rows = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    widths = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8] * 5, dtype=torch.uint8)
    for scheme in SCHEMES:
        fmt = QuantFormat(scheme=scheme)
        mixed = decode(encode(rows, fit_rows(rows, widths, fmt)), fit_rows(rows, widths, fmt))
        for bits in range(1, 9):
            alone = fit_rows(rows, bits, fmt)
            mask = widths == bits
            difference = (decode(encode(rows, alone), alone)[mask] - mixed[mask]).abs().max()
            # The shared exponent of a layer depends on its largest scale; that moves no mantissa unless a scale is
            # subnormal.
            assert float(difference) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from(SCHEMES),
    st.integers(0, 2**31 - 1),
    st.floats(1e-6, 1e4),
    st.integers(1, 40),
)
def test_codes_are_in_range_and_errors_are_bounded(
    bits: int, scheme: str, seed: int, scale: float, fan_in: int
) -> None:
    rows = torch.randn(5, fan_in, generator=torch.Generator().manual_seed(seed)) * scale
    q = fit_rows(rows, bits, QuantFormat(scheme=scheme, n_candidates=20))
    codes = encode(rows, q)
    assert int(codes.max()) <= top_of(bits, scheme)
    levels = decode(codes, q)
    assert bool(torch.isfinite(levels).all())
    # Decoding is deterministic and encoding what was decoded changes nothing: codes and weights are one and the same
    # thing.
    assert torch.equal(encode(levels, q), codes)
    assert float((levels - rows).abs().max()) <= 2.01 * float(rows.abs().max()) + 1e-30


def test_auto_is_never_worse_than_either_scheme() -> None:
    rows = torch.cat([torch.randn(50, 64), torch.rand(50, 64), torch.randn(50, 64).abs()])
    for bits in (1, 2, 3, 4):
        errors = {}
        for scheme in ("asymmetric", "symmetric", "auto"):
            q = fit_rows(rows, bits, QuantFormat(scheme=scheme))
            errors[scheme] = (decode(encode(rows, q), q) - rows).square().sum(1)
        assert bool((errors["auto"] <= torch.minimum(errors["asymmetric"], errors["symmetric"]) * (1 + 1e-3)).all())


def test_balanced_scheme_wins_at_one_bit_on_gaussian_rows() -> None:
    rows = torch.randn(64, 1728, generator=torch.Generator().manual_seed(0))
    error = {}
    for scheme in ("asymmetric", "symmetric"):
        q = fit_rows(rows, 1, QuantFormat(scheme=scheme, p=2.0))
        error[scheme] = float((decode(encode(rows, q), q) - rows).square().mean())
    # Optimal scales give 0.363 and 0.594 of the variance on a Gaussian source (reference: mpq-dm.md, section 1.5).
    assert error["symmetric"] == pytest.approx(0.363, abs=0.01)
    assert error["asymmetric"] == pytest.approx(0.60, abs=0.015)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dead_rows_stay_zero_and_bad_rows_are_named(scheme: str) -> None:
    rows = torch.randn(3, 8)
    rows[1] = 0
    q = fit_rows(rows, 2, QuantFormat(scheme=scheme))
    assert float(decode(encode(rows, q), q)[1].abs().max()) == 0.0
    rows[2, 3] = float("nan")
    with pytest.raises(NumericsError, match="row 2"):
        fit_rows(rows, 2, QuantFormat(scheme=scheme))


def test_scales_are_what_half_precision_stores() -> None:
    rows = torch.randn(16, 30) * torch.logspace(-7, 3, 16)[:, None]
    q = fit_rows(rows, 4, QuantFormat())
    exponent = 2.0 ** (np.floor(np.log2(float(q.scale.max()))) - 15)
    assert torch.equal((q.scale / exponent).half().float() * exponent, q.scale)


@pytest.mark.parametrize(
    "layer",
    [
        LayerSpec(name="l", kind="Linear", weight_shape=(6, 4)),
        LayerSpec(name="c", kind="Conv2d", weight_shape=(6, 2, 3, 3), groups=2),
        LayerSpec(name="t", kind="ConvTranspose2d", weight_shape=(6, 4, 3, 2), channel_axis=1, groups=3),
    ],
)
def test_rows_and_weights_are_inverse(layer: LayerSpec) -> None:
    weight = torch.randn(layer.weight_shape)
    rows = rows_of(weight, layer)
    assert rows.shape == (layer.n_channels, layer.weights_per_channel)
    assert torch.equal(weight_of(rows, layer), weight)


def test_three_levels_reach_the_least_error_of_a_long_tailed_row() -> None:
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(16, 2000, generator=generator)
    tails = gauss / (torch.rand(16, 2000, generator=generator) + 0.02)  # largest weight: 30 root mean squares
    error = {}
    for name, rows in {"gauss": gauss, "tails": tails}.items():
        q = fit_rows(rows, 2, QuantFormat(scheme="ternary", p=2.0))
        found = (decode(encode(rows, q), q) - rows).square().sum(1)
        levels = [best_level(row) for row in rows]
        least = torch.stack(
            [(row - loop_decode(row, a, 1.0, 2)).square().sum() for row, a in zip(rows, levels, strict=True)]
        )
        assert float((found / least).max()) < 1.001
        error[name] = float(found.sum() / rows.square().sum())
    # The three-level Lloyd-Max quantizer of a Gaussian source loses 0.1902 of the variance (Max 1960, table I).
    assert error["gauss"] == pytest.approx(0.1902, abs=0.003)


@pytest.mark.parametrize("scheme", ["asymmetric", "auto", "ternary"])
def test_a_group_of_inputs_is_quantized_as_a_row_of_its_own(scheme: str) -> None:
    rows = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 96)
    bits = torch.tensor([1, 2, 3, 4, 5, 8], dtype=torch.uint8)
    fmt = QuantFormat(scheme=scheme, group=32)
    grouped, parts = fit_rows(rows, bits, fmt), rows.reshape(18, 32)
    alone = fit_rows(parts, bits.repeat_interleave(3), replace(fmt, group=0))
    assert grouped.groups == 3
    assert torch.equal(decode(encode(rows, grouped), grouped).reshape(18, 32), decode(encode(parts, alone), alone))
    assert torch.equal(encode(rows[2:4], grouped.of(slice(2, 4))), encode(rows, grouped)[2:4])
    table = weight_error_tables(rows, [2, 3], [scheme], fmt)[scheme]
    for column, width in enumerate((2, 3)):
        q = fit_rows(rows, width, fmt)
        assert torch.allclose(table[:, column], (decode(encode(rows, q), q) - rows).square().sum(1), rtol=1e-3)


def test_groups_divide_the_fan_in() -> None:
    fmt = QuantFormat(group=64)
    assert [fmt.group_of(n) for n in (27, 64, 72, 96, 128, 288, 1153)] == [27, 64, 36, 48, 64, 48, 1153]
    assert QuantFormat().group_of(288) == 288
    with pytest.raises(ConfigError, match="share a scale"):
        QuantFormat(group=48)
