"""Control arms: what a searched map has to beat, at the same budget, with the same quantizer and the same noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpqsearch.core import Budget
from mpqsearch.search.surrogate import Candidate, Floats, Surrogate

ARMS = ("uniform", "random", "shuffled", "plain")
"""``uniform``: one width. ``random``: random widths by layer. ``shuffled``: the plain program with the losses of layers
exchanged at random: does it matter which layer is which? ``plain``: the integer program that the search starts from."""


def control_candidates(surrogate: Surrogate, budget: Budget, *, repeats: int = 3) -> dict[str, list[Candidate]]:
    """The maps of every arm at one budget; ``random`` and ``shuffled`` have ``repeats`` draws, the others one."""
    return {
        "uniform": [uniform_candidate(surrogate, budget)],
        "random": [_by(surrogate, budget, "random", seed) for seed in range(repeats)],
        "shuffled": [_shuffled(surrogate, budget, seed) for seed in range(repeats)],
        "plain": [surrogate.candidate({}, budget)],
    }


def uniform_candidate(surrogate: Surrogate, budget: Budget) -> Candidate:
    """The widest uniform map that fits the budget."""
    return _by(surrogate, budget, "uniform")


def shuffled_losses(surrogate: Surrogate, seed: int) -> Floats:
    """The method's losses ``[C, W]`` with the layers' losses per weight exchanged at random; inside a layer nothing
    changes."""
    profile, table = surrogate.profile_for(surrogate.method), surrogate.table
    losses = surrogate.losses_of({}, surrogate.method)
    totals = profile.layer_sum(losses)
    weights = np.array([table[n].n_weights for n in profile.names], dtype=np.float64)[:, None]
    order = np.random.default_rng([seed, 1]).permutation(len(totals))
    exchanged = (totals / weights)[order] * weights
    factor = np.divide(exchanged, totals, out=np.zeros_like(totals), where=totals > 0)
    shuffled: Floats = losses * np.repeat(factor, profile.channels, axis=0)
    return shuffled


def _by(surrogate: Surrogate, budget: Budget, allocator: str, seed: int = 0) -> Candidate:
    method = replace(surrogate.method, name=allocator, allocator=allocator, seed=seed, act_choices=())
    return surrogate.finished(surrogate.programs(method).allocate(method, budget), budget)


def _shuffled(surrogate: Surrogate, budget: Budget, seed: int) -> Candidate:
    method, losses = surrogate.method, shuffled_losses(surrogate, seed)
    return surrogate.finished(surrogate.programs(method).allocate(method, budget, losses=losses), budget)
