"""Control arms: what a searched map has to beat, at the same budget, with the same quantizer and the same noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpqsearch.core import Budget
from mpqsearch.methods import allocate
from mpqsearch.search.surrogate import Candidate, Floats, Surrogate

ARMS = ("uniform", "random", "shuffled", "kurtosis", "plain")
"""``uniform``: one width. ``random``: random widths by layer. ``shuffled``: the plain program with the losses of layers
exchanged at random: does it matter which layer is which? ``kurtosis``: the plain program with the kurtosis of a row in
place of its loss, as MPQ-DM ranks channels. ``plain``: the integer program that the search starts from."""


def control_candidates(
    surrogate: Surrogate, budget: Budget, *, repeats: int = 3, seed: int = 0
) -> dict[str, list[Candidate]]:
    """The maps of every arm at one budget; ``random`` and ``shuffled`` have ``repeats`` draws, the others one."""
    return {
        "uniform": [_plain_method(surrogate, budget, "uniform")],
        "random": [_plain_method(surrogate, budget, "random", seed + i) for i in range(repeats)],
        "shuffled": [_with_losses(surrogate, budget, shuffled_losses(surrogate, seed + i)) for i in range(repeats)],
        "kurtosis": [_with_losses(surrogate, budget, kurtosis_losses(surrogate))],
        "plain": [surrogate.candidate({}, budget)],
    }


def uniform_candidate(surrogate: Surrogate, budget: Budget) -> Candidate:
    """The widest uniform map that fits the budget."""
    return _plain_method(surrogate, budget, "uniform")


def shuffled_losses(surrogate: Surrogate, seed: int) -> Floats:
    """The method's losses ``[C, W]`` with the layer totals a weight exchanged at random; inside a layer nothing
    changes."""
    profile, table = surrogate.profile, surrogate.table
    own = surrogate.losses_of({}, surrogate.method)
    totals = profile.layer_sum(own)
    weights = np.array([table[n].n_weights for n in profile.names], dtype=np.float64)[:, None]
    order = np.random.default_rng([seed, 1]).permutation(len(totals))
    exchanged = (totals / weights)[order] * weights
    factor = np.divide(exchanged, totals, out=np.zeros_like(totals), where=totals > 0)
    losses: Floats = own * np.repeat(factor, profile.channels, axis=0)
    return losses


def kurtosis_losses(surrogate: Surrogate) -> Floats:
    """Losses ``[C, W]`` that know of nothing but kurtosis: ``kurtosis * weights * 4**-bits``."""
    profile, table = surrogate.profile, surrogate.table
    weights = np.repeat([float(table[n].weights_per_channel) for n in profile.names], profile.channels)
    bits = np.array(profile.widths, dtype=np.float64)
    losses: Floats = (profile.need("kurtosis_smoothed", "the search by kurtosis").astype(np.float64) * weights)[
        :, None
    ] * 4.0**-bits
    return losses


def _plain_method(surrogate: Surrogate, budget: Budget, allocator: str, seed: int = 0) -> Candidate:
    method = replace(surrogate.method_of({}), name=allocator, allocator=allocator, seed=seed)
    return surrogate.finished(
        allocate(method, budget, surrogate.table, surrogate.profile, surrogate.policy, surrogate.format)
    )


def _with_losses(surrogate: Surrogate, budget: Budget, losses: Floats) -> Candidate:
    return surrogate.finished(
        allocate(
            surrogate.method_of({}),
            budget,
            surrogate.table,
            surrogate.profile,
            surrogate.policy,
            surrogate.format,
            losses=losses,
        )
    )
