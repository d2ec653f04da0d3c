"""How ranges of activations are searched."""

from __future__ import annotations

from dataclasses import dataclass

from mpqsearch.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSearch:
    """How a range is searched: ``sum |x - x_q|**p`` over the shrink factors ``1 - 0.8 i / n`` of the range, ``i <
    n_candidates``.

    The defaults are those of the released codes of EfficientDM and MPQ-DM (80 factors in steps of 0.01, p = 2.4), which
    shrink both ends of the range by one factor. With ``zero_points`` each end is cut where it costs least: all zero
    points are tried at every eighth factor, then all factors at the best of them. It takes no storage, and up to 40 %
    off the squared error of four-bit inputs with one long tail (notebook 07).
    """

    p: float = 2.4
    n_candidates: int = 80
    zero_points: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.p <= 8 or not 1 <= self.n_candidates <= 1000:
            raise ConfigError(
                f"activation search: p in (0, 8] and 1..1000 candidates, got p={self.p}, {self.n_candidates} candidates"
            )
