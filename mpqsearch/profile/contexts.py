"""The slope of a layer's error among the errors of all others, at models that are quantized already.

A probe at full precision prices the error of a layer as if it were alone, ``|J e|**2``. In a map at 2-4 bits it is not:
with ``r`` the difference of the final samples to full precision that all errors make, the error of one layer also
changes ``|r|**2`` by ``2 r'J e``, with ``J`` that of the quantized model. One backward pass through the sampler gives
it for all layers and widths. It is taken at a few *contexts*, maps in which every layer has a width of its own, drawn
as a Latin square: over as many contexts as there are widths each layer has each width once, so that no layer looks
worse than another because it happened to be narrow, and all contexts have about the same size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpqsearch.core import LayerTable, Policy
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.profile.final_probes import final_probes
from mpqsearch.quant import weight_of
from mpqsearch.quant.tables import error_part, error_rows
from mpqsearch.sampling import SamplerSpec, sample

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ContextProbes:
    """``slope`` maps a variant to ``[L, W]``: ``2 r'J e`` as a mean over the pixels of the final sample and over
    contexts, of any sign.

    ``std_error`` is over batches of samples, of which each context has its own. ``mse``: measured error of each
    context's samples.
    """

    slope: Mapping[str, Floats]
    std_error: Mapping[str, Floats]
    mse: tuple[float, ...]


def latin_contexts(table: LayerTable, policy: Policy, widths: Sequence[int], *, seed: int = 0) -> NDArray[np.int64]:
    """As many maps ``[len(widths), L]`` as there are widths: each searched layer has each width once, in a random
    order, tied layers the same."""
    rng = np.random.default_rng(seed)
    order: dict[str, NDArray[np.int64]] = {}
    columns = []
    for layer in table:
        fixed = policy.fixed_width(layer)
        mine = rng.permutation(np.asarray(widths, dtype=np.int64))
        if fixed is not None:
            columns.append(np.full(len(widths), fixed, dtype=np.int64))
        else:
            columns.append(order.setdefault(policy.tie_of(layer), mine) if policy.tie_of(layer) else mine)
    return np.stack(columns, 1)


def context_probes(
    denoiser: Denoiser,
    table: LayerTable,
    sampler: SamplerSpec,
    contexts: NDArray[np.int64],
    widths: Sequence[int],
    variant: str,
    seeds: Sequence[int],
    errors: Mapping[str, Mapping[str, Tensor]],
    means: Mapping[str, Tensor],
    *,
    batch: int = 4,
    checkpoint: bool = False,
    tick: Callable[[int], Any] | None = None,
) -> ContextProbes:
    """Slopes of the error of the final samples at every context, with an equal part of the seeds each.

    Costs ``5 T`` forward passes a sample, ``batch`` samples at a time.

    contexts
        ``[M, L]`` widths, among ``widths``; any other stays at full precision.
    variant
        The quantizer of the contexts, a key of ``errors``; the effects of all variants are measured there.
    errors
        Variant -> layer -> weight errors ``[W, C, D]``. means: layer -> mean input ``[G, D]``, for the shift that the
        bias takes.
    Raises `ConfigError` when there are fewer seeds than contexts.
    """
    if len(seeds) < len(contexts):
        raise ConfigError(f"{len(contexts)} contexts need at least one seed each, got {len(seeds)}")
    slopes: dict[str, list[Floats]] = {v: [] for v in errors}
    sizes: list[int] = []
    mse = []
    for number, context in enumerate(contexts):
        part = seeds[number :: len(contexts)]
        module = _quantized(denoiser.module, table, context, widths, errors[variant], means)
        found = final_probes(
            denoiser.with_module(module),
            table,
            sampler,
            part,
            errors,
            means,
            probes=1,
            batch=batch,
            reference=sample(denoiser, part, sampler),
            along_residual=True,
            checkpoint=checkpoint,
            tick=tick,
        )
        length = found.residual.astype(np.float64)
        pixels = found.samples * int(np.prod(denoiser.sample_shape))
        mse.append(float(np.square(length).sum() / pixels.sum()))
        sizes.extend(found.samples.tolist())
        for name, effect in found.effect.items():
            slopes[name].extend((2 * length / pixels)[:, None, None] * effect.sum(1, dtype=np.float64))
    return ContextProbes(
        slope={v: np.average(each, axis=0, weights=sizes) for v, each in slopes.items()},
        std_error={v: _std_error(each) for v, each in slopes.items()},
        mse=tuple(mse),
    )


def _std_error(each: Sequence[Floats]) -> Floats:
    return np.std(each, axis=0, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.abs(each[0])


@torch.no_grad()
def _quantized(
    module: nn.Module,
    table: LayerTable,
    context: NDArray[np.int64],
    widths: Sequence[int],
    errors: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> nn.Module:
    """A copy with the errors of a context in its weights and their mean shift taken off its biases."""
    made = copy.deepcopy(module)
    column = {b: j for j, b in enumerate(widths)}
    for layer, bits in zip(table, context.tolist(), strict=True):
        if bits not in column:
            continue
        target: Any = made.get_submodule(layer.name)
        error = torch.cat([error_part(errors, layer.name, part)[column[bits]] for part in error_rows(errors, layer)])
        target.weight.add_(weight_of(error, layer).to(target.weight))
        if layer.has_bias:
            mean = means[layer.name].to(error)
            shift = torch.bmm(error.reshape(len(mean), -1, error.shape[1]), mean[:, :, None]).flatten()
            target.bias.sub_(shift.to(target.bias))
    return made
