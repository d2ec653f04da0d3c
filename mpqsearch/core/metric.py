"""A measured value that never travels without what it means, and the record of one evaluated point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mpqsearch.errors import NumericsError


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MetricValue:
    """One number with its label.

    ``name`` carries the extractor, as in ``FD[fmnist-cnn@1a2b3c4d]-128 vs FP``; the bare word FID is reserved for the
    Inception weights of 2015 against real data. ``low`` and ``high`` bound 95 % of the spread that ``spread`` names
    (``bootstrap`` or ``seeds``).
    """

    name: str
    value: float
    n_samples: int
    seeds: str
    extractor: str
    reference: str
    low: float
    high: float
    spread: str
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise NumericsError(f"{self.name} is {self.value}: the samples are not finite")

    def __repr__(self) -> str:
        return f"{self.name} = {self.value:.5g} ({self.low:.5g} to {self.high:.5g}, {self.spread}, n={self.n_samples})"

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """One evaluated point with everything that is needed to repeat it: a row of ``pareto.csv``.

    ``budget`` is the label of the budget that the map was made for (`Budget.label`) and ``quantity`` what that limits;
    both are empty for the full-precision model. Points of one budget have equal labels.
    """

    model: str
    method: str
    granularity: str
    budget: str
    quantity: str
    average_bits: float
    size_bytes: int
    act_bits: float
    bit_map_digest: str
    n_samples: int
    seeds: str
    seconds: float
    predicted_loss: float
    metrics: Mapping[str, MetricValue] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            **{k: getattr(self, k) for k in self.__slots__ if k != "metrics"},
            "metrics": {k: m.to_data() for k, m in self.metrics.items()},
        }
