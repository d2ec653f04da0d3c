"""How well the predicted loss orders what the samples show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpqsearch.core import StudyRecord
from mpqsearch.pareto import FULL_PRECISION_METHOD
from mpqsearch.ranks import spearman, spearman_interval
from mpqsearch.report.labels import metric_text

METRICS = ("paired_mse", "fd_fp", "paired_psnr")
"""What predictions are held against: the first that three points or more have."""


def prediction_note(records: Sequence[StudyRecord]) -> str:
    """The rank correlation of predicted losses and measurements over the quantized points, and its mean inside the
    budgets; empty for fewer than three points. 1 always means the right order."""
    found = ((metric, _points(records, metric)) for metric in METRICS)
    metric, points = next(((m, p) for m, p in found if len(p) >= 3), ("", []))
    if not points:
        return ""
    predicted = np.array([r.predicted_loss for r in points])
    sign = -1 if points[0].metrics[metric].higher_is_better else 1
    worse = np.array([sign * r.metrics[metric].value for r in points])
    budgets = np.array([r.budget for r in points])
    low, high = spearman_interval(predicted, worse)
    inside = [spearman(predicted[budgets == b], worse[budgets == b]) for b in dict.fromkeys(budgets.tolist())]
    known = [value for value in inside if np.isfinite(value)]
    harder = "Points of different budgets are ordered by their bits alone"
    within = f" {harder}; within one budget it is {np.mean(known):.2f} on average." if known else f" {harder}."
    return (
        f"Predicted loss and {metric_text(metric).title} have a Spearman rank correlation of "
        f"{spearman(predicted, worse):.2f} ({low:.2f} to {high:.2f}) over {len(points)} points.{within}"
    )


def _points(records: Sequence[StudyRecord], metric: str) -> list[StudyRecord]:
    """The quantized records that have the metric and a finite prediction."""
    quantized = (r for r in records if r.method != FULL_PRECISION_METHOD)
    return [r for r in quantized if metric in r.metrics and np.isfinite(r.predicted_loss)]
