"""Dominance, hypervolume, and the front of a study. numpy only.

Everything is minimised; metrics where more is better are negated by `ParetoFront`. A point with a NaN coordinate was
not measured: it is never on a front, never dominates and adds no hypervolume.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpqsearch.core import StudyRecord
from mpqsearch.errors import ConfigError, NumericsError

FULL_PRECISION_METHOD = "full-precision"
"""The method name of the unquantized model's record."""

METRICS = ("fd_data", "fd_fp", "paired_psnr", "paired_mse", "kid_data", "class_accuracy")
"""Metrics that always have columns in `records_table`, in this order; others follow them."""

LOG_METRICS = ("fd_data", "fd_fp", "paired_mse")
"""Positive metrics whose differences are ratios: drawn and integrated on a log axis."""

DROP = "_drop"
"""Behind the name of a score: what it lost against full precision at the same noise. Trainings and targets are steered
by it; tables and figures show the score itself."""

Floats = NDArray[np.float64]


def main_metric(records: Iterable[StudyRecord]) -> str:
    """What points are judged by: the distance to full precision, or the paired error where samples are no pictures."""
    measured = {m for r in records for m in r.metrics}
    return next((m for m in ("fd_fp", "paired_mse") if m in measured), "fd_fp")


def shown_metrics(records: Iterable[StudyRecord]) -> list[str]:
    """The metrics that a page shows of records, in its order."""
    measured = {m for r in records for m in r.metrics if not m.endswith(DROP)}
    return [m for m in METRICS if m in measured] + sorted(measured - set(METRICS))


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which rows of ``points`` ``[N, D]`` are on the front when every column is minimised; ``[N]``.

    A row is off the front when another is no larger in every column and smaller in one. Equal rows are on it together,
    so the answer does not depend on the order of the rows. Rows with a NaN are off it.
    """
    array = _points(points)
    measured: NDArray[np.bool_] = np.logical_not(np.isnan(array).any(axis=1))
    front = measured.copy()
    for i in np.flatnonzero(measured):
        no_larger = (array[measured] <= array[i]).all(axis=1)
        smaller = (array[measured] < array[i]).any(axis=1)
        front[i] = not (no_larger & smaller).any()
    return front


def hypervolume_2d(points: ArrayLike, reference: Sequence[float]) -> float:
    """Area that ``points`` ``[N, 2]`` dominate below ``reference`` when both columns are minimised.

    Points that are not below the reference in both columns, and rows with a NaN, add nothing. The unit is the product
    of the columns' units. Raises `NumericsError` for a coordinate of minus infinity and `ConfigError` for a reference
    that is not finite.
    """
    array = _points(points)
    if array.shape[1] != 2 or len(reference) != 2:
        raise ConfigError(
            f"hypervolume_2d takes points [N, 2] and a reference of 2 numbers, got {array.shape} and {len(reference)}"
        )
    corner = np.asarray(reference, dtype=np.float64)
    if not np.isfinite(corner).all():
        raise ConfigError(f"the reference point of a hypervolume must be finite, got {tuple(reference)}")
    if np.isneginf(array).any():
        raise NumericsError("a point at minus infinity dominates an infinite area")
    inside = array[(array < corner).all(axis=1)]
    if not len(inside):
        return 0.0
    front = inside[np.lexsort((inside[:, 1], inside[:, 0]))]
    lowest = np.minimum.accumulate(front[:, 1])
    widths = np.diff(np.r_[front[:, 0], corner[0]])
    return float(widths @ (corner[1] - lowest))


@dataclass(frozen=True, kw_only=True)
class ParetoFront:
    """The points of one study in the plane of stored bits per parameter and a metric.

    ``records`` are the quantized ones that have the metric, in order of bits; ``full_precision`` is the unquantized
    model, if it was evaluated. Build it with `from_records`.
    """

    metric: str
    records: tuple[StudyRecord, ...]
    full_precision: StudyRecord | None = None

    @classmethod
    def from_records(cls, records: Iterable[StudyRecord], metric: str = "fd_fp") -> ParetoFront:
        """Take the records that have ``metric``."""
        records = list(records)
        full = next((r for r in records if r.method == FULL_PRECISION_METHOD), None)
        measured = [r for r in records if r.method != FULL_PRECISION_METHOD and metric in r.metrics]
        measured.sort(key=lambda r: (r.average_bits, r.metrics[metric].value, r.method))
        return cls(metric=metric, records=tuple(measured), full_precision=full)

    @property
    def log(self) -> bool:
        """True when the metric is compared by ratio and all its values allow that."""
        return self.metric in LOG_METRICS and all(r.metrics[self.metric].value > 0 for r in self.records)

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric, as its values say."""
        return bool(self.records) and self.records[0].metrics[self.metric].higher_is_better

    def method_name(self, record: StudyRecord) -> str:
        """The method, with its granularity when the study has the same method at several."""
        kinds = {r.granularity for r in self.records if r.method == record.method}
        return record.method if len(kinds) < 2 else f"{record.method} ({record.granularity})"

    def of_method(self, name: str) -> tuple[StudyRecord, ...]:
        """Records of one method, in order of bits."""
        return tuple(r for r in self.records if self.method_name(r) == name)

    @property
    def points(self) -> Floats:
        """``[N, 2]`` of the records: bits, and the metric as something to minimise (its logarithm when `log`)."""
        return self._points_of(self.records)

    @property
    def on_front(self) -> NDArray[np.bool_]:
        """``[N]``: which records no other record beats in both coordinates."""
        return non_dominated(self.points)

    @property
    def front(self) -> tuple[StudyRecord, ...]:
        """The records that are on the front, in order of bits."""
        return tuple(r for r, on in zip(self.records, self.on_front, strict=True) if on)

    @property
    def corners(self) -> tuple[Floats, Floats]:
        """Ideal and reference point ``[2]`` of the hypervolume, in the coordinates of `points`.

        The reference is the most bits and the worst metric of the uniform maps (of all records, when there is none):
        the wide and the narrow end of what costs no search. The ideal is the fewest bits and the best metric of all
        records.
        """
        if not self.records:
            raise ConfigError(f"no record has the metric {self.metric!r}, so there is no hypervolume")
        uniform = [r for r in self.records if r.method == "uniform"]
        points = self.points[~np.isnan(self.points).any(axis=1)]
        bounds = self._points_of(uniform) if uniform else points
        return points.min(axis=0), bounds.max(axis=0)

    def hypervolume(self, method: str | None = None) -> float:
        """Share of the box between ideal and reference that a method (default: all) dominates; 0 for an empty box, 1 at
        best."""
        ideal, corner = self.corners
        span = corner - ideal
        if not (span > 0).all():
            return 0.0
        chosen = self.records if method is None else self.of_method(method)
        return hypervolume_2d((self._points_of(chosen) - ideal) / span, (1.0, 1.0))

    def _points_of(self, records: Sequence[StudyRecord]) -> Floats:
        bits = np.array([r.average_bits for r in records], dtype=np.float64)
        value = np.array([r.metrics[self.metric].value for r in records], dtype=np.float64)
        if self.higher_is_better:
            value = -value
        return np.stack([bits, np.log(value) if self.log else value], axis=1)


