"""The compiled, coarse-to-fine range search against the exhaustive search in torch over the same 80 candidates."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, QuantFormat
from mpqsearch.errors import NumericsError
from mpqsearch.models import discover
from mpqsearch.quant import fit_rows, rows_of, search, width_errors
from mpqsearch.quant.rows import RowSummary, _fit, fit_grid, row_summary
from mpqsearch.quant.search import SHORT_ROW, best_factors, exhaustive_search, square_errors
from mpqsearch.quant.tables import error_tables, kurtosis, weight_error_tables
from mpqsearch.sampling import load_model

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.fixture(params=["torch", "numba"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers of any size go through one of the two."""
    monkeypatch.setattr(search, "COMPILED_WEIGHTS", 1 if request.param == "numba" else 1 << 40)
    return str(request.param)


@cache
def sources() -> dict[str, Tensor]:
    """Rows of several distributions, and rows of the embedded U-Net: of each length, some."""
    g = np.random.default_rng(0)
    made = {
        "gaussian, short": g.standard_normal((100, 80)),
        "gaussian": g.standard_normal((20, 1440)),
        "laplace": g.laplace(size=(60, 320)),
        "student-t": g.standard_t(3, size=(24, 1280)),
        "one-sided": g.random((40, 576)) - 0.2,
    }
    out = {k: torch.from_numpy(v.astype(np.float32)) for k, v in made.items()}
    denoiser = load_model("fmnist-unet")
    modules = dict(denoiser.module.named_modules())
    rows = [rows_of(modules[la.name].weight, la) for la in discover(denoiser)]
    for fan_in in sorted({r.shape[1] for r in rows if r.shape[1] > SHORT_ROW}):
        alike = torch.cat([r for r in rows if r.shape[1] == fan_in])
        out[f"trained, {fan_in} weights"] = alike[:: len(alike) // 20 + 1].contiguous()
    return out


@cache
def oracle(name: str, scheme: str, p: float) -> Tensor:
    """The factors of the exhaustive search in torch."""
    factors = 1 - 0.8 * torch.arange(80, dtype=torch.float32) / 80
    return factors[exhaustive_search(sources()[name], *unshrunk(sources()[name], scheme), factors, p)]


def unshrunk(rows: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the search starts from: the full range of every row at every width."""
    q = fit_grid(rows, WIDTHS, scheme, QuantFormat(criterion="minmax"))
    top = (torch.exp2(q.bits.float()) - 1).contiguous()
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if scheme == "asymmetric":
        return (high.clamp_min(0) - low.clamp_max(0)) / top, q.zero, top
    reach = rows.abs().amax(1, keepdim=True).expand_as(top)
    rms = rows.square().mean(1, keepdim=True).sqrt()
    return 2 * torch.where(top == 1, reach.minimum(2.5 * rms), reach) / top, q.zero.contiguous(), top


def exact_errors(rows: Tensor, scale: Tensor, zero: Tensor, top: Tensor, p: float) -> Tensor:
    """``[C, K]`` in float64, written out."""
    out = []
    for k in range(scale.shape[1]):
        s, z, t = (x[:, k, None].double() for x in (scale, zero, top))
        units = rows.double() / s + z
        out.append(((units - units.round().clamp_min(0).minimum(t)).abs().pow(p) * s.pow(p)).sum(1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("p", [2.4, 2.0])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_the_compiled_search_chooses_as_the_exhaustive_one(scheme: str, p: float) -> None:
    regrets = []
    for name, rows in sources().items():
        widest, zero, top = unshrunk(rows, scheme)
        expected, found = oracle(name, scheme, p), best_factors(rows, widest, zero, top, 80, p)
        best = exact_errors(rows, widest * expected, zero, top, p)
        got = exact_errors(rows, widest * found, zero, top, p)
        regrets.append(torch.where(found == expected, 0.0, got / best - 1).flatten())
    regret = torch.cat(regrets)
    assert len(regret) > 2500
    # Another candidate counts as the same choice when its error is within 0.1 %; float32 may swap candidates that
    # differ by 1e-5.
    assert float((regret > 1e-3).double().mean()) < 1e-3
    assert float(regret.max()) < 0.02
    assert float(regret.min()) > -1e-4


@pytest.mark.parametrize("p", [2.4, 2.0, 1.0, 3.3])
def test_every_candidate_tried_gives_the_exact_best(backend: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHORT_ROW", 1 << 20)
    for rows in list(sources().values())[::2]:
        widest, zero, top = unshrunk(rows, "asymmetric")
        found = best_factors(rows, widest, zero, top, 20, p)
        got = exact_errors(rows, widest * found, zero, top, p)
        every = torch.stack([exact_errors(rows, widest * (1 - 0.8 * i / 20), zero, top, p) for i in range(20)])
        # The polynomials of the kernel are good to 2e-5 a weight and better in a sum; float32 sums of torch likewise.
        assert float((got / every.amin(0) - 1).abs().max()) < 3e-5


def test_short_rows_and_few_candidates_are_searched_whole(backend: str) -> None:
    rows = torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    widest, zero, top = unshrunk(rows, "asymmetric")
    for n in (1, 2, 7, 80):
        factors = 1 - 0.8 * torch.arange(n, dtype=torch.float32) / n
        best = exact_errors(
            rows, widest * factors[exhaustive_search(rows, widest, zero, top, factors, 2.4)], zero, top, 2.4
        )
        found = exact_errors(rows, widest * best_factors(rows, widest, zero, top, n, 2.4), zero, top, 2.4)
        torch.testing.assert_close(found, best, rtol=3e-5, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_grid_is_what_every_width_gives_alone(backend: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(search, "BLOCK", 1 << 14)
    rows = torch.randn(100, 1000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 1, 100)[:, None]
    fmt = QuantFormat(p=2.0)
    for scheme in ("asymmetric", "symmetric"):
        grid = fit_grid(rows, (2, 5), scheme, fmt)
        for j, bits in enumerate((2, 5)):
            alone = fit_rows(rows, bits, QuantFormat(p=2.0, scheme=scheme))
            assert torch.equal(grid.scale[:, j], alone.scale)
            assert torch.equal(grid.zero[:, j], alone.zero)


def test_fused_tables_equal_the_weight_errors(backend: str) -> None:
    layer = LayerSpec(name="l", kind="Linear", weight_shape=(30, 900))
    weight = torch.randn(30, 900, generator=torch.Generator().manual_seed(2))
    weight[7] = 0
    fused = weight_error_tables(weight, WIDTHS, ("asymmetric", "symmetric", "auto"), QuantFormat())
    for scheme, table in fused.items():
        errors = width_errors(weight, layer, WIDTHS, QuantFormat(scheme=scheme), None)
        expected = error_tables(errors, None)["weight_error"]
        torch.testing.assert_close(table, expected, rtol=1e-5, atol=0)  # float32 sums in another order
    assert bool((fused["auto"] <= torch.minimum(fused["asymmetric"], fused["symmetric"])).all())
    assert float(fused["asymmetric"][7].abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_those_of_numpy(backend: str, dtype: torch.dtype) -> None:
    g = np.random.default_rng(3)
    rows = torch.from_numpy(g.standard_t(5, size=(200, 1500)) * np.logspace(-3, 2, 200)[:, None] + 0.01).to(dtype)
    rows[3] = 0.5
    found = row_summary(rows)
    exact = rows.double().numpy()
    np.testing.assert_array_equal(found.low, exact.min(1).astype(np.float32))
    np.testing.assert_array_equal(found.high, exact.max(1).astype(np.float32))
    np.testing.assert_allclose(found.rms, np.sqrt((exact**2).mean(1)), rtol=1e-5)
    centred = exact - exact.mean(1, keepdims=True)
    expected = (centred**4).mean(1) / np.maximum(exact.var(1, ddof=1), 1e-60) ** 2  # the constant row: 0 / 1e-120
    np.testing.assert_allclose(found.kurtosis, expected, rtol=1e-4)
    assert torch.equal(kurtosis(rows), found.kurtosis)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_named(backend: str, bad: float) -> None:
    rows = torch.ones(100, 1100)
    rows[31, 1050] = bad
    with pytest.raises(NumericsError, match="row 31"):
        row_summary(rows)


def test_tiny_and_dead_rows_do_not_overflow(backend: str) -> None:
    rows = torch.randn(5, 4000, generator=torch.Generator().manual_seed(4))
    rows[1] *= 1e-37
    rows[2] = 0
    rows[3] *= 1e30
    for scheme in ("asymmetric", "symmetric"):
        q = fit_grid(rows, WIDTHS, scheme, QuantFormat())
        assert bool(torch.isfinite(q.scale).all())
        assert bool((q.scale > 0).all())


def test_square_errors_are_those_of_the_codes(backend: str) -> None:
    rows = torch.randn(64, 2000, generator=torch.Generator().manual_seed(5))
    q = fit_grid(rows, WIDTHS, "asymmetric", QuantFormat(criterion="minmax"))
    top = torch.exp2(q.bits.float()) - 1
    found = square_errors(rows, q.scale, q.zero, top)
    torch.testing.assert_close(found.double(), exact_errors(rows, q.scale, q.zero, top, 2.0), rtol=1e-5, atol=0)


def test_numba_is_loaded_by_the_first_layer_that_needs_it() -> None:
    code = (
        "import sys, torch; from mpqsearch.core import QuantFormat; from mpqsearch.quant import fit_rows; "
        "fit_rows(torch.randn(4, 50), 3, QuantFormat()); assert 'numba' not in sys.modules; "
        "fit_rows(torch.randn(100, 100), 3, QuantFormat()); assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_moments_given_are_moments_used() -> None:
    rows = torch.randn(10, 50)
    wide = RowSummary(
        low=torch.full((10,), -9.0), high=torch.full((10,), 9.0), rms=torch.ones(10), kurtosis=torch.ones(10)
    )
    q = _fit(rows, torch.full((10,), 4, dtype=torch.uint8), QuantFormat(criterion="minmax"), "asymmetric", wide)
    torch.testing.assert_close(q.scale, torch.full((10,), 18 / 15), rtol=1e-3, atol=0)
