"""When a trial is clearly worse than the best one: an exact signed-rank test over what both were measured on.

The rule is that of `optuna.pruners.WilcoxonPruner`. The test is its own: a map that a trial shares with the best one gives a difference of exactly
zero, and with ties SciPy's exact test tries all sign patterns one by one (a second a trial) or, from 14 differences on, gives up exactness.
Here the distribution under random signs is added up rank by rank. Nothing is written to the storage while a trial runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

LEVEL = 0.1
"""A trial is cut short when a difference as bad as its own has less than this probability under random signs."""

LEAST = 6
"""So many differences are looked at before any verdict."""


def signed_rank_p(differences: Sequence[float]) -> float:
    """Probability, if every sign were a fair coin, of a sum of positive ranks at least as large as that of ``differences``.

    One-sided and exact; equal magnitudes share their mean rank, zeros are ranked and count half on either side (Pratt 1959;
    "zsplit" in `scipy.stats.wilcoxon`).
    """
    values = np.asarray(differences, dtype=np.float64)
    _, group, counts = np.unique(np.abs(values), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(counts) - counts + 1)[group]  # twice the mean rank: whole numbers
    chance = np.ones(1)
    for rank in doubled[values != 0]:
        longer = np.concatenate([chance, np.zeros(rank)])
        longer[rank:] += chance
        chance = longer / 2
    return float(chance[doubled[values > 0].sum() :].sum())


def is_clearly_worse(mine: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Whether a trial with the losses ``mine`` so far, by instance, is to be cut short in favour of the one with ``best``.

    As Optuna's pruner does, a trial whose mean so far is no worse than the best one's whole mean goes on whatever the test says.
    """
    common = [step for step in mine if step in best]
    if len(common) < LEAST or np.mean(list(mine.values())) <= np.mean(list(best.values())):
        return False
    return signed_rank_p([mine[step] - best[step] for step in common]) < LEVEL
