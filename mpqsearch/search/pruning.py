"""When a trial is clearly worse than the best one: an exact signed-rank test over what both were measured on.

The rule is that of `optuna.pruners.WilcoxonPruner`. The test is its own: a map that a trial shares with the best one
gives a difference of exactly zero, and with ties SciPy's exact test tries all sign patterns one by one (a second a
trial) or, from 14 differences on, gives up exactness. Here all sign patterns are counted at once, rank by rank. Nothing
is written to the storage while a trial runs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

LEVEL = 0.1
"""A trial is cut short when a difference as bad as its own has less than this probability under random signs."""

LEAST = 6
"""So many differences are looked at before any verdict."""


def signed_rank_p(differences: Sequence[float]) -> float:
    """Probability, if every sign were a fair coin, of a sum of positive ranks at least as large as that of
    ``differences``.

    One-sided and exact; equal magnitudes share their mean rank, zeros are ranked and count half on either side (Pratt
    1959; "zsplit" in `scipy.stats.wilcoxon`).
    """
    magnitudes = sorted(abs(d) for d in differences)
    # Twice the mean rank: of a run of equal magnitudes the first place and the last.
    doubled = {d: bisect_left(magnitudes, abs(d)) + bisect_right(magnitudes, abs(d)) + 1 for d in differences if d != 0}
    moving = [d for d in differences if d != 0]
    # Sign patterns by their sum, as the digits of one number: none exceeds 2**len(moving), so that digits never carry.
    width = len(moving) + 2
    patterns = 1
    for d in moving:
        patterns += patterns << width * doubled[d]
    observed = sum(doubled[d] for d in moving if d > 0)
    as_bad = (patterns >> width * observed) % ((1 << width) - 1)  # the sum of the digits that are left
    return as_bad / (1 << len(moving))


def is_clearly_worse(mine: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Whether a trial with the losses ``mine`` so far, by instance, is to be cut short in favour of the one with
    ``best``.

    As Optuna's pruner does, a trial whose mean so far is no worse than the best one's whole mean goes on whatever the
    test says.
    """
    common = [step for step in mine if step in best]
    if len(common) < LEAST or sum(mine.values()) / len(mine) <= sum(best.values()) / len(best):
        return False
    return signed_rank_p([mine[step] - best[step] for step in common]) < LEVEL
