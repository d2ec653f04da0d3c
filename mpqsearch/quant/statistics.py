"""What is known of the inputs of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """Input statistics of one layer over the calibration set, for each of its ``G`` groups.

    ``second_moment`` ``[G, D, D]`` is ``E[x x']`` of the unfolded input (empty: not known), ``mean`` ``[G, D]`` its
    mean, ``input_max`` ``[inputs]`` the largest magnitude of each input channel.
    """

    second_moment: Tensor
    mean: Tensor
    input_max: Tensor

    @property
    def covariance(self) -> Tensor:
        """``[G, D, D]``: the second moment less that of the mean, whose errors a bias can take."""
        mean = self.mean.to(self.second_moment)
        return self.second_moment - mean[:, :, None] * mean[:, None, :]


Statistics = Mapping[str, RowStatistics]
"""Of layers, by name."""
