"""What is left of a score is said with the interval of the paired differences."""

from __future__ import annotations

from mpqsearch.core import MetricValue
from mpqsearch.stages.card import _recovery


def value(mean: float, half: float, *, higher: bool) -> MetricValue:
    return MetricValue(
        name="m", value=mean, n_samples=8, seeds="0..7", extractor="", reference="", low=mean - half, high=mean + half,
        spread="bootstrap", higher_is_better=higher,
    )  # fmt: skip


def test_recovery_is_what_was_not_lost() -> None:
    full = value(32.0, 2.0, higher=True)
    assert _recovery(full, value(0.8, 0.16, higher=False)) == "97.5% (97.0% to 98.0%)"
    assert _recovery(full, value(-0.32, 0.32, higher=False)) == "101.0% (100.0% to 102.0%)"
    assert _recovery(None, value(0.8, 0.1, higher=False)) == _recovery(full, None) == ""
    assert _recovery(value(3.0, 0.1, higher=False), value(0.8, 0.1, higher=False)) == "", "a distance has none"
