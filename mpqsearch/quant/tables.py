"""Kurtosis and error tables: what every row loses at every width, from the weights and the second moment of the layer's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, QuantFormat
from mpqsearch.quant.rows import RowMoments, decode, encode, fit_grid, fit_rows, row_moments, rows_of
from mpqsearch.quant.search import square_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """Input statistics of one layer over the calibration set, for each of its ``G`` groups.

    ``second_moment`` ``[G, D, D]`` is ``E[x x']`` of the unfolded input, ``mean`` ``[G, D]`` its mean, ``input_max`` ``[inputs]``
    the largest magnitude of each input channel.
    """

    second_moment: Tensor
    mean: Tensor
    input_max: Tensor
    n_positions: int


def kurtosis(rows: Tensor) -> Tensor:
    """Fourth standardised moment of each row (Gaussian: 3), 0 for a constant row; see `row_moments`."""
    return row_moments(rows).kurtosis


def weight_error_tables(
    rows: Tensor, widths: Sequence[int], codebooks: Sequence[str], fmt: QuantFormat, moments: RowMoments | None = None
) -> dict[str, Tensor]:
    """``sum (w_q - w)**2`` float32 ``[C, W]`` of every row ``[C, D]`` at every width, for each codebook, in fused passes.

    The numbers are those of `error_tables` over `width_errors`, without the ``[W, C, D]`` weight errors. ``auto`` is the lesser of the
    other two, row by row, as `fit_rows` chooses.
    """
    needed = {"affine": {"affine", "auto"}, "midrise": {"midrise", "auto"}}
    found = moments or row_moments(rows)
    errors = {}
    for codebook, asked in needed.items():
        if asked & set(codebooks):
            q = fit_grid(rows, widths, codebook, fmt, found)
            errors[codebook] = square_errors(rows, q.scale, q.zero, torch.exp2(q.bits.float()) - 1)
    if "auto" in codebooks:
        errors["auto"] = torch.minimum(errors["affine"], errors["midrise"])
    return {codebook: errors[codebook] for codebook in codebooks}


def prescale_factors(rows: Tensor, input_max: Tensor, layer: LayerSpec, strength: float = 0.5) -> Tensor:
    """Factor of every column ``[G, D]``: ``max|x|**a / max|w|**(1 - a)`` of its input channel (SmoothQuant at strength ``a``; MPQ-DM: 0.5).

    Dead channels (no input, or no weight) get 1, where the released code of MPQ-DM divides by zero.
    """
    groups = layer.groups
    per_input = layer.weights_per_channel // (layer.n_inputs // groups)
    by_input = rows.abs().reshape(groups, len(rows) // groups, -1, per_input).amax((1, 3))  # [G, inputs of a group]
    x = input_max.to(by_input).reshape(groups, -1)
    alive = (by_input > 1e-12) & (x > 1e-12)
    x, w = torch.where(alive, x, 1.0), torch.where(alive, by_input, 1.0)
    factor = (x / w).sqrt() if strength == 0.5 else x.pow(strength) / w.pow(1 - strength)
    return factor.repeat_interleave(per_input, dim=1)


def stored_factors(rows: Tensor, input_max: Tensor, layer: LayerSpec, strength: float = 0.5) -> Tensor:
    """`prescale_factors` ``[G, D]`` as they are stored: half precision."""
    return prescale_factors(rows, input_max, layer, strength).half().float().clamp(2.0**-14, 2.0**14)


def error_tables(errors: Tensor, stats: RowStatistics | None) -> dict[str, Tensor]:
    """Errors ``[C, W]`` of every row at every width, from the weight errors ``[W, C, D]`` of `width_errors`.

    ``weight_error``: ``sum (w - w_q)**2``. With ``stats`` also ``output_error`` = ``e' H e``, the exact mean squared error of
    that output channel over the calibration set, and ``output_error_centred`` = ``e' (H - m m') e``, what is left of it once
    the mean shift is folded into the bias. Rows are independent given the input, so the layer's error is the sum over rows.
    """
    tables = {"weight_error": errors.square().sum(2).T}
    if stats is not None:
        through = [_through(error, stats) for error in errors]
        tables["output_error"] = torch.stack([full for full, _ in through], 1)
        tables["output_error_centred"] = torch.stack([(full - shift.square()).clamp_min(0) for full, shift in through], 1)
    return tables


def width_errors(
    weight: Tensor, layer: LayerSpec, widths: tuple[int, ...], fmt: QuantFormat, stats: RowStatistics | None
) -> Tensor:
    """``w_q - w`` as rows at every width: ``[W, C, D]``, made with the quantizer that is deployed."""
    return torch.stack([row_errors(weight, layer, bits, fmt, stats) for bits in widths])


def row_errors(weight: Tensor, layer: LayerSpec, bits: Tensor | int, fmt: QuantFormat, stats: RowStatistics | None) -> Tensor:
    """``w_q - w`` as rows ``[C, D]`` in the units of the weight."""
    rows = rows_of(weight.detach().float(), layer)
    factor = column_factors(rows, layer, fmt, stats)
    scaled = rows if factor is None else rows * factor
    quantizer = fit_rows(scaled, bits, fmt)
    error = decode(encode(scaled, quantizer), quantizer) - scaled
    return error if factor is None else error / factor


def column_factors(rows: Tensor, layer: LayerSpec, fmt: QuantFormat, stats: RowStatistics | None) -> Tensor | None:
    """Pre-scaling factors ``[C, D]`` of a format, rounded as stored; None when the format has none or inputs are unknown."""
    if not fmt.prescale or stats is None:
        return None
    factor = stored_factors(rows, stats.input_max, layer, fmt.strength)
    return factor.repeat_interleave(len(rows) // layer.groups, dim=0)


def _through(error: Tensor, stats: RowStatistics) -> tuple[Tensor, Tensor]:
    """``e' H e`` and ``e' m`` of every row ``[C]``."""
    groups = stats.second_moment.shape[0]
    grouped = error.reshape(groups, len(error) // groups, -1)
    moment = stats.second_moment.to(grouped.dtype)
    full = torch.bmm(grouped, moment).mul_(grouped).sum(2).flatten().clamp_min(0)
    shift = torch.bmm(grouped, stats.mean.to(grouped.dtype)[:, :, None]).flatten()
    return full, shift
