"""Fréchet and kernel distances between feature samples, in float64 on the CPU wherever the features are: some devices
have no float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqsearch.errors import ConfigError, NumericsError


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Count, mean ``[d]`` and unbiased covariance ``[d, d]`` of a feature sample, float64."""

    n: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> FeatureStatistics:
        """Statistics of features ``[n, d]``; ``weights`` ``[n]`` are multiplicities, as a bootstrap draws them.

        Raises `ConfigError` with fewer than two samples, `NumericsError` when a feature is not finite.
        """
        x = features.cpu().double()
        if x.dim() != 2 or len(x) < 2:
            raise ConfigError(f"feature statistics need at least two rows, got the shape {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise NumericsError("a feature is NaN or infinite: look at the samples")
        w = _weights(weights, len(x))
        total = float(w.sum())
        mean = (w @ x) / total
        centred = x - mean
        covariance = (centred * w[:, None]).T @ centred / (total - 1)
        return cls(n=int(total), mean=mean, covariance=covariance)

    def __repr__(self) -> str:
        return f"FeatureStatistics(n={self.n}, dim={len(self.mean)})"


def frechet_distance(reference: FeatureStatistics, sample: FeatureStatistics) -> float:
    """Fréchet distance ``|m1 - m2|**2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)`` (Dowson and Landau 1982).

    Symmetric eigenproblems only, so the value is real by construction; it may be negative by rounding, of order 1e-12
    times the trace. torchmetrics gives the same number from the eigenvalues of the non-symmetric product. Raises
    `ConfigError` for features of different dimensions.
    """
    return frechet_from(reference)(sample)


def frechet_from(reference: FeatureStatistics) -> Callable[[FeatureStatistics], float]:
    """`frechet_distance` from one reference to many samples: the root of its covariance is taken once."""
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    def distance(sample: FeatureStatistics) -> float:
        if reference.mean.shape != sample.mean.shape:
            raise ConfigError(f"features of {len(reference.mean)} and {len(sample.mean)} dimensions cannot be compared")
        cross = torch.linalg.eigvalsh(root @ sample.covariance @ root).clamp_min(0).sqrt().sum()
        shift = (reference.mean - sample.mean).square().sum()
        return float(shift + reference.covariance.trace() + sample.covariance.trace() - 2 * cross)

    return distance


class KernelDistance:
    """Squared maximum mean discrepancy with the cubic kernel ``(a.b / d + 1)**3`` (KID, arXiv 1801.01401), full
    U-statistic, between features ``x`` ``[n, d]`` and ``y`` ``[m, d]``.

    Kernels are computed once; a bootstrap then weights the rows of ``y`` by how often they were drawn.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        _require_two(x, y)
        self._within_x = _mean_of_pairs(_kernel(x, x), _weights(None, len(x)))
        self._yy = _kernel(y, y)
        self._cross = _kernel(x, y).mean(0)

    def __call__(self, weights: Tensor | None = None) -> float:
        """The distance, with multiplicities ``[m]`` of the rows of ``y`` (default: once each)."""
        w = _weights(weights, len(self._yy))
        return float(self._within_x + _mean_of_pairs(self._yy, w) - 2 * (w @ self._cross) / w.sum())


class PairedKernelDistance:
    """`KernelDistance` where row ``i`` of both has the same noise: the diagonal of the cross term is left out as
    well."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        _require_two(x, y)
        cross = _kernel(x, y)
        self._pairs = _kernel(x, x) + _kernel(y, y) - cross - cross.T

    def __call__(self, weights: Tensor | None = None) -> float:
        """The distance over the pairs whose weight ``[n]`` is not 0 (default: all).

        Rows are in or out: duplicates would enter the U-statistic as pairs of themselves.
        """
        w = (_weights(weights, len(self._pairs)) > 0).double()
        return float(_mean_of_pairs(self._pairs, w))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a.cpu().double() @ b.cpu().double().T / a.shape[1] + 1) ** 3


def _weights(weights: Tensor | None, n: int) -> Tensor:
    """Multiplicities ``[n]``: once each where none are given."""
    return torch.ones(n, dtype=torch.float64) if weights is None else weights.cpu().double()


def _mean_of_pairs(kernel: Tensor, weights: Tensor) -> Tensor:
    """Mean over pairs of different rows, each row as often as its weight says."""
    n = weights.sum()
    return (weights @ kernel @ weights - weights @ kernel.diagonal()) / (n * (n - 1))


def _require_two(x: Tensor, y: Tensor) -> None:
    if min(len(x), len(y)) < 2:
        raise ConfigError(f"the kernel distance needs at least two samples on each side, got {len(x)} and {len(y)}")
