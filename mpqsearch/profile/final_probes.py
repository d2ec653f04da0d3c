"""First-order probes of the *final sample*: what the error of a layer does after all steps of the sampler.

The gradient of a random projection ``v . x_final`` with respect to a weight, taken through every step, holds what a
probe of the denoiser's output does not: the coefficient with which a step enters the sample, what the later steps make
of an earlier error, and that the same weight error acts in every step, so that its systematic part adds up linearly and
its random part does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import LayerTable
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.models import Denoiser
from mpqsearch.profile.probes import corrected
from mpqsearch.profile.taps import GradientTap, Sink, checkpointed
from mpqsearch.quant.tables import error_part, error_rows
from mpqsearch.sampling import SamplerSpec, chain_of

Floats32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class FinalProbes:
    """Effects of candidate weight errors on the final samples, to first order, for K probes, T steps, L layers, W
    widths.

    ``effect`` maps a variant to ``[K, T, L, W]``: the part of ``v . dx_final`` that the error of that layer at that
    width brings in at that step; the sum over T is the whole effect, and its mean square over K the squared error of
    the final sample (mean over pixels), since ``v ~ N(0, I / d)``. ``row_square`` maps a variant to ``[C, W]``: mean
    over random probes of the squared effect of one output channel over all steps. ``row_along`` is the mean over
    samples of a channel's effect along the residual times the length of that, in the same unit, so that ``2 row_along``
    is the slope of the error of the sample (empty without a residual). ``sensitivity`` ``[T, C]``: mean square of ``d(v .
    x_final) / dy`` of a channel at a step, summed over positions. ``residual`` ``[K]``: ``v . (x_final -
    x_reference)``, zero at the full-precision model. ``samples`` ``[K]``: how many samples a probe looks at together.

    A probe of a batch of N samples projects all of them at once, ``v ~ N(0, I / (N d))``: its square is in the mean the
    error of a sample, since the projections of different samples are independent, and along the residuals of a batch it
    is the exact sum over its samples.
    """

    effect: Mapping[str, Floats32]
    row_square: Mapping[str, Floats32]
    row_along: Mapping[str, Floats32]
    gain: Floats32
    residual: Floats32
    samples: NDArray[np.int64]


def final_probes(
    denoiser: Denoiser,
    table: LayerTable,
    sampler: SamplerSpec,
    seeds: Sequence[int],
    errors: Mapping[str, Mapping[str, Tensor]],
    means: Mapping[str, Tensor],
    *,
    probes: int = 4,
    seed: int = 0,
    batch: int = 1,
    reference: Tensor | None = None,
    along_residual: bool = False,
    checkpoint: bool = False,
    tick: Callable[[int], Any] | None = None,
) -> FinalProbes:
    """Probe the final samples of ``seeds``, ``batch`` trajectories at a time.

    errors
        Variant -> layer -> ``[W, C, D]``: candidate weight minus present weight. At the full-precision model that is
        the quantization error; at an operating point the difference of two quantized weights.
    means
        Layer -> mean unfolded input ``[G, D]``: the shift that bias correction takes out, in layers with a bias.
    probes
        Projections of each batch. A larger batch has fewer of them in all for the same work, and makes better use of a
        processor.
    reference
        Full-precision samples ``[len(seeds), ...]`` at an operating point; with ``along_residual`` the first probe of
        each batch is its residual, normalised to the length of a random ``v``.

    Costs ``T (2 + 2 probes)`` forward passes a sample: the trajectory, its recomputation step by step (so that the
    graph of one call is all the memory taken) and a backward pass a probe. Leaves the model as it was. Raises
    `NumericsError` when a sample is not finite.
    """
    if batch < 1:
        raise ConfigError(f"probes of final samples need a batch of at least 1, got {batch}")
    if along_residual and reference is None:
        raise ConfigError("a probe along the residual needs the reference samples")
    n_widths = {v: next(iter(e.values())).shape[0] for v, e in errors.items()}
    parts = [slice(i, min(i + batch, len(seeds))) for i in range(0, len(seeds), batch)]
    total, starts = len(parts) * probes, np.cumsum([0, *(la.n_channels for la in table)])
    effect = {v: np.zeros((total, sampler.steps, len(table), w), dtype=np.float32) for v, w in n_widths.items()}
    row_square = {v: np.zeros((int(starts[-1]), w)) for v, w in n_widths.items()}
    row_along = {v: np.zeros((int(starts[-1]), w)) for v, w in n_widths.items() if along_residual}
    gain = np.zeros((sampler.steps, int(starts[-1])))
    residual = np.zeros(total, dtype=np.float32)
    position = {la.name: i for i, la in enumerate(table)}
    generator = torch.Generator().manual_seed(seed)

    def sink_of(k: int, t: int, run: dict[tuple[str, str], Tensor]) -> Sink:
        def take(name: str, rows: Tensor, bias: Tensor, square: Tensor) -> None:
            i = position[name]
            gain[t, starts[i] : starts[i + 1]] += square.cpu().double().numpy()
            found: dict[str, list[Tensor]] = {v: [] for v in errors}
            for part in error_rows(next(iter(errors.values())), table[name]):
                some = corrected(rows, bias, means[name], table[name], part)
                for variant, by_layer in errors.items():
                    error = error_part(by_layer, name, part)
                    found[variant].append(torch.einsum("wcd,cd->cw", error, some.to(error)).cpu())
            for variant, parts in found.items():
                by_row = torch.cat(parts)
                effect[variant][k, t, i] = by_row.sum(0).numpy()
                run[variant, name] = run.get((variant, name), 0) + by_row

        return take

    with checkpointed(denoiser.module, checkpoint), GradientTap(denoiser.module, table) as tap:
        for number, part in enumerate(parts):
            chain = chain_of(denoiser, seeds[part], sampler)
            finite = torch.isfinite(chain.final).flatten(1).all(1)
            if not bool(finite.all()):
                bad = seeds[part][int(finite.logical_not().nonzero()[0])]
                raise NumericsError(f"{denoiser.name}: the sample of seed {bad} is not finite")
            v = (
                torch.randn((probes, *chain.final.shape), generator=generator).to(chain.final)
                / chain.final.numel() ** 0.5
            )
            first = number * probes
            if reference is not None:
                left = chain.final.detach() - reference[part].to(chain.final)
                if along_residual and float(left.norm()) > 0:
                    v[0] = left / left.norm()
                residual[first : first + probes] = (v * left).flatten(1).sum(1).cpu().numpy()
            objective = [(v[k] * chain.final).sum() for k in range(probes)]
            by_probe: list[dict[tuple[str, str], Tensor]] = [{} for _ in range(probes)]
            for t in reversed(range(sampler.steps)):
                prediction, seen = chain.predictions[t], chain.inputs[t]
                x = seen.detach().requires_grad_(True)
                with torch.enable_grad():
                    out = denoiser.guided(x, chain.times[t], chain.cond, sampler.guidance)
                for k in range(probes):
                    # What the final sample owes to this prediction: through the scheduler, and through all later calls.
                    (along,) = torch.autograd.grad(objective[k], prediction, retain_graph=True)
                    sink = sink_of(first + k, t, by_probe[k])
                    back = tap.backward((along * out).sum(), sink, keep_graph=k + 1 < probes, x=x)
                    if t and back is not None:
                        objective[k] = objective[k] + (back * seen).sum()
            for k, found in enumerate(by_probe):
                for (variant, name), by_row in found.items():
                    own = slice(starts[position[name]], starts[position[name] + 1])
                    if (
                        k == 0 and along_residual
                    ):  # the mean over the batch, of which there are as many as it has samples
                        share = float(residual[first]) * len(chain.final) / chain.final.numel()
                        row_along[variant][own] += share * by_row.double().numpy()
                    else:
                        row_square[variant][own] += by_row.double().square().numpy()
            if tick is not None:
                tick(len(chain.final))
    return FinalProbes(
        effect=effect,
        row_square={
            n: (s / max(total - len(parts) * along_residual, 1)).astype(np.float32) for n, s in row_square.items()
        },
        row_along={n: (s / len(seeds)).astype(np.float32) for n, s in row_along.items()},
        gain=(gain / total).astype(np.float32),
        residual=residual,
        samples=np.repeat([p.stop - p.start for p in parts], probes).astype(np.int64),
    )
