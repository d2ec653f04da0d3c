"""Gradients of final samples, put together call by call, against autograd through the whole pipeline at once.

A normal run takes `SAMPLE`; with ``MPQSEARCH_TEST_ALL=1`` (``make test-all``) all of these run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mpqsearch.core import LayerTable
from mpqsearch.models import Denoiser, Hooks, discover
from mpqsearch.profile.final_probes import walk_back
from mpqsearch.profile.taps import GradientTap
from mpqsearch.quant import rows_of
from mpqsearch.sampling import chain
from tests.support.everything import ALL
from tests.support.pipelines import denoiser_of

SAMPLE = (
    "StableDiffusionPipeline",  # a multi-step scheduler, guidance in one call
    "StableDiffusionXLPipeline:turbo",  # draws noise at every step
    "Lumina2Pipeline",  # guidance in two calls a step
    "WanPipeline:2.2",  # two denoisers
    "DiTPipeline",  # pixels, classes, a learned variance
)
"""One of each kind."""
OTHERS = (
    "LatentConsistencyModelPipeline",
    "PixArtAlphaPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline",
    "StableAudioPipeline",
    "DDPMPipeline",
    "LDMPipeline",
    "ConsistencyModelPipeline",
)
SEEDS = (1, 2)

Gradients = dict[str, Tensor]
"""Layer -> rows ``[C, D]``."""


def by_call(denoiser: Denoiser, table: LayerTable) -> tuple[Tensor, list[Gradients]]:
    """Two directions in the space of final samples, and the gradients along them as they are measured."""
    made = chain(denoiser, SEEDS)
    v = torch.randn((2, *made.final.shape), generator=torch.Generator().manual_seed(3)).to(made.final)
    found: list[Gradients] = [{}, {}]
    with GradientTap(denoiser.module, table) as tap:
        for part in walk_back(denoiser, made, v):
            mine = found[part.direction]

            def add(name: str, rows: Tensor, _bias: Tensor, _square: Tensor, mine: Gradients = mine) -> None:
                mine[name] = mine[name] + rows if name in mine else rows

            tap.backward(part.objective, add, keep_graph=part.more, inputs=part.inputs)
    return v, found


def at_once(denoiser: Denoiser, table: LayerTable, v: Tensor) -> list[Gradients]:
    """The same from one graph of everything."""
    steps: list[Tensor] = []
    weights: dict[str, Any] = {la.name: denoiser.module.get_submodule(la.name).weight for la in table}
    for weight in weights.values():
        weight.requires_grad_(True)
    # Without a hook on calls the pipeline's own denoiser keeps its graph.
    denoiser.runner.run(denoiser.module, SEEDS, hooks=Hooks(step=steps.append), decode=False, grad=True)
    found = []
    for direction in v:
        grads = torch.autograd.grad(
            (direction * steps[-1]).sum(), list(weights.values()), retain_graph=True, allow_unused=True
        )
        found.append({n: rows_of(g, table[n]) for n, g in zip(weights, grads, strict=True) if g is not None})
    return found


@pytest.mark.parametrize("name", (*SAMPLE, *OTHERS) if ALL else SAMPLE)
def test_gradients_by_call_are_those_of_the_whole_graph(name: str) -> None:
    denoiser = denoiser_of(name)
    table = discover(denoiser)
    v, found = by_call(denoiser, table)
    for mine, whole in zip(found, at_once(denoiser, table, v), strict=True):
        assert set(mine) <= set(whole)
        difference = sum(float((mine.get(n, 0 * g) - g).square().sum()) for n, g in whole.items())
        power = sum(float(g.square().sum()) for g in whole.values())
        assert power > 0
        assert difference**0.5 <= 1e-5 * power**0.5
