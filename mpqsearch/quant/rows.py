"""Quantization of rows: one output channel a row, a width for every row, all rows in one vectorised pass.

All schemes share one formula, ``w ~ scale * (code - zero)`` with ``code`` in ``[0, 2**bits - 1]``: ``zero`` is an
integer in the asymmetric scheme (MPQ-DM, section 3.1) and ``(2**bits - 1) / 2`` in the symmetric one. The ternary one
is the symmetric one but at 2 bits, where codes are 0, 1 and 2, and ``zero`` is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, QuantFormat
from mpqsearch.core.formats import TERNARY_WIDTH
from mpqsearch.errors import NumericsError
from mpqsearch.quant.search import best_factors, blocks, square_errors

ONE_BIT_RANGE = 2.5
"""Start of the range search of the one-bit symmetric scheme in root mean squares: the optimum is near 0.8 of them."""

TERNARY_RANGE = 2.5
"""Start of the range search of three levels in units of the level of least squares (`ternary_level`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowQuantizer:
    """Scale, zero and width of every row: float32 ``[C]``, float32 ``[C]``, uint8 ``[C]``.

    With groups of inputs a row has n scales and zeros, ``[C n]``, those of a row one after the other, and one width.
    ``ternary``: 2 bits stand for three levels.
    """

    scale: Tensor
    zero: Tensor
    bits: Tensor
    ternary: bool = False

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return len(self.scale) // max(len(self.bits), 1)

    def of(self, part: slice) -> RowQuantizer:
        """The quantizer of some rows."""
        scale, zero = (x.reshape(len(self.bits), -1)[part].flatten() for x in (self.scale, self.zero))
        return replace(self, scale=scale, zero=zero, bits=self.bits[part])

    @property
    def group_bits(self) -> Tensor:
        """The width of every scale ``[C n]``."""
        return self.bits if self.groups == 1 else self.bits.repeat_interleave(self.groups)

    @property
    def top(self) -> Tensor:
        """The largest code of every scale, float32 ``[C n]``."""
        return top_code(self.group_bits, ternary=self.ternary)

    @property
    def three_levels(self) -> Tensor:
        """Whether the codes of a row are 0, 1 and 2, bool ``[C]``."""
        return (self.bits == TERNARY_WIDTH) & self.ternary


def by_column(values: Tensor, rows: Tensor) -> Tensor:
    """What belongs to the n groups of every row, ``[C n]``, in a shape that broadcasts with ``rows`` ``[C, D]``."""
    if len(values) == len(rows):
        return values[:, None]
    groups = len(values) // len(rows)
    return values.reshape(len(rows), groups).repeat_interleave(rows.shape[1] // groups, dim=1)


def rows_of(weight: Tensor, layer: LayerSpec) -> Tensor:
    """The weight as ``[output channels, fan-in]``; transposed convolutions keep their groups apart."""
    if not layer.kind.startswith("ConvTranspose"):
        return weight.flatten(1)
    g = layer.groups
    c_in, c_out_group = weight.shape[:2]
    grouped = weight.reshape(g, c_in // g, c_out_group, -1).transpose(1, 2)
    return grouped.reshape(g * c_out_group, -1)


def weight_of(rows: Tensor, layer: LayerSpec) -> Tensor:
    """Inverse of `rows_of`."""
    if not layer.kind.startswith("ConvTranspose"):
        return rows.reshape(layer.weight_shape)
    g = layer.groups
    c_in, c_out_group = layer.weight_shape[:2]
    grouped = rows.reshape(g, c_out_group, c_in // g, -1).transpose(1, 2)
    return grouped.reshape(layer.weight_shape)


def fit_rows(rows: Tensor, bits: Tensor | int, fmt: QuantFormat) -> RowQuantizer:
    """Search the range of every row.

    rows
        ``[C, D]``, float32, finite.
    bits
        One width or a width per row, 1..8.

    Every row is tried with the shrink factors ``1 - 0.8 i / n``, ``i < n`` (``fmt.n_candidates``; MPQ-DM's own grid
    runs in steps of 0.01 over 80 candidates, which is this one at ``n = 80``) and keeps the best under
    ``fmt.criterion``. Scales are rounded to what is stored. With groups of inputs each group of a row is searched as a
    row is. Raises `NumericsError` when a row is not finite.
    """
    rows = rows.detach().float()
    widths = torch.as_tensor(bits, dtype=torch.uint8, device=rows.device).expand(rows.shape[0]).clone()
    groups = fmt.scales_of(rows.shape[1])
    if groups > 1:
        parts = fit_rows(rows.reshape(-1, rows.shape[1] // groups), widths.repeat_interleave(groups), _whole(fmt))
        return replace(parts, bits=widths)
    summary = row_summary(rows)
    if fmt.scheme == "auto":
        asymmetric, symmetric = (_fit(rows, widths, fmt, scheme, summary) for scheme in ("asymmetric", "symmetric"))
        scale, zero = (torch.stack([getattr(q, n) for q in (asymmetric, symmetric)], 1) for n in ("scale", "zero"))
        errors = square_errors(rows, scale, zero, top_code(widths)[:, None].expand(-1, 2))
        use = errors[:, 1] < errors[:, 0]
        return RowQuantizer(
            scale=torch.where(use, symmetric.scale, asymmetric.scale),
            zero=torch.where(use, symmetric.zero, asymmetric.zero),
            bits=widths,
        )
    return _fit(rows, widths, fmt, fmt.scheme, summary)


def encode(rows: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Integer codes ``uint8 [C, D]`` of ``rows``."""
    parts = rows.reshape(len(quantizer.scale), -1)
    codes, top = torch.empty(parts.shape, dtype=torch.uint8, device=rows.device), quantizer.top
    for b in blocks(parts):
        units = parts[b].float() / quantizer.scale[b, None] + quantizer.zero[b, None]
        codes[b] = units.round_().clamp_min_(0).minimum(top[b, None])
    return codes.reshape(rows.shape)


def decode(codes: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Weights ``float32 [C, D]`` of integer codes: the very numbers that the fake-quantized forward uses."""
    parts = codes.reshape(len(quantizer.scale), -1).float()
    return ((parts - quantizer.zero[:, None]) * quantizer.scale[:, None]).reshape(codes.shape)


def _whole(fmt: QuantFormat) -> QuantFormat:
    """The format with one scale a row."""
    return replace(fmt, group=0)


def fit_grid(
    rows: Tensor, widths: Sequence[int], scheme: str, fmt: QuantFormat, summary: RowSummary | None = None
) -> RowQuantizer:
    """Search the range of every row at every width in one pass: scale, zero ``[C, W]`` and bits ``[W]``.

    Column ``w`` is what `fit_rows` gives at that width. ``scheme`` is any but ``auto``; the one of ``fmt`` is not
    used.
    """
    bits = torch.tensor(widths, dtype=torch.uint8, device=rows.device)
    return _fit(rows, bits.expand(len(rows), -1), fmt, scheme, summary or row_summary(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSummary:
    """Least, largest and root mean square weight of every row, and its kurtosis (Gaussian: 3); float32 ``[C]`` each."""

    low: Tensor
    high: Tensor
    rms: Tensor
    kurtosis: Tensor


def row_summary(rows: Tensor) -> RowSummary:
    """Summary of rows ``[C, D]`` of any floating type, one cache-sized block at a time.

    Kurtosis is ``mean((w - mean)**4) / std**4`` with the unbiased standard deviation, as the code of MPQ-DM has it, and
    0 for a constant row. Raises `NumericsError` when a row is not finite.
    """
    parts = [_summary(rows[b].float()) for b in blocks(rows)]
    low, high, rms, fourth = (torch.cat(part) for part in zip(*parts, strict=True))
    bad = (~torch.isfinite(rms)).nonzero()
    if len(bad):
        raise NumericsError(f"weight row {int(bad[0])} holds NaN or infinity and cannot be quantized")
    return RowSummary(low=low, high=high, rms=rms, kurtosis=fourth)


def _summary(rows: Tensor) -> tuple[Tensor, ...]:
    low, high = rows.aminmax(dim=1)
    reach = torch.maximum(-low, high).clamp_min(torch.finfo(torch.float32).tiny)
    units = rows / reach[:, None]  # fourth powers of small weights stay normal numbers
    mean = units.mean(1)
    square = units.sub_(mean[:, None]).square_()
    total = square.sum(1)
    variance = total / max(rows.shape[1] - 1, 1)
    rms = (total / rows.shape[1] + mean.square()).sqrt() * reach
    fourth = square.square_().mean(1)
    varies = variance.sqrt() * reach > 1e-15
    return low, high, rms, torch.where(varies, fourth / torch.where(varies, variance, 1.0).square(), 0.0)


def _fit(rows: Tensor, bits: Tensor, fmt: QuantFormat, scheme: str, summary: RowSummary) -> RowQuantizer:
    """Quantizers of one scheme; ``bits`` is ``[C]`` or ``[C, K]`` for K quantizers a row."""
    ternary = scheme == "ternary"
    top = top_code(bits, ternary=ternary)
    low, high, rms = (x.reshape(-1, *(1,) * (bits.dim() - 1)) for x in (summary.low, summary.high, summary.rms))
    if scheme == "asymmetric":
        low, high = low.clamp_max(0), high.clamp_min(0)
        widest = (high - low) / top
        zero = (-low / widest.clamp_min(torch.finfo(torch.float32).tiny)).round().minimum(top)
    else:
        reach = torch.maximum(-low, high).expand(bits.shape)
        reach = torch.where(bits == 1, reach.minimum(ONE_BIT_RANGE * rms), reach)
        if ternary:
            level = ternary_level(rows).reshape(low.shape)
            reach = torch.where(bits == TERNARY_WIDTH, reach.minimum(TERNARY_RANGE * level), reach)
        widest = 2 * reach / top
        zero = top / 2
    dead = widest <= 0
    widest = torch.where(dead, 1.0, widest)  # an all-zero row: any scale gives zero in the asymmetric scheme
    # The symmetric levels have no zero: such a row falls back to code 0 = 0.0.
    zero = torch.where(dead & (zero != zero.round()), 0.0, zero)
    if fmt.criterion == "minmax":
        return RowQuantizer(scale=stored_scale(widest), zero=zero, bits=bits, ternary=ternary)
    grid = [x.reshape(len(rows), -1) for x in (widest, zero, top)]
    factor = best_factors(rows, grid[0], grid[1], grid[2], fmt.n_candidates, fmt.p)
    scale = stored_scale(widest * factor.reshape(widest.shape))
    return RowQuantizer(scale=scale, zero=zero, bits=bits, ternary=ternary)


def ternary_level(rows: Tensor) -> Tensor:
    """The ``a`` ``[C]`` of the levels ``{-a, 0, +a}`` with the least squared error for each row ``[C, D]``.

    If the k largest magnitudes are the ones that do not become 0, their mean is best, and takes ``sum**2 / k`` off the
    error: the best of all k, exactly.
    """
    levels = []
    for b in blocks(rows):
        sums = rows[b].float().abs().sort(1, descending=True).values.cumsum(1)
        counts = torch.arange(1, rows.shape[1] + 1, device=rows.device)
        best = (sums.square() / counts).argmax(1, keepdim=True)
        levels.append((sums.gather(1, best) / (best + 1))[:, 0])
    return torch.cat(levels)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored: half precision times one power of two a layer, which puts the largest just below
    2**16.

    ``scale`` is ``[C]``, or ``[C, K]`` for K quantizers of a layer, each with a power of its own.
    Rows down to 2**-29 of the largest keep 11 significant bits, whatever the magnitude of the layer.
    """
    unit = torch.exp2((torch.frexp(scale.amax(0)).exponent - 16).clamp_min(-126).float())
    return (scale / unit).clamp(2.0**-24, 65504.0).half().float() * unit


def top_code(bits: Tensor, *, ternary: bool = False) -> Tensor:
    """The largest code of each width, float32; at full precision that of 8 bits."""
    top = torch.exp2(bits.clamp(max=8).float()) - 1
    return torch.where(bits == TERNARY_WIDTH, 2.0, top) if ternary else top
