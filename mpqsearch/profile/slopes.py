"""The slope of a layer's error among the errors of all others, at models that are quantized already.

A sensitivity at full precision prices the error of a layer as if it were alone, ``|J e|**2``. In a map at 2-4 bits it
is not: with ``r`` the difference of the final samples to full precision that all errors make, the error of one layer
also changes ``|r|**2`` by ``2 r'J e``, with ``J`` that of the quantized model. One backward pass through the sampler
gives it for all layers and widths. It is taken at a few *contexts*, maps in which every layer has a width of its own,
drawn as a Latin square: over as many contexts as there are widths each layer has each width once, so that no layer
looks worse than another because it happened to be narrow, and all contexts have about the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import LayerTable, Policy
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.profile.contexts import latin_contexts, mixed_widths, quantized_at
from mpqsearch.profile.final_probes import final_effects
from mpqsearch.profile.partial import Arrays
from mpqsearch.profile.probing import std_error_of
from mpqsearch.profile.tables import WeightErrors, final_format
from mpqsearch.progress import Progress, silent
from mpqsearch.sampling import batch_of, latents
from mpqsearch.specs import CalibrationSpec

Floats = NDArray[np.float64]

BATCH = 4
"""Samples whose slopes are measured together."""


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """``slope`` maps a format to ``[L, W]``: ``2 r'J e`` with bias correction, a mean over the values of the final
    sample and over contexts, of any sign.

    ``std_error`` is over batches of samples, of which each context has its own. ``mse``: measured error of each
    context's samples.
    """

    slope: Mapping[str, Floats]
    std_error: Mapping[str, Floats]
    mse: tuple[float, ...]


def slopes_at(
    denoiser: Denoiser,
    table: LayerTable,
    contexts: NDArray[np.int64],
    widths: Sequence[int],
    fmt: str,
    seeds: Sequence[int],
    errors: WeightErrors,
    *,
    batch: int = BATCH,
    checkpoint: bool = False,
    progress: Progress = silent,
) -> Slopes:
    """Slopes of the error of the final samples at every context ``[M, L]``, with an equal part of the seeds each.

    Contexts are quantized in the format ``fmt``, with bias correction; a width that is not among ``widths`` is full
    precision. Costs ``5 T`` forward passes a sample. Raises `ConfigError` when there are fewer seeds than contexts.
    """
    if len(seeds) < len(contexts):
        raise ConfigError(f"{len(contexts)} contexts need at least one seed each, got {len(seeds)}")
    slopes: dict[str, list[Floats]] = {f: [] for f in errors.formats}
    sizes: list[int] = []
    mse, done = [], 0
    for number, context in enumerate(contexts):
        quantized = denoiser.with_module(quantized_at(denoiser.module, table, context, widths, fmt, errors))
        squares = 0.0
        for part in _batches(seeds[number :: len(contexts)], batch_of(denoiser, batch)):
            residual = _Residual(latents(denoiser, part))
            found = final_effects(quantized, table, part, errors, residual, checkpoint=checkpoint)
            for name, effect in found.items():
                slopes[name].append(2 * residual.length * effect[0, 1].astype(np.float64) / residual.n_values)
            sizes.append(len(part))
            squares += residual.length**2 * len(part) / residual.n_values
            done += len(part)
            progress("slopes at contexts", done, len(seeds))
        mse.append(squares / len(seeds[number :: len(contexts)]))
    return Slopes(
        slope={f: np.average(some, axis=0, weights=sizes) for f, some in slopes.items()},
        std_error={f: std_error_of(np.stack(some)) for f, some in slopes.items()},
        mse=tuple(mse),
    )


def slope_arrays(
    denoiser: Denoiser,
    table: LayerTable,
    policy: Policy,
    spec: CalibrationSpec,
    errors: WeightErrors,
    progress: Progress = silent,
) -> Arrays:
    """``layer_context_slope`` and its standard error by format; nothing when fewer than two of the widths are mixed."""
    widths = tuple(sorted(policy.widths))
    mixed = mixed_widths(spec, policy)
    if spec.context_seeds < max(len(mixed), 1) or len(mixed) < 2:
        return {}
    contexts = latin_contexts(table, policy, mixed, seed=spec.seed)
    found = slopes_at(
        denoiser,
        table,
        contexts,
        widths,
        final_format(spec),
        range(spec.first_seed, spec.first_seed + spec.context_seeds),
        errors,
        checkpoint=spec.checkpoint,
        progress=progress,
    )
    return {f"layer_context_slope/{f}": values.astype(np.float32) for f, values in found.slope.items()} | {
        f"layer_context_std_error/{f}": values.astype(np.float32) for f, values in found.std_error.items()
    }


class _Residual:
    """The direction of the difference to reference samples, its length, and of how many values."""

    def __init__(self, reference: Tensor) -> None:
        self._reference, self.length, self.n_values = reference, 0.0, reference.numel()

    def __call__(self, final: Tensor) -> Tensor:
        """One direction ``[1, N, ...]``."""
        residual = final - self._reference.to(final)
        self.length = float(residual.norm())
        return (residual / max(self.length, 1e-30))[None]


def _batches(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    return [seeds[i : i + size] for i in range(0, len(seeds), size)]
