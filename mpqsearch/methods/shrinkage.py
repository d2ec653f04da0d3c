"""Sensitivities as posterior estimates, and layer totals of which none is nothing.

An integer program puts errors where it believes that they cost nothing, so it exploits every underestimate: it gives
one bit to the channels whose measured sensitivity is 0, and in the quantized model they are not dead. What is measured
of a channel is therefore an estimate with an uncertainty, and shrunk towards the mean of its layer (empirical Bayes,
the linear rule of James and Stein): how far, the data say, by how much two measurements of the same channel differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import SensitivityProfile

Floats = NDArray[np.float64]

FLOOR = 0.1
"""Least shrinkage: no channel is priced below a tenth of the mean of its layer. Chosen in studies/robustness, on all
models but the one that it was judged on."""

POOLED = 16
"""Channels of all layers that are added to each layer's own when its shrinkage is estimated."""


def posterior_sensitivity(profile: SensitivityProfile, shrinkage: float | None = None) -> Floats:
    """Sensitivity ``[C]`` of every output channel, shrunk towards the mean of its layer, which it keeps.

    ``shrinkage`` in 0..1: 0 leaves what was measured, 1 makes all channels of a layer alike; None: the
    `estimated_shrinkage`.
    """
    shares, _ = _shares(profile)
    by_layer = estimated_shrinkage(profile) if shrinkage is None else np.full(len(profile.names), shrinkage)
    towards = np.repeat(by_layer, profile.channels)
    level = np.repeat(_levels(profile), profile.channels)
    posterior: Floats = level * (towards + (1 - towards) * shares)
    return posterior


def estimated_shrinkage(profile: SensitivityProfile) -> Floats:
    """Share ``[L]`` of the variance between the channels of a layer that is noise, `FLOOR`..1.

    The noise is what the sensitivities at full precision and at contexts (`SensitivityProfile`) differ by: it holds
    that of the probes and that of the models. Layers of few channels lean on the mean of all.
    """
    shares, difference = _shares(profile)
    if difference is None:
        return np.full(len(profile.names), FLOOR)
    counts = np.array(profile.channels, dtype=np.float64)
    noise, total = profile.layer_sum(difference**2 / 4), profile.layer_sum((shares - 1) ** 2)
    pooled = POOLED * noise.sum() / counts.sum(), POOLED * total.sum() / counts.sum()
    share: Floats = np.divide(
        noise + pooled[0], total + pooled[1], out=np.ones_like(noise), where=total + pooled[1] > 0
    )
    return np.clip(share, FLOOR, 1.0)


def believed_totals(totals: Floats, base: Floats, roles: Sequence[str]) -> Floats:
    """Layer totals ``[L, W]`` in which no layer is free: one whose errors ``base`` ``[L, W]`` seemed to have no effect
    has `FLOOR` of the effect that a unit of them has, in the geometric mean, in the layers of its role.

    Totals above 0 stay as they are. Shrinking them towards their role by their standard errors was tried: no gain on
    average, and a loss where it mattered (``studies/robustness``). The probes of all layers share their seeds, so most
    of the error is common to all layers and moves no bit.
    """
    there = (totals > 0) & (base > 0)
    effects = np.log(np.where(there, totals, 1.0)) - np.log(np.where(there, base, 1.0))
    known = there.any(1)
    if known.all() or not known.any():
        return totals
    effect = np.sum(effects * there, 1) / np.maximum(there.sum(1), 1)
    out = totals.copy()
    for i in np.flatnonzero(~known).tolist():
        peers = known & np.array([role == roles[i] for role in roles])
        middle = float(effect[peers if peers.any() else known].mean())
        out[i] = FLOOR * np.exp(middle) * base[i]
    return out


def _levels(profile: SensitivityProfile) -> Floats:
    """Mean sensitivity ``[L]`` of each layer at full precision; where it is 0, at contexts."""
    counts = np.array(profile.channels, dtype=np.float64)
    level = profile.layer_sum(_array(profile, "sensitivity")) / counts
    if "context_sensitivity" in profile.arrays:
        level = np.where(level > 0, level, profile.layer_sum(_array(profile, "context_sensitivity")) / counts)
    return level


def _shares(profile: SensitivityProfile) -> tuple[Floats, Floats | None]:
    """Sensitivity ``[C]`` by the mean of its layer, of both measurements where there are two, and their difference."""
    first = _by_mean(profile, _array(profile, "sensitivity"))
    if "context_sensitivity" not in profile.arrays:
        return first, None
    second = _by_mean(profile, _array(profile, "context_sensitivity"))
    return (first + second) / 2, first - second


def _by_mean(profile: SensitivityProfile, values: Floats) -> Floats:
    mean = np.repeat(profile.layer_sum(values) / np.array(profile.channels), profile.channels)
    by_mean: Floats = np.divide(values, mean, out=np.ones_like(values), where=mean > 0)
    return by_mean


def _array(profile: SensitivityProfile, key: str) -> Floats:
    return profile.need(key, "a price by sensitivity").astype(np.float64)
