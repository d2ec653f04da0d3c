"""Kurtosis and error tables: what every row loses at every width, from the weights and the second moment of the layer's
input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, QuantFormat
from mpqsearch.quant.rows import (
    RowQuantizer,
    RowSummary,
    decode,
    encode,
    fit_grid,
    fit_rows,
    row_summary,
    rows_of,
)
from mpqsearch.quant.search import square_errors
from mpqsearch.quant.smoothing import stored_factors
from mpqsearch.quant.statistics import RowStatistics

EVERY = slice(None)
"""All rows of a layer."""


def kurtosis(rows: Tensor) -> Tensor:
    """Fourth standardised moment of each row (Gaussian: 3), 0 for a constant row; see `row_summary`."""
    return row_summary(rows).kurtosis


def weight_error_tables(
    rows: Tensor, widths: Sequence[int], schemes: Sequence[str], fmt: QuantFormat, summary: RowSummary | None = None
) -> dict[str, Tensor]:
    """``sum (w_q - w)**2`` float32 ``[C, W]`` of every row ``[C, D]`` at every width, for each scheme, in fused passes.

    The numbers are those of `error_tables` over `width_errors`, without the ``[W, C, D]`` weight errors. ``auto`` is
    the lesser of the asymmetric and the symmetric one, row by row, as `fit_rows` chooses.
    """
    needed = {"asymmetric": {"asymmetric", "auto"}, "symmetric": {"symmetric", "auto"}, "ternary": {"ternary"}}
    groups = fmt.scales_of(rows.shape[1])
    if groups > 1:
        parts = rows.reshape(-1, rows.shape[1] // groups)
        tables = weight_error_tables(parts, widths, schemes, replace(fmt, group=0))
        return {scheme: errors.reshape(len(rows), groups, -1).sum(1) for scheme, errors in tables.items()}
    summary = summary or row_summary(rows)
    errors = {}
    for scheme, asked in needed.items():
        if asked & set(schemes):
            q = fit_grid(rows, widths, scheme, fmt, summary)
            errors[scheme] = square_errors(rows, q.scale, q.zero, q.top)
    if "auto" in schemes:
        errors["auto"] = torch.minimum(errors["asymmetric"], errors["symmetric"])
    return {scheme: errors[scheme] for scheme in schemes}


def error_tables(errors: Tensor, stats: RowStatistics | None) -> dict[str, Tensor]:
    """Errors ``[C, W]`` of every row at every width, from the weight errors ``[W, C, D]`` of `width_errors`.

    ``weight_error``: ``sum (w - w_q)**2``. With ``stats`` also ``output_error`` = ``e' H e``, the exact mean squared
    error of that output channel over the calibration set, and ``output_error_corrected`` = ``e' (H - m m') e``, what is
    left of it once the mean shift is folded into the bias. Rows are independent given the input, so the layer's error
    is the sum over rows.
    """
    tables = {"weight_error": errors.square().sum(2).T}
    if stats is not None:
        through = [_through(error, stats) for error in errors]
        tables["output_error"] = torch.stack([full for full, _ in through], 1)
        tables["output_error_corrected"] = torch.stack(
            [(full - shift.square()).clamp_min(0) for full, shift in through], 1
        )
    return tables


def width_errors(
    weight: Tensor,
    layer: LayerSpec,
    widths: tuple[int, ...],
    fmt: QuantFormat,
    stats: RowStatistics | None,
    part: slice = EVERY,
) -> Tensor:
    """``w_q - w`` as rows at every width: ``[W, C, D]``, or of the rows of ``part`` alone, made with the quantizer that
    is deployed."""
    return torch.stack([_searched(weight, layer, bits, fmt, stats, part)[0] for bits in widths])


def row_errors(
    weight: Tensor, layer: LayerSpec, bits: Tensor | int, fmt: QuantFormat, stats: RowStatistics | None
) -> Tensor:
    """``w_q - w`` as rows ``[C, D]`` in the units of the weight."""
    return _searched(weight, layer, bits, fmt, stats)[0]


def width_quantizers(
    weight: Tensor,
    layer: LayerSpec,
    widths: tuple[int, ...],
    fmt: QuantFormat,
    part: slice = EVERY,
) -> tuple[tuple[RowQuantizer, ...], Tensor]:
    """The quantizer of every row at every width, one a width, and the errors of `width_errors` that they make; for
    formats without smoothing."""
    errors, quantizers = zip(*(_searched(weight, layer, bits, fmt, None, part) for bits in widths), strict=True)
    return quantizers, torch.stack(errors)


def errors_again(
    weight: Tensor,
    layer: LayerSpec,
    quantizers: Sequence[RowQuantizer],
    fmt: QuantFormat,
    part: slice = EVERY,
) -> Tensor:
    """The errors ``[W, C, D]`` of quantizers that `width_quantizers` found, bit for bit; or those of the rows of
    ``part`` alone."""
    scaled, factor = _scaled(weight, layer, fmt, None, part)
    return torch.stack([_error(scaled, factor, q.of(part)) for q in quantizers])


def _searched(
    weight: Tensor,
    layer: LayerSpec,
    bits: Tensor | int,
    fmt: QuantFormat,
    stats: RowStatistics | None,
    part: slice = EVERY,
) -> tuple[Tensor, RowQuantizer]:
    scaled, factor = _scaled(weight, layer, fmt, stats, part)
    quantizer = fit_rows(scaled, bits, fmt)
    return _error(scaled, factor, quantizer), quantizer


def _scaled(
    weight: Tensor, layer: LayerSpec, fmt: QuantFormat, stats: RowStatistics | None, part: slice
) -> tuple[Tensor, Tensor | None]:
    """Rows of ``part`` in float32 as they are quantized, and their factors, which depend on all rows."""
    rows = rows_of(weight.detach(), layer)
    factor = column_factors(rows, layer, fmt, stats, part)
    some = rows[part].float()
    return some if factor is None else some * factor, factor


def _error(scaled: Tensor, factor: Tensor | None, quantizer: RowQuantizer) -> Tensor:
    error = decode(encode(scaled, quantizer), quantizer) - scaled
    return error if factor is None else error / factor


def column_factors(
    rows: Tensor, layer: LayerSpec, fmt: QuantFormat, stats: RowStatistics | None, part: slice = EVERY
) -> Tensor | None:
    """Smoothing factors ``[C, D]`` of a format, or those of the rows of ``part``, rounded as stored.

    ``rows`` are all rows: a factor goes by the largest weight of its column. None when the format has none or inputs
    are unknown.
    """
    if not fmt.smooth or stats is None:
        return None
    factor = stored_factors(rows, stats.input_max, layer, fmt.alpha)
    groups = torch.arange(len(rows), device=factor.device)[part] // (len(rows) // layer.groups)
    return factor[groups]


def _through(error: Tensor, stats: RowStatistics) -> tuple[Tensor, Tensor]:
    """``e' H e`` and ``e' m`` of every row ``[C]``."""
    groups = stats.second_moment.shape[0]
    grouped = error.reshape(groups, len(error) // groups, -1)
    moment = stats.second_moment.to(grouped)
    full = torch.bmm(grouped, moment).mul_(grouped).sum(2).flatten().clamp_min(0)
    shift = torch.bmm(grouped, stats.mean.to(grouped)[:, :, None]).flatten()
    return full, shift
