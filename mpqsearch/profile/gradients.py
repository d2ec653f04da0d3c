"""Second moments of the gradients of final samples: what KFAC rounding needs to know of a layer beside its inputs.

The gradient ``G`` of a random projection of a final sample with respect to the weights of a layer, through all steps of
the sampler, has ``E[G A G'] = S tr(A H)`` and ``E[G' B G] = H tr(B S)`` for any ``A`` and ``B`` when its covariance is
``S x H`` (KFAC). Here every column of ``G`` counts alike, and for ``H`` every row, so that none outweighs the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpqsearch.core import LayerTable
from mpqsearch.models import Denoiser
from mpqsearch.profile.final_probes import walk_back
from mpqsearch.profile.taps import GradientTap, checkpointed
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import RowStatistics, Statistics
from mpqsearch.sampling import chain

MOST = 512
"""Channels whose outputs are taken together; what a layer with more has in common across is left out."""

MOST_INPUTS = 2048
"""Fan-in up to which the side of the inputs is measured, too."""


def together(n_channels: int, groups: int = 1) -> int:
    """Number of consecutive output channels of a layer that are taken together: the largest divisor up to `MOST`."""
    own = n_channels // groups
    return next(n for n in range(min(own, MOST), 0, -1) if own % n == 0)


def gradient_bytes(table: LayerTable) -> int:
    """Bytes that `gradient_moments` takes: the gradient of every weight, and what it returns."""
    outputs = sum(la.n_channels * together(la.n_channels, la.groups) for la in table)
    inputs = sum(la.groups * la.weights_per_channel**2 for la in table if la.weights_per_channel <= MOST_INPUTS)
    return 4 * (sum(la.n_weights for la in table) + outputs + inputs)


def gradient_moments(
    denoiser: Denoiser,
    table: LayerTable,
    seeds: Sequence[int],
    means: Statistics,
    *,
    seed: int = 0,
    checkpoint: bool = False,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Of the layers that a gradient reached, along one random direction of the final sample of each of ``seeds``:
    ``<layer>/outputs`` ``[P, c, c]`` and, up to a fan-in of `MOST_INPUTS`, ``<layer>/inputs`` ``[G, D, D]``, float32.

    ``means``: of the inputs, by layer; what a corrected bias makes good is left out. Takes a run, one more forward and
    one backward pass a call for each of ``seeds``, and `gradient_bytes`. Raises `NumericsError` for a sample that is
    not finite, `ModelError` when no gradient comes back through the pipeline.
    """
    generator, sums = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    denoiser.runner.encode(denoiser.module, seeds, batch=1)
    with checkpointed(denoiser.module, checkpoint), GradientTap(denoiser.module, table) as tap:
        for done, one in enumerate(seeds, start=1):
            for name, (gradient, bias) in _gradients(denoiser, tap, one, generator).items():
                layer = table[name]
                rows = _centred(gradient, bias, means[name]) if layer.has_bias and name in means else gradient
                channels = together(layer.n_channels, layer.groups)
                added = {"outputs": _products(rows.reshape(-1, channels, rows.shape[1]))}
                if rows.shape[1] <= MOST_INPUTS:
                    added["inputs"] = _products(rows.reshape(layer.groups, -1, rows.shape[1]).mT)
                for side, products in added.items():
                    key = f"{name}/{side}"
                    sums[key] = sums[key].add_(products) if key in sums else products
            progress("gradients of samples", done, len(seeds))
    return sums


def _gradients(
    denoiser: Denoiser, tap: GradientTap, seed: int, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """``d(v . x) / dW`` of every layer as rows ``[C, D]``, and ``d(v . x) / db`` ``[C]`` as if it had a bias."""
    made, sums = chain(denoiser, [seed]), dict[str, tuple[Tensor, Tensor]]()

    def add(name: str, rows: Tensor, bias: Tensor, _square: Tensor) -> None:
        before = sums.get(name)
        sums[name] = (rows, bias) if before is None else (before[0].add_(rows), before[1] + bias)

    v = torch.randn((1, *made.final.shape), generator=generator).to(made.final)
    for segment in walk_back(denoiser, made, v):
        tap.backward(segment.objective, add, keep_graph=segment.more, inputs=segment.inputs)
    return sums


def _centred(rows: Tensor, bias: Tensor, known: RowStatistics) -> Tensor:
    """A gradient without what a corrected bias makes good."""
    mean = known.mean.to(rows)
    return rows - bias[:, None] * mean.repeat_interleave(len(rows) // len(mean), dim=0)


def _products(parts: Tensor) -> Tensor:
    """``[P, a, a]`` on the CPU: the sum of ``g g'`` over the columns of some matrices ``[P, a, b]``, each of length
    1."""
    length = parts.float().square().sum(1, keepdim=True)
    unit = parts * torch.where(length > 1e-12 * length.sum(), length.clamp_min(1e-38).rsqrt(), 0)
    return torch.bmm(unit, unit.mT).cpu()


@dataclass(frozen=True)
class WithGradients(Mapping[str, RowStatistics]):
    """Statistics of inputs with what `gradient_moments` gave beside them."""

    inputs: Statistics
    gradients: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> RowStatistics:
        known, outputs = self.inputs[name], self.gradients.get(f"{name}/outputs")
        if outputs is None:
            return known
        inputs = self.gradients.get(f"{name}/inputs", known.input_moment)
        return replace(known, output_moment=outputs, input_moment=inputs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)
