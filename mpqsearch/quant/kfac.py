"""KFAC rounding: codes that are chosen for the final sample, given what the inputs of a layer are like and what its
outputs do.

GPTQ takes all output channels of a layer for alike and independent. What an error ``E`` of the weights does to the
sample is to second order ``tr(S E H E')``, with ``S`` and ``H`` second moments of the gradient of the sample by output
channels and by inputs, the Kronecker factors of a Gauss-Newton matrix (KFAC, arXiv 1503.05671; for rounding, YAQA,
arXiv 2505.22988). ``H`` is the mean of that of the gradient, which few samples give, and of that of the inputs. With
both, the error of one channel can be made good by others, too. From the codes of GPTQ each code is chosen anew given
all others, and then all scales given the codes, which can only lower that value. Widths and what is stored stay as they
are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpqsearch.errors import ConfigError
from mpqsearch.quant.gptq import DAMPING
from mpqsearch.quant.rows import RowQuantizer, by_column, decode, encode, stored_scale, top_code
from mpqsearch.quant.search import kernel_problem

BLOCK = 64
"""Columns whose effect on the columns after them is applied at once."""

SWEEPS = 20
"""Times that each code is chosen anew. On the embedded models one code in fifteen changes in the first sweep, one in
fifty in the fifth, and one in six hundred in the last."""

FITTED = 4
"""Sweeps between two fits of the scales, which take longer than a sweep."""

DOUBT = 0.25
"""Is taken off what two output channels have in common, which is estimated from few gradients."""

MARGIN = 0.1
"""Distance from the centre of its cell, in steps, up to which a weight stays what it was. Many codes are far from the
nearest ones, and training, which starts here, would take weights at the edge of a cell out of it at once (quickstart, 2
bits: FD 0.37 became 0.69 from 0.49 steps, and 0.33 from here)."""

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


def kfac_rows(
    exact: Tensor, rows: Tensor, quantizer: RowQuantizer, moment: Tensor, output_moment: Tensor
) -> tuple[Tensor, RowQuantizer]:
    """Rows ``[C, D]`` whose nearest codes are the ones chosen, and the quantizer with its scales fitted to them.

    exact, rows
        ``[C, D]``: the weights, and those whose nearest codes are where the choice begins (`gptq_rows`), in the units
        that are quantized.
    moment
        ``[G, D, D]``: second moment of the input of each group, or its covariance, as for `gptq_rows`.
    output_moment
        ``[P, c, c]``: second moments of the gradients of the outputs, of consecutive channels, in any unit.

    Rows of width 16 stay as they are, and so do those of a group without inputs or a part without gradients. Computes
    on the CPU, and gives back what it got where numba cannot be used. Raises `ConfigError` for moments that do not fit.
    """
    parts, width, groups = len(output_moment), exact.shape[1], len(moment)
    if len(exact) != parts * output_moment.shape[1] or parts % groups or moment.shape[1] != width:
        raise ConfigError(
            f"KFAC rounding: {len(exact)} rows of {width} need second moments [groups, {width}, {width}] of inputs and "
            f"[parts, channels, channels] of outputs, with parts that divide the rows and are divided by the groups; "
            f"got {tuple(moment.shape)} and {tuple(output_moment.shape)}"
        )
    if kernel_problem():
        return rows, quantizer
    own = replace(quantizer, bits=quantizer.bits.clamp(max=8))
    codes, scale, step = encode(rows, own), own.scale.clone(), len(exact) // parts
    taken = torch.zeros(len(exact), dtype=torch.bool, device=exact.device)
    for group in range(groups):
        inputs = _damped(moment[group])
        for k in range(group * parts // groups, (group + 1) * parts // groups):
            outputs = _believed(output_moment[k])
            if inputs is None or outputs is None:
                continue
            part = slice(k * step, (k + 1) * step)
            work = _Part(exact[part], codes[part], quantizer.of(part), inputs, outputs)
            for sweep in range(SWEEPS):
                if sweep % FITTED == FITTED // 2:
                    work.fit_scales()
                work.sweep()
            codes[part], scale.view(len(exact), -1)[part] = work.codes.to(codes), work.scale.T.to(scale)
            taken[part] = quantizer.bits[part] <= 8
    fitted = replace(quantizer, scale=stored_scale(scale))
    centre = decode(codes, replace(own, scale=fitted.scale))
    off = by_column(MARGIN * fitted.scale, exact)
    return torch.where(taken[:, None], exact.clamp(centre - off, centre + off), rows), fitted


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


class _Part:
    """Channels that are taken together, and the descent on ``tr(S E H E')``.

    Arrays are on the CPU and kept by column: ``now`` ``[D, c]``, what the weights became, ``pull`` ``[D, c]``, which is
    ``H E' S``, ``scale`` and ``zero`` ``[n, c]`` with one row for each of n groups of columns.
    """

    def __init__(self, exact: Tensor, codes: Tensor, quantizer: RowQuantizer, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.scale, self.zero = (
            x.cpu().reshape(len(exact), -1).T.clone(memory_format=torch.contiguous_format)
            for x in (quantizer.scale, quantizer.zero)
        )
        self.full = quantizer.bits.cpu() > 8
        self.top = top_code(quantizer.bits.cpu(), ternary=quantizer.ternary)
        self.top[self.full] = -1  # not quantized
        self.group = exact.shape[1] // len(self.scale)
        exact = exact.cpu().T
        levels = codes.cpu().T.float() - self._wide(self.zero)
        self.now = torch.where(self.full, exact, levels * self._wide(self.scale)).contiguous()
        self.pull = inputs @ ((self.now - exact) @ outputs)

    def _wide(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.group, dim=0)

    @property
    def codes(self) -> Tensor:
        """Of the channels that are quantized, float32 ``[c, D]``."""
        return (self.now / self._wide(self.scale) + self._wide(self.zero)).round_().clamp_(0, 255).T

    def sweep(self) -> None:
        """Choose each code anew given all others, column after column and in each channel after channel."""
        from mpqsearch.quant import kernel

        for begin in range(0, len(self.now), BLOCK):
            part = slice(begin, min(begin + BLOCK, len(self.now)))
            moved = torch.zeros_like(self.now[part])
            kernel.choose_codes(
                self.now[part].numpy(),
                self.pull[part].clone().numpy(),
                moved.numpy(),
                self.outputs.numpy(),
                self.inputs[part, part].contiguous().numpy(),
                self.scale.numpy(),
                self.zero.numpy(),
                self.top.numpy(),
                begin,
                self.group,
            )
            self.pull += self.inputs[:, part] @ moved

    def fit_scales(self) -> None:
        """The scales with the least value for the present codes, of all channels at once and one group of columns after
        the other: with levels ``L`` of the group a change ``d`` of its scales costs ``d' (S * L' H L) d``."""
        for k, before in enumerate(self.scale):
            part = slice(k * self.group, (k + 1) * self.group)
            levels = torch.where(self.full, 0, self.now[part] / before)
            through = self.inputs[:, part] @ levels
            curvature = (self.outputs * (levels.T @ through[part])).double()
            idle = curvature.diagonal() <= 0
            curvature.diagonal().add_(1e-6 * curvature.diagonal().mean() + idle.double())
            change = torch.linalg.solve(curvature, -(levels * self.pull[part]).sum(0).double()).float()
            fitted = torch.where(idle | (change.abs() > before / 2), before, before + change)
            change = stored_scale(fitted) - before  # codes of 8 bits are chosen for the scales that are stored
            self.scale[k] = before + change
            self.now[part] = torch.where(self.full, self.now[part], levels * self.scale[k])
            self.pull += (through * change) @ self.outputs
