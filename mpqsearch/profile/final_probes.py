"""First-order effects on the *final sample*: what the error of a layer does after all steps of the sampler, be it ours
or a pipeline's.

The gradient of a projection ``v . x_final`` with respect to a weight, taken through every step, holds what a projection
of one prediction does not: the coefficient with which a step enters the sample, what the later steps make of an earlier
error, and that the same weight error acts in every step, so that its systematic part adds up linearly and its random
part does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import LayerTable
from mpqsearch.models import Denoiser
from mpqsearch.profile.partial import Arrays
from mpqsearch.profile.probing import layer_arrays
from mpqsearch.profile.tables import WeightErrors
from mpqsearch.profile.taps import GradientTap, checkpointed
from mpqsearch.progress import Progress, silent
from mpqsearch.sampling import Chain, chain, gradients
from mpqsearch.specs import CalibrationSpec

Effects = dict[str, NDArray[np.float32]]
"""By format the effects ``[K, 2, L, W]`` on ``v . x_final`` of K directions of the error of each layer at each width:
first without, then with bias correction."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One call of the denoiser on the way back: ``objective`` is the scalar whose gradient with respect to the weights
    is this call's part of that of ``v[direction] . x_final``; after its backward pass the walk goes on from the
    gradients of ``inputs``, the arguments of the call that depend on earlier predictions. ``more`` says that the graph
    is needed again."""

    direction: int
    objective: Tensor
    inputs: tuple[Tensor, ...]
    more: bool


def walk_back(denoiser: Denoiser, made: Chain, directions: Tensor) -> Iterator[Segment]:
    """From the last call of the denoiser to the first, all directions ``[K, N, ...]`` at each, with the graph of one
    call in memory."""
    objectives = [(v * made.final).sum() for v in directions]
    for index in reversed(range(len(made.calls))):
        outputs, inputs = made.replay(index, denoiser.module)
        for k, objective in enumerate(objectives):
            # What the final sample owes to this prediction: through the scheduler, and through all later calls.
            along = gradients(objective, made.predictions[index])
            yield Segment(k, _dot(along, outputs), inputs, k + 1 < len(objectives))
            reached = [(x.grad, s) for x, s in zip(inputs, made.seen[index], strict=True) if x.grad is not None]
            if reached:
                objectives[k] = objective + _dot([grad for grad, _ in reached], [s for _, s in reached])
            for x in inputs:
                x.grad = None


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


class EffectSums:
    """Accumulates gradients over the calls of a walk into `Effects`.

    An error of a weight is the same in every call, so gradients are summed first and multiplied with the errors once;
    where errors are not held for want of memory, neither are gradients, and every call is multiplied by itself.
    """

    def __init__(self, table: LayerTable, errors: WeightErrors, n_directions: int) -> None:
        self._table, self._errors, self._n = table, errors, n_directions
        self._gradients: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._effects: dict[tuple[int, str], dict[str, Tensor]] = {}

    def add(self, direction: int, name: str, rows: Tensor, bias: Tensor, _square: Tensor) -> None:
        """The gradient of one direction with respect to a layer in one call."""
        key = (direction, name)
        if self._errors.held:
            before = self._gradients.get(key)
            self._gradients[key] = (rows, bias) if before is None else (before[0].add_(rows), before[1].add_(bias))
            return
        effects, sums = self._errors.effects(name, rows, bias), self._effects.get(key, {})
        self._effects[key] = {fmt: effect + sums[fmt] if sums else effect for fmt, effect in effects.items()}

    def result(self) -> Effects:
        """The effects of all layers; 0 for those that no gradient reached."""
        for (direction, name), (rows, bias) in self._gradients.items():
            self._effects[direction, name] = self._errors.effects(name, rows, bias)
        widths = {fmt: len(next(iter(e.values()))) for fmt, e in self._errors.errors.items()}
        out = {fmt: np.zeros((self._n, 2, len(self._table), n), dtype=np.float32) for fmt, n in widths.items()}
        position = {la.name: i for i, la in enumerate(self._table)}
        for (direction, name), effects in self._effects.items():
            for fmt, effect in effects.items():
                out[fmt][direction, :, position[name]] = effect.float().cpu().numpy()
        return out


def final_effects(
    denoiser: Denoiser,
    table: LayerTable,
    seeds: Sequence[int],
    errors: WeightErrors,
    directions: Callable[[Tensor], Tensor],
    *,
    checkpoint: bool = False,
) -> Effects:
    """Effects of weight errors on the final samples of ``seeds``, which run as one batch.

    Costs one run, one more forward pass a call and one backward pass a call and direction. ``directions`` gives
    the directions ``[K, N, ...]`` for the final samples ``[N, ...]``. Raises `NumericsError` for a sample that is not
    finite.
    """
    made = chain(denoiser, seeds)
    v = directions(made.final.detach())
    sums = EffectSums(table, errors, len(v))
    with checkpointed(denoiser.module, checkpoint), GradientTap(denoiser.module, table) as tap:
        for segment in walk_back(denoiser, made, v):
            tap.backward(
                segment.objective, partial(sums.add, segment.direction), keep_graph=segment.more, inputs=segment.inputs
            )
    return sums.result()


def projected_effects(
    denoiser: Denoiser,
    table: LayerTable,
    seeds: Sequence[int],
    errors: WeightErrors,
    *,
    probes: int = 4,
    seed: int = 0,
    checkpoint: bool = False,
    progress: Progress = silent,
) -> Effects:
    """`final_effects` along ``probes`` random directions ``v ~ N(0, I / d)`` for each seed by itself: ``K = seeds *
    probes``. The mean square over K is the squared error of the final sample, a mean over its ``d`` pixels."""
    generator = torch.Generator().manual_seed(seed)

    def random(final: Tensor) -> Tensor:
        v = torch.randn((probes, *final.shape), generator=generator).to(final)
        return v / math.sqrt(final.numel())

    denoiser.runner.encode(denoiser.module, seeds, batch=1)
    effects = []
    for done, one in enumerate(seeds, start=1):
        effects.append(final_effects(denoiser, table, [one], errors, random, checkpoint=checkpoint))
        progress("sensitivities of the final sample", done, len(seeds))
    return {fmt: np.concatenate([e[fmt] for e in effects]) for fmt in errors.formats}


def sampler_totals(
    denoiser: Denoiser,
    table: LayerTable,
    spec: CalibrationSpec,
    errors: WeightErrors,
    progress: Progress = silent,
) -> Arrays:
    """Layer totals ``layer_sampler`` of `layer_arrays`: the effect of each layer on the final sample. Standard errors
    are over seeds."""
    effects = projected_effects(
        denoiser,
        table,
        range(spec.first_seed, spec.first_seed + spec.sampler_seeds),
        errors,
        probes=spec.sampler_probes,
        seed=spec.seed,
        checkpoint=spec.checkpoint,
        progress=progress,
    )
    squares = {}
    for fmt, effect in effects.items():
        by_seed = np.square(effect.astype(np.float64)).reshape(
            spec.sampler_seeds, spec.sampler_probes, *effect.shape[1:]
        )
        squares[fmt] = by_seed.mean(1)
    return layer_arrays("layer_sampler", squares)
