"""GPTQ: codes that are chosen for the output of a layer, given what its inputs are like.

Rounding every weight to its nearest level makes the least error of the *weights*. The error of the output is ``e' H e``
with ``H`` the second moment of the inputs, and where inputs are correlated the error of one column can be made good by
others. Columns are rounded one after the other, and what each loses is taken off those still to come, in the proportion
that a Cholesky factor of the inverse of ``H`` gives (GPTQ, arXiv 2210.17323). Then scales are fitted to the codes by
least squares and each code is chosen anew given all others, which can only lower the error. Widths, schemes and what is
stored stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpqsearch.errors import ConfigError
from mpqsearch.quant.rows import RowQuantizer, by_column, decode, encode, stored_scale, top_code

BLOCK = 64
"""Columns whose effect on the columns after them is applied at once."""

DAMPING = 0.01
"""Is added to the diagonal of a moment, in units of its mean: what columns never saw, and the noise of few samples,
count for so much."""

SWEEPS = 2
"""Fits of the scales after the first pass, each with a new choice of all codes."""

EDGE = 0.49
"""Distance from the centre of its cell, in steps, up to which a weight is moved so that it rounds to the code that was
chosen."""


def gptq_rows(rows: Tensor, quantizer: RowQuantizer, moment: Tensor) -> tuple[Tensor, RowQuantizer]:
    """Rows ``[C, D]`` whose nearest codes are the compensated ones, and the quantizer with its scales fitted to them.

    rows
        ``[C, D]``, in the units that are quantized (smoothed ones times their factors).
    quantizer
        Of those rows, any widths, zero points and groups of inputs; rows of width 16 are left as they are.
    moment
        ``[G, D, D]``: second moment of the input of each group, or its covariance where the bias takes the mean error;
        with smoothing, that of the inputs over their factors.

    No row has more output error under ``moment`` than its nearest codes have: rows for which the method fails keep
    those. Takes ``C D**2`` multiplications a pass and ``G D**2`` numbers in float64. Raises `ConfigError` for a moment
    that does not fit the rows.
    """
    groups, width = moment.shape[0], rows.shape[1]
    if tuple(moment.shape) != (groups, width, width) or len(rows) % groups:
        raise ConfigError(
            f"GPTQ rounding: {len(rows)} rows of {width} need second moments [groups, {width}, {width}] with groups "
            f"that divide the rows; got {tuple(moment.shape)}"
        )
    exact = rows.detach().float()
    truth = moment.to(exact.device, torch.float64)
    level = truth.diagonal(dim1=1, dim2=2).mean(1)
    alive = level > 0  # a group that never saw an input has nothing to compensate
    if not bool(alive.any()):
        return exact.clone(), quantizer
    level = torch.where(alive, level, 1.0)
    damped = truth + (DAMPING * level)[:, None, None] * torch.eye(width, dtype=torch.float64, device=exact.device)
    parts, order = _order(damped.diagonal(dim1=1, dim2=2), quantizer.groups)
    back = order.argsort(dim=1)
    ordered = _take(_take(damped, order, 2), order, 1)
    work = _Rows(_take(exact.reshape(groups, -1, width), order, 2), quantizer, parts, ordered.float())
    work.first_pass(torch.linalg.cholesky(_inverse(ordered), upper=True).float())
    for _ in range(SWEEPS):
        work.fit_scales()
        work.sweep()
    wanted = _take(work.target, back, 2).reshape(rows.shape)
    fitted = replace(quantizer, scale=_take(work.scale, parts.argsort(dim=1), 2).flatten())
    codes = encode(wanted, fitted)
    nearest = encode(exact, quantizer)
    before, after = (_output_error(decode(c, q) - exact, truth) for c, q in ((nearest, quantizer), (codes, fitted)))
    keep = (after < before) & alive.repeat_interleave(len(rows) // groups) & (quantizer.bits <= 8)
    # One exponent serves all scales of a layer, so what is kept of both is rounded to storage together.
    kept = keep.repeat_interleave(quantizer.groups)
    scale = stored_scale(torch.where(kept, fitted.scale, quantizer.scale))
    final = replace(quantizer, scale=scale)
    codes = torch.where(keep[:, None], codes, nearest)
    centre = decode(codes, final)
    off = by_column(EDGE * scale, exact)
    moved = torch.where(keep[:, None], wanted, exact).clamp(centre - off, centre + off)
    same = ~keep[:, None] & (encode(exact, final) == nearest)  # clipped weights of kept rows stay where they are
    return torch.where(same | (quantizer.bits > 8)[:, None], exact, moved), final


def _order(cost: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The order ``[G, n]`` in which the n groups of columns of a row are rounded, and that of all columns ``[G, D]``,
    by the cost of an error ``[G, D]``: what costs most is rounded while most can make it good."""
    grouped = cost.reshape(len(cost), parts, -1)
    groups = grouped.sum(2).argsort(dim=1, descending=True)
    inside = grouped.argsort(dim=2, descending=True).gather(1, groups[:, :, None].expand_as(grouped))
    return groups, (groups[:, :, None] * grouped.shape[2] + inside).flatten(1)


