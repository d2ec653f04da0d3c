"""Fréchet and kernel distances between feature samples, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpqsearch.errors import ConfigError, NumericsError


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Count, mean ``[d]`` and unbiased covariance ``[d, d]`` of a feature sample, float64."""

    n: int
    mean: Tensor
    covariance: Tensor
    _root: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> FeatureStatistics:
        """Statistics of features ``[n, d]``; ``weights`` ``[n]`` are multiplicities, as a bootstrap draws them.

        Raises `ConfigError` with fewer than two samples, `NumericsError` when a feature is not finite.
        """
        x = features.double()
        if x.dim() != 2 or len(x) < 2:
            raise ConfigError(f"feature statistics need at least two rows, got the shape {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise NumericsError("a feature is NaN or infinite: look at the samples")
        w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
        total = float(w.sum())
        mean = (w @ x) / total
        centred = x - mean
        covariance = (centred * w[:, None]).T @ centred / (total - 1)
        return cls(n=int(total), mean=mean, covariance=covariance)

    def root(self) -> Tensor:
        """Symmetric square root of the covariance, computed once: a reference is compared with many samples."""
        if not self._root:
            values, vectors = torch.linalg.eigh(self.covariance)
            self._root.append((vectors * values.clamp_min(0).sqrt()) @ vectors.T)
        return self._root[0]


def frechet_distance(reference: FeatureStatistics, sample: FeatureStatistics) -> float:
    """Fréchet distance ``|m1 - m2|**2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)`` (Dowson and Landau 1982).

    Symmetric eigenproblems only, so the value is real by construction; it may be negative by rounding, of order 1e-12
    times the trace. torchmetrics gives the same number from the eigenvalues of the non-symmetric product.
    """
    if reference.mean.shape != sample.mean.shape:
        raise ConfigError(f"features of {len(reference.mean)} and {len(sample.mean)} dimensions cannot be compared")
    root = reference.root()
    cross = torch.linalg.eigvalsh(root @ sample.covariance @ root).clamp_min(0).sqrt().sum()
    shift = (reference.mean - sample.mean).square().sum()
    return float(shift + reference.covariance.trace() + sample.covariance.trace() - 2 * cross)


def kernel_distance(x: Tensor, y: Tensor, *, paired: bool = False) -> float:
    """Squared maximum mean discrepancy with the cubic kernel ``(a.b / d + 1)**3`` (KID, arXiv 1801.01401), full
    U-statistic.

    ``paired``: row ``i`` of both has the same noise, so the diagonal of the cross term is left out as well.
    """
    x, y = x.double(), y.double()
    d = x.shape[1]
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ConfigError(f"the kernel distance needs at least two samples on each side, got {n} and {m}")
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    cross = (xy.sum() - xy.diagonal().sum()) / (n * (n - 1)) if paired else xy.mean()
    within = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1)) + (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within - 2 * cross)
