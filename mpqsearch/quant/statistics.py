"""What is known of the inputs of a layer, and of what its outputs do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """Statistics of one layer over the calibration set, for each of its ``G`` groups.

    ``second_moment`` ``[G, D, D]`` is ``E[x x']`` of the unfolded input (empty: not known), ``mean`` ``[G, D]`` its
    mean, ``input_max`` ``[inputs]`` the largest magnitude of each input channel. ``output_moment`` ``[P, c, c]`` and
    ``input_moment`` ``[G, D, D]`` are second moments of the gradient of final samples with respect to the weights, of
    consecutive output channels and of inputs, each in any unit (empty: not known).
    """

    second_moment: Tensor
    mean: Tensor
    input_max: Tensor
    output_moment: Tensor = field(default_factory=lambda: torch.empty(0))
    input_moment: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def covariance(self) -> Tensor:
        """``[G, D, D]``: the second moment less that of the mean, whose errors a bias can take."""
        mean = self.mean.to(self.second_moment)
        return self.second_moment - mean[:, :, None] * mean[:, None, :]


Statistics = Mapping[str, RowStatistics]
"""Of layers, by name."""