class _Rows:
    """Rows ``[G, c, D]`` in the order in which columns are rounded; ``target`` is what was rounded, ``now`` what it
    became. Scales and zeros are ``[G, c, n]`` for n groups of columns, in the order ``parts`` ``[G, n]``."""

    def __init__(self, rows: Tensor, quantizer: RowQuantizer, parts: Tensor, moment: Tensor) -> None:
        shape = rows.shape[:2]
        self.exact, self.moment = rows, moment
        self.scale, self.zero = (_take(x.reshape(*shape, -1), parts, 2) for x in (quantizer.scale, quantizer.zero))
        self.group = rows.shape[2] // parts.shape[1]
        self.top = top_code(quantizer.bits, ternary=quantizer.ternary).reshape(shape)
        self.full = (quantizer.bits > 8).reshape(shape)
        self.target, self.now = rows.clone(), rows.clone()

    def rounded(self, column: Tensor, at: int) -> Tensor:
        """The nearest levels ``[G, c]`` of values for the column ``at``."""
        scale, zero = (x[:, :, at // self.group] for x in (self.scale, self.zero))
        codes = (column / scale + zero).round_().clamp_min_(0).minimum(self.top)
        return torch.where(self.full, column, codes.sub_(zero).mul_(scale))

    def blocks(self) -> list[slice]:
        width = self.exact.shape[2]
        return [slice(a, min(a + BLOCK, width)) for a in range(0, width, BLOCK)]

    def first_pass(self, factor: Tensor) -> None:
        """Round columns in turn, each after the corrections for those before it; ``factor`` ``[G, D, D]`` is upper
        triangular."""
        left = self.exact.clone()
        for part in self.blocks():
            here = left[:, :, part].clone()
            inner = factor[:, part, part]
            lost = torch.empty_like(here)
            for j in range(here.shape[2]):
                column = here[:, :, j].clone()
                value = self.rounded(column, part.start + j)
                lost[:, :, j] = (column - value) / inner[:, j, j, None]
                here[:, :, j:] -= lost[:, :, j, None] * inner[:, j, None, j:]
                self.target[:, :, part.start + j], self.now[:, :, part.start + j] = column, value
            left[:, :, part.stop :] -= torch.bmm(lost, factor[:, part, part.stop :])

    def fit_scales(self) -> None:
        """The scales with the least output error for the present codes, one group of columns after the other given the
        rest."""
        scale, now, codes = self.scale.clone(), self.now.clone(), []
        for k in range(scale.shape[2]):
            part = slice(k * self.group, (k + 1) * self.group)
            own = now[:, :, part] / scale[:, :, k, None]
            rest = self.exact - now
            rest[:, :, part] = self.exact[:, :, part]
            through = torch.bmm(own, self.moment[:, part])
            best, norm = (through * rest).sum(2), (through[:, :, part] * own).sum(2)
            good = (best > 0) & (norm > 0) & ~self.full
            scale[:, :, k] = torch.where(good, best / torch.where(good, norm, 1.0), scale[:, :, k])
            now[:, :, part] = own * scale[:, :, k, None]
            codes.append(own)
        rounded = stored_scale(scale.flatten()).reshape(scale.shape)
        wide = torch.cat([own * rounded[:, :, k, None] for k, own in enumerate(codes)], 2)
        self.now = torch.where(self.full[:, :, None], self.now, wide)
        self.scale = torch.where(self.full[:, :, None], self.scale, rounded)

    def sweep(self) -> None:
        """Choose each code anew given all others: coordinate descent on the output error."""
        slope = torch.bmm(self.now - self.exact, self.moment)
        diagonal = self.moment.diagonal(dim1=1, dim2=2)
        for part in self.blocks():
            here, inner = slope[:, :, part], self.moment[:, part, part]
            moved = torch.empty_like(here)
            for j in range(here.shape[2]):
                at = part.start + j
                wanted = self.now[:, :, at] - here[:, :, j] / diagonal[:, at, None]
                value = self.rounded(wanted, at)
                moved[:, :, j] = value - self.now[:, :, at]
                here += moved[:, :, j, None] * inner[:, j, None, :]
                self.target[:, :, at], self.now[:, :, at] = wanted, value
            slope[:, :, : part.start] += torch.bmm(moved, self.moment[:, part, : part.start])
            slope[:, :, part.stop :] += torch.bmm(moved, self.moment[:, part, part.stop :])


def _take(x: Tensor, order: Tensor, axis: int) -> Tensor:
    """``x`` with the entries along ``axis`` 1 or 2 in the order ``[G, D]`` of its group."""
    index = order[:, :, None] if axis == 1 else order[:, None, :]
    return x.gather(axis, index.expand(x.shape))


def _inverse(moment: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(moment))


def _output_error(error: Tensor, moment: Tensor) -> Tensor:
    """``e' H e`` of every row ``[C]`` in float64."""
    grouped = error.double().reshape(len(moment), -1, error.shape[1])
    return torch.bmm(grouped, moment).mul_(grouped).sum(2).flatten()