def records_table(records: Iterable[StudyRecord]) -> list[dict[str, Any]]:
    """One flat row per record: the columns of ``pareto.csv``, the same in every row; None where nothing was measured.

    Sizes are bytes of the whole model, bits are stored bits over all its parameters, ``<metric>_low`` and ``_high``
    bound 95 % of the spread, ``on_front`` says whether no record has both fewer bits and a lower FD to the
    full-precision samples.
    """
    records = list(records)
    extra = sorted({m for r in records for m in r.metrics} - set(METRICS))
    front = {id(r) for r in ParetoFront.from_records(records).front}
    return [_row(r, (*METRICS, *extra), id(r) in front) for r in records]


def _row(record: StudyRecord, metrics: Sequence[str], on_front: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": record.model,
        "method": record.method,
        "granularity": record.granularity,
        "budget": record.budget,
        "quantity": record.quantity,
        "average_bits": _finite(record.average_bits),
        "size_bytes": record.size_bytes,
        "act_bits": _finite(record.act_bits),
    }
    for name in metrics:
        value = record.metrics.get(name)
        row[name] = None if value is None else _finite(value.value)
        row[f"{name}_low"] = None if value is None else _finite(value.low)
        row[f"{name}_high"] = None if value is None else _finite(value.high)
    return row | {
        "n_samples": record.n_samples,
        "seeds": record.seeds,
        "seconds": _finite(record.seconds),
        "predicted_loss": _finite(record.predicted_loss),
        "on_front": on_front,
        "bit_map_digest": record.bit_map_digest,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _points(points: ArrayLike) -> Floats:
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, array.shape[1] if array.ndim == 2 and array.shape[1] else 2)
    if array.ndim != 2:
        raise ConfigError(f"points must be [N, D], got the shape {array.shape}")
    return array
