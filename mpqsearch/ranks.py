"""Rank correlation, with an interval. numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation of two vectors ``[N]``, -1..1, equal values sharing their mean rank; NaN with fewer than three
    pairs, or when one vector is constant."""
    a, b = _ranks(first), _ranks(second)
    if len(a) < 3:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float("nan")


def spearman_interval(first: ArrayLike, second: ArrayLike, *, draws: int = 500, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of `spearman` over pairs drawn with replacement; draws without spread are left out."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(a), size=(draws, len(a)))
    values = [spearman(a[p], b[p]) for p in picks]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def _ranks(values: ArrayLike) -> Floats:
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts + 1) / 2.0)[inverse]
    return ranks
