"""KFAC rounding: codes that are chosen for the final sample, given what the inputs of a layer are like and what its
outputs do.

GPTQ takes all output channels of a layer for alike and independent. What an error ``E`` of the weights does to the
sample is to second order ``tr(S E H E')``, with ``S`` and ``H`` second moments of the gradient of the sample by output
channels and by inputs, the Kronecker factors of a Gauss-Newton matrix (KFAC, arXiv 1503.05671; for rounding, YAQA,
arXiv 2505.22988). ``H`` is the mean of that of the gradient, which few samples give, and of that of the inputs. With
both, the error of one channel can be made good by others, too. From the codes of GPTQ each code is chosen anew given
all others, which can only lower that value. Widths, scales and what is stored stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpqsearch.errors import ConfigError
from mpqsearch.quant.gptq import DAMPING, EDGE
from mpqsearch.quant.rows import RowQuantizer, by_column, decode, encode, top_code
from mpqsearch.quant.search import kernel_problem

BLOCK = 64
"""Columns whose effect on the columns after them is applied at once."""

SWEEPS = 3
"""Times that each code is chosen anew."""

DOUBT = 0.2
"""Is taken off what two output channels have in common, which is estimated from few gradients."""

LEAST = 1e-3
"""Least weight of an output channel, in units of the mean: a channel that no gradient reached is not free."""


def input_side(moment: Tensor, gradient: Tensor) -> Tensor:
    """The mean ``[G, D, D]`` of two second moments of the inputs, of their values and by the gradient, in units of the
    first; the first where there is no other."""
    if not gradient.numel():
        return moment
    levels = [x.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] for x in (moment, gradient.to(moment))]
    share = torch.where(levels[1] > 0, levels[0] / levels[1].clamp_min(1e-300), 0)
    return torch.where(levels[1] > 0, (moment + share * gradient.to(moment)) / 2, moment)


def kfac_rows(exact: Tensor, rows: Tensor, quantizer: RowQuantizer, moment: Tensor, output_moment: Tensor) -> Tensor:
    """Rows ``[C, D]`` whose nearest codes are the ones chosen, in the scales of ``quantizer``.

    exact, rows
        ``[C, D]``: the weights, and those whose nearest codes are where the choice begins (`gptq_rows`), in the units
        that are quantized.
    moment
        ``[G, D, D]``: second moment of the input of each group, or its covariance, as for `gptq_rows`.
    output_moment
        ``[P, c, c]``: second moments of the gradients of the outputs, of consecutive channels, in any unit.

    Rows of width 16 stay as they are, and so do those of a group without inputs or a part without gradients. Computes
    on the CPU, and gives ``rows`` back where numba cannot be used. Raises `ConfigError` for moments that do not fit.
    """
    parts, width, groups = len(output_moment), exact.shape[1], len(moment)
    if len(exact) != parts * output_moment.shape[1] or parts % groups or moment.shape[1] != width:
        raise ConfigError(
            f"KFAC rounding: {len(exact)} rows of {width} need second moments [groups, {width}, {width}] of inputs and "
            f"[parts, channels, channels] of outputs, with parts that divide the rows and are divided by the groups; "
            f"got {tuple(moment.shape)} and {tuple(output_moment.shape)}"
        )
    if kernel_problem():
        return rows
    wanted, step = rows.clone(), len(exact) // parts
    for group in range(groups):
        inputs = _damped(moment[group])
        for k in range(group * parts // groups, (group + 1) * parts // groups):
            part, outputs = slice(k * step, (k + 1) * step), _believed(output_moment[k])
            if inputs is not None and outputs is not None:
                wanted[part] = _chosen(exact[part], rows[part], quantizer.of(part), inputs, outputs)
    return wanted


def _chosen(exact: Tensor, rows: Tensor, quantizer: RowQuantizer, inputs: Tensor, outputs: Tensor) -> Tensor:
    """`kfac_rows` of one part."""
    full, own = quantizer.bits > 8, replace(quantizer, bits=quantizer.bits.clamp(max=8))
    before = encode(rows, own)
    start = torch.where(full[:, None], exact, decode(before, own))
    after = _descended(exact.cpu(), start.cpu(), _on_cpu(quantizer), inputs, outputs).to(rows)
    off = by_column(EDGE * own.scale, after)
    same = (encode(after, own) == before) | full[:, None]
    return torch.where(same, rows, exact.clamp(after - off, after + off))


def _damped(moment: Tensor) -> Tensor | None:
    """The input side in units of its mean, float32 ``[D, D]``; None without inputs."""
    truth = moment.detach().cpu().double()
    level = truth.diagonal().mean()
    if not level > 0:
        return None
    return (truth / level + DAMPING * torch.eye(len(truth), dtype=torch.float64)).float()


def _believed(moment: Tensor) -> Tensor | None:
    """The output side in units of its mean, float32 ``[c, c]``; None without gradients."""
    truth = moment.detach().cpu().double()
    level = truth.diagonal().mean()
    if not level > 0:
        return None
    shrunk = (1 - DOUBT) * truth / level
    shrunk.diagonal().copy_((truth.diagonal() / level).clamp_min(LEAST))
    return shrunk.float()


def _on_cpu(quantizer: RowQuantizer) -> RowQuantizer:
    return replace(quantizer, **{key: getattr(quantizer, key).cpu() for key in ("scale", "zero", "bits")})


def _descended(exact: Tensor, start: Tensor, quantizer: RowQuantizer, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Quantized rows ``[c, D]`` by coordinate descent on ``tr(S E H E')`` from ``start``, column after column and in
    each channel after channel. Arrays are kept by column, ``[D, c]``."""
    from mpqsearch.quant import kernel

    width = exact.shape[1]
    now, target = start.T.contiguous(), exact.T.contiguous()
    scale, zero = (x.reshape(len(exact), -1).T.contiguous().numpy() for x in (quantizer.scale, quantizer.zero))
    top = top_code(quantizer.bits.clamp(max=8), ternary=quantizer.ternary)
    top[quantizer.bits > 8] = -1  # not quantized
    for _ in range(SWEEPS):
        pull = inputs @ ((now - target) @ outputs)
        for begin in range(0, width, BLOCK):
            part = slice(begin, min(begin + BLOCK, width))
            moved = torch.zeros_like(now[part])
            kernel.choose_codes(
                now[part].numpy(),
                pull[part].numpy(),
                moved.numpy(),
                outputs.numpy(),
                inputs[part, part].contiguous().numpy(),
                scale,
                zero,
                top.numpy(),
                begin,
                width // quantizer.groups,
            )
            pull[part.stop :] += inputs[part.stop :, part] @ moved
    return now.T.contiguous()
