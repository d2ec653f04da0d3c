"""Fréchet and kernel distances between feature samples, in float64 on the CPU wherever the features are: some devices
have no float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqsearch.errors import ConfigError, NumericsError

BLOCK = 1024
"""Rows of a kernel matrix in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Count, mean ``[d]`` and unbiased covariance of a feature sample, float64.

    The covariance is kept as a ``factor`` ``[k, d]`` with ``factor.T @ factor`` equal to it; ``k`` is at most ``d``,
    and at most the number of different samples.
    """

    n: int
    mean: Tensor
    factor: Tensor

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
        w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.cpu().double()
        x, w = x[w > 0], w[w > 0]
        total = float(w.sum())
        mean = (w @ x) / total
        factor = (x - mean) * (w / (total - 1)).sqrt()[:, None]
        if len(factor) > factor.shape[1]:
            factor = torch.linalg.qr(factor, mode="r").R
        return cls(n=int(total), mean=mean, factor=factor)

    @classmethod
    def from_covariance(cls, n: int, mean: Tensor, covariance: Tensor) -> FeatureStatistics:
        """Statistics whose covariance ``[d, d]`` is known."""
        values, vectors = torch.linalg.eigh(covariance)
        return cls(n=n, mean=mean, factor=values.clamp_min(0).sqrt()[:, None] * vectors.T)

    @property
    def covariance(self) -> Tensor:
        """``[d, d]``."""
        return self.factor.T @ self.factor

    def __repr__(self) -> str:
        return f"FeatureStatistics(n={self.n}, dim={len(self.mean)})"


def frechet_distance(reference: FeatureStatistics, sample: FeatureStatistics) -> float:
    """Fréchet distance ``|m1 - m2|**2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)`` (Dowson and Landau 1982).

    The last trace is the sum of the singular values of ``A B^T`` where ``S1 = A^T A`` and ``S2 = B^T B``: real by
    construction, no larger than the smaller of the two samples, and without the rounding of eigenvalues that are 0;
    torchmetrics takes the eigenvalues of the non-symmetric product. It may be negative by rounding, of order 1e-15
    times the traces. Raises `ConfigError` for features of different dimensions.
    """
    if reference.mean.shape != sample.mean.shape:
        raise ConfigError(f"features of {len(reference.mean)} and {len(sample.mean)} dimensions cannot be compared")
    cross = torch.linalg.svdvals(reference.factor @ sample.factor.T).sum()
    shift = (reference.mean - sample.mean).square().sum()
    return float(shift + reference.factor.square().sum() + sample.factor.square().sum() - 2 * cross)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Of a kernel distance: ``of`` maps products ``a.b / d`` and squared distances ``|a - b|**2`` of features to its
    values; ``key`` and ``label`` are what the distance is called."""

    key: str
    label: str
    of: Callable[[Tensor, Tensor], Tensor]

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """``[n, m]`` of rows ``[n, d]`` and ``[m, d]``."""
        products = a @ b.T
        squares = a.square().sum(1)[:, None] + b.square().sum(1)
        return self.of(products / a.shape[1], squares - 2 * products)

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """``[n]`` of rows that belong together."""
        return self.of((a * b).mean(1), (a - b).square().sum(1))


CUBIC = Kernel(key="kid", label="KD", of=lambda product, _: (product + 1) ** 3)
"""Of the kernel Inception distance (arXiv 1801.01401)."""

CMMD = Kernel(key="cmmd", label="CMMD", of=lambda _, apart: 1000 * torch.exp(-apart / (2 * 10**2)))
"""Of the maximum mean discrepancy of CLIP embeddings, Gaussian with sigma 10, times 1000 (arXiv 2401.09603)."""


def kernel_distance(x: Tensor, y: Tensor, weights: Tensor | None = None, kernel: Kernel = CUBIC) -> Tensor:
    """Squared maximum mean discrepancy, full U-statistic, between features ``x`` ``[n, d]`` and ``y`` ``[m, d]``.

    ``weights`` ``[r, m]``: how often each row of ``y`` counts in each of ``r`` values (default: one value, once each);
    float64 ``[r]``. The kernel is computed once for all of them, some rows at a time.
    """
    x, y, w = _prepared(x, y, weights, len(y))
    ones = torch.ones(1, len(x), dtype=torch.float64)
    within_x = _mean_of_pairs(_quadratic(kernel, x, x, ones, ones), kernel.pairs(x, x), ones)
    within_y = _mean_of_pairs(_quadratic(kernel, y, y, w, w), kernel.pairs(y, y), w)
    return within_x + within_y - 2 * _quadratic(kernel, y, x, w, ones) / (w.sum(1) * len(x))


def paired_kernel_distance(x: Tensor, y: Tensor, weights: Tensor | None = None, kernel: Kernel = CUBIC) -> Tensor:
    """`kernel_distance` where row ``i`` of both has the same noise: the diagonal of the cross term is left out as well.

    Values are over the pairs whose weight is not 0. Rows are in or out: duplicates would enter the U-statistic as pairs
    of themselves.
    """
    x, y, w = _prepared(x, y, weights, len(y))
    w = (w > 0).double()
    sign = torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).double()
    both, doubled = torch.cat([x, y]), torch.cat([w, w], 1) * sign
    diagonal = kernel.pairs(x, x) + kernel.pairs(y, y) - 2 * kernel.pairs(x, y)
    return _mean_of_pairs(_quadratic(kernel, both, both, doubled, doubled), diagonal, w)


def _prepared(x: Tensor, y: Tensor, weights: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
    if min(len(x), len(y)) < 2:
        raise ConfigError(f"the kernel distance needs at least two samples on each side, got {len(x)} and {len(y)}")
    w = torch.ones(1, n, dtype=torch.float64) if weights is None else weights.cpu().double()
    return x.cpu().double(), y.cpu().double(), w


def _quadratic(kernel: Kernel, a: Tensor, b: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left @ kernel(a, b) @ right`` for each row of ``left`` and ``right``, ``[r]``."""
    total = torch.zeros(len(left), dtype=torch.float64)
    for rows, weights in zip(torch.split(a, BLOCK), torch.split(left, BLOCK, 1), strict=True):
        total += ((weights @ kernel.between(rows, b)) * right).sum(1)
    return total


def _mean_of_pairs(total: Tensor, diagonal: Tensor, weights: Tensor) -> Tensor:
    """Mean over pairs of different rows, each row as often as its weight says, of a kernel whose weighted sum is
    ``total``."""
    n = weights.sum(1)
    return (total - weights @ diagonal) / (n * (n - 1))
