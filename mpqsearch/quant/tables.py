"""Kurtosis and error tables: what every row loses at every width, from the weights and the second moment of the layer's
input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable, QuantFormat
from mpqsearch.quant.rows import (
    RowMoments,
    RowQuantizer,
    decode,
    encode,
    fit_grid,
    fit_rows,
    row_moments,
    rows_of,
    top_code,
)
from mpqsearch.quant.search import square_errors
from mpqsearch.quant.smoothing import stored_factors

EVERY = slice(None)
"""All rows of a layer."""

COPIES = 8
"""Copies of a row that are in memory while its error is made: as it is scaled, its codes, what they decode to, and
temporaries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """Input statistics of one layer over the calibration set, for each of its ``G`` groups.

    ``second_moment`` ``[G, D, D]`` is ``E[x x']`` of the unfolded input, ``mean`` ``[G, D]`` its mean, ``input_max``
    ``[inputs]`` the largest magnitude of each input channel.
    """

    second_moment: Tensor
    mean: Tensor
    input_max: Tensor
    n_positions: int


def kurtosis(rows: Tensor) -> Tensor:
    """Fourth standardised moment of each row (Gaussian: 3), 0 for a constant row; see `row_moments`."""
    return row_moments(rows).kurtosis


def weight_error_tables(
    rows: Tensor, widths: Sequence[int], schemes: Sequence[str], fmt: QuantFormat, moments: RowMoments | None = None
) -> dict[str, Tensor]:
    """``sum (w_q - w)**2`` float32 ``[C, W]`` of every row ``[C, D]`` at every width, for each scheme, in fused passes.

    The numbers are those of `error_tables` over `width_errors`, without the ``[W, C, D]`` weight errors. ``auto`` is
    the lesser of the other two, row by row, as `fit_rows` chooses.
    """
    needed = {"asymmetric": {"asymmetric", "auto"}, "symmetric": {"symmetric", "auto"}}
    moments = moments or row_moments(rows)
    errors = {}
    for scheme, asked in needed.items():
        if asked & set(schemes):
            q = fit_grid(rows, widths, scheme, fmt, moments)
            errors[scheme] = square_errors(rows, q.scale, q.zero, top_code(q.bits))
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


class RecomputedErrors(Mapping[str, Tensor]):
    """Layer -> weight errors ``[W, C, D]`` that are made again at every look, so that no more than those of some rows
    are in memory.

    ``make`` is called with the name of a layer and a slice of its rows, ``blocks`` says in which slices `error_blocks`
    goes through a layer. The numbers are those of the errors that it stands for; `width_quantizers` keeps what the
    range search found, so that it is not done again.
    """

    def __init__(
        self, names: Sequence[str], make: Callable[[str, slice], Tensor], blocks: Callable[[str], Sequence[slice]]
    ) -> None:
        self._names, self._make, self.blocks = tuple(names), make, blocks

    def __getitem__(self, name: str) -> Tensor:
        """The errors of one layer, all rows at once; `KeyError` for a layer that is not among them."""
        return torch.cat([self.part(name, rows) for rows in self.blocks(name)], 1)

    def part(self, name: str, rows: slice) -> Tensor:
        """The errors ``[W, c, D]`` of some rows of a layer; `KeyError` for a layer that is not among them."""
        if name not in self._names:
            raise KeyError(name)
        return self._make(name, rows)

    def __contains__(self, name: object) -> bool:
        """Whether the layer is among them; nothing is made."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def error_part(errors: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
    """Errors ``[W, c, D]`` of some rows of a layer, held or made again."""
    return errors.part(name, rows) if isinstance(errors, RecomputedErrors) else errors[name][:, rows]


def error_rows(errors: Mapping[str, Tensor], layer: LayerSpec) -> Sequence[slice]:
    """The slices of rows in which the errors of a layer are to be looked at: one, when they are held."""
    return errors.blocks(layer.name) if isinstance(errors, RecomputedErrors) else [slice(0, layer.n_channels)]


def row_blocks(layer: LayerSpec, n_candidates: int, room: int | None) -> list[slice]:
    """Slices of a layer's rows whose errors under ``n_candidates`` quantizers, with what making them takes, fit
    ``room`` bytes; or single rows.

    A slice is of whole groups, or lies inside one. One slice without a limit.
    """
    if room is None:
        return [slice(0, layer.n_channels)]
    return slices_of(layer, room // row_bytes(layer, n_candidates))


def slices_of(layer: LayerSpec, size: int) -> list[slice]:
    """All rows of a layer in slices of at most ``size`` of them (at least one), each of whole groups or inside one."""
    size, group = max(1, size), layer.n_channels // layer.groups
    if size >= group:
        step = size // group * group
        return [slice(i, min(i + step, layer.n_channels)) for i in range(0, layer.n_channels, step)]
    return [
        slice(g + i, g + min(i + size, group)) for g in range(0, layer.n_channels, group) for i in range(0, group, size)
    ]


def row_bytes(layer: LayerSpec, n_candidates: int) -> int:
    """What the errors of one row take: those of all candidates, and a handful of copies of the row while they are
    made."""
    return 4 * layer.weights_per_channel * (n_candidates + COPIES)


def width_quantizers(
    weight: Tensor,
    layer: LayerSpec,
    widths: tuple[int, ...],
    fmt: QuantFormat,
    stats: RowStatistics | None = None,
    part: slice = EVERY,
) -> tuple[tuple[RowQuantizer, ...], Tensor]:
    """The quantizer of every row at every width, one a width, and the errors of `width_errors` that they make."""
    errors, quantizers = zip(*(_searched(weight, layer, bits, fmt, stats, part) for bits in widths), strict=True)
    return quantizers, torch.stack(errors)


def joined_quantizers(parts: Sequence[tuple[RowQuantizer, ...]]) -> tuple[RowQuantizer, ...]:
    """The quantizers of all rows, one a width, from those of consecutive slices."""
    return tuple(
        RowQuantizer(
            scale=torch.cat([q.scale for q in same]),
            zero=torch.cat([q.zero for q in same]),
            bits=torch.cat([q.bits for q in same]),
        )
        for same in zip(*parts, strict=True)
    )


def errors_again(
    weight: Tensor,
    layer: LayerSpec,
    quantizers: Sequence[RowQuantizer],
    fmt: QuantFormat,
    stats: RowStatistics | None = None,
    part: slice = EVERY,
) -> Tensor:
    """The errors ``[W, C, D]`` of quantizers that `width_quantizers` found, bit for bit; or those of the rows of
    ``part`` alone."""
    scaled, factor = _scaled(weight, layer, fmt, stats, part)
    mine = (RowQuantizer(scale=q.scale[part], zero=q.zero[part], bits=q.bits[part]) for q in quantizers)
    return torch.stack([_error(scaled, factor, q) for q in mine])


def held_bytes(table: LayerTable, n_candidates: int) -> int:
    """What the weight errors of ``n_candidates`` quantizers take in float32 when those of all layers are held."""
    return 4 * n_candidates * table.n_weights


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
