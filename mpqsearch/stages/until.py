"""The smallest map whose measured quality passes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, MetricValue, StudyRecord, uniform_map
from mpqsearch.core import size_bits as size_of
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, UnknownNameError
from mpqsearch.methods import MethodSpec
from mpqsearch.progress import bar_of
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run
from mpqsearch.stages.discovering import layers
from mpqsearch.stages.evaluating import measured_record
from mpqsearch.stages.preflight import check_sampling
from mpqsearch.stages.references import full_record

if TYPE_CHECKING:
    from mpqsearch.metrics import Measure

MOST = 8
"""Maps that are evaluated at most."""

CLOSE = 1.01
"""The answer is known when the smallest map that passes is larger than one that fails by at most this factor."""

COLUMNS = ("budget", "size_bytes", "metric", "value", "low", "high", "passes")


@dataclass(frozen=True)
class Quality:
    """A quality to reach, such as ``fd_fp<=0.1`` or ``lpips<=0.1``: a metric of ``evaluate`` and its bound."""

    metric: str
    at_least: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> Quality:
        """Read ``"fd_fp<=0.1"``. Raises `ConfigError`."""
        match = re.fullmatch(r"\s*([a-z_][a-z_0-9]*)\s*(<=|>=)\s*(-?[0-9.]+(?:e[+-]?[0-9]+)?)\s*", text.lower())
        try:
            return cls(match[1], match[2] == ">=", float(match[3]))  # type: ignore[index]
        except (TypeError, ValueError):
            raise ConfigError(
                f"cannot read the quality {text!r}. Write a metric, <= or >=, and a number: 'fd_fp<=0.1', "
                "'paired_psnr>=40'."
            ) from None

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.at_least else '<='}{self.bound:g}"

    def of(self, record: StudyRecord) -> MetricValue:
        """The metric of a record. Raises `UnknownNameError` when it was not measured."""
        if self.metric not in record.metrics:  # a class recognised where none is asked for
            raise UnknownNameError("metric", self.metric, record.metrics, "(--until)")
        return record.metrics[self.metric]

    def check(self, measures: Mapping[str, Measure]) -> None:
        """Raise `ConfigError` for a metric that the study does not measure or that is better in the other direction,
        and for a bound that it cannot reach, by what there is to know of metrics before anything is measured."""
        if self.metric not in measures:
            hint = "(--until) Scores are named in evaluate.scorers; distances to data need evaluate.reference."
            raise UnknownNameError("metric", self.metric, measures, hint)
        higher, (low, high) = measures[self.metric]
        if higher != self.at_least:
            better, sign = ("higher", ">=") if higher else ("lower", "<=")
            raise ConfigError(f"{self.metric} is better when it is {better}: write --until '{self.metric}{sign}...'")
        if self.bound > high if higher else self.bound < low:
            raise ConfigError(f"full precision itself does not reach {self}: {self.metric} lies in {low:g} to {high:g}")

    def passes(self, record: StudyRecord) -> bool:
        """Whether the worse end of the interval keeps to the bound."""
        return self.missing(record) <= 0

    def missing(self, record: StudyRecord) -> float:
        """By how much the worse end of the interval misses the bound, in its logarithm; in decibels as they are."""
        value = self.of(record)
        worse = value.low if self.at_least else value.high
        if self.metric.endswith("psnr") or min(worse, self.bound) <= 0:
            return self.bound - worse if self.at_least else worse - self.bound
        return (math.log(self.bound) - math.log(worse)) * (1 if self.at_least else -1)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One map that was measured."""

    budget: Budget
    bit_map: BitMap
    data: dict[str, Any]
    record: StudyRecord

    def row(self, quality: Quality) -> dict[str, Any]:
        """As a row of the table."""
        value, size = quality.of(self.record), self.record.size_bytes
        verdict = "yes" if quality.passes(self.record) else "no"
        values = (self.budget.label(), size, quality.metric, value.value, value.low, value.high, verdict)
        return dict(zip(COLUMNS, values, strict=True))


def smallest(run: Run, quality: Quality, method: MethodSpec, largest: Budget | None) -> tuple[Tried, list[Tried]]:
    """The smallest map of a method whose measured quality passes with its interval, and all that was measured, in that
    order.

    All maps are measured with the seeds of ``evaluate``, so their noise is common and quality rises with size almost
    everywhere. Sizes are bracketed between the smallest attainable and ``largest`` (default: the uniform map of the
    largest searched width), by false position on the logarithm of the size, with bisection where an end is not
    measured, until `CLOSE`, or after `MOST` maps. What a run folder holds is reused, so a stopped search goes on.

    Raises `InfeasibleBudgetError` when the largest map does not pass.
    """
    search = _Bracket(run=run, quality=quality, method=method)
    return search.run_from(largest), search.tried


def require_reachable(run: Run, quality: Quality) -> None:
    """Raise what `smallest` would otherwise find after a profile: `ConfigError` for a metric that is not measured, and
    for a quality that full precision itself does not reach on the samples of ``evaluate``, which are drawn for it."""
    if run.apart:
        raise ConfigError('--until looks for one size of the whole model, budget.combine = "max" is for each part')
    check_sampling(run, "a quality (--until)")
    if run.dry_run:
        return
    quality.check(_measures(run))
    layers(run)
    full = full_record(run)
    if quality.metric in full.metrics and not quality.passes(full):
        value = quality.of(full)
        raise ConfigError(
            f"full precision itself does not reach {quality}: it has {value.value:.4g} ({value.low:.4g} to "
            f"{value.high:.4g} on {value.n_samples} samples). Ask for less, or evaluate more samples."
        )


def _measures(run: Run) -> dict[str, Measure]:
    """What the study measures of a map."""
    from mpqsearch.metrics import measures

    if run.picture is None:
        return measures(None)
    return measures(run.extractor, run.scorers, data=run.data_reference is not None)


@dataclass(kw_only=True)
class _Bracket:
    """The sizes between which the answer lies, in bits a parameter, and what was measured."""

    run: Run
    quality: Quality
    method: MethodSpec

    def __post_init__(self) -> None:
        self.tried: list[Tried] = []

    def run_from(self, largest: Budget | None) -> Tried:
        """The smallest map that passes; see `smallest`."""
        table, policy = self.run.table, self.run.config.policy
        low, high = (
            size_of(table, uniform_map(table, policy, w)) / table.n_parameters
            for w in (min(policy.widths), max(policy.widths))
        )
        best = self._measure(largest or _bits(high))
        if not self.quality.passes(best.record):
            value = self.quality.of(best.record)
            raise InfeasibleBudgetError(
                f"{self.quality} is not reached: the map of {best.record.size_bytes} bytes has {value.value:.4g} "
                f"({value.low:.4g} to {value.high:.4g}). Give more bytes or wider widths, ask for less, or evaluate "
                "more samples, which narrows the interval."
            )
        high = best.record.average_bits
        fails: Tried | None = None
        while high > CLOSE * low and len({t.bit_map.digest for t in self.tried}) < MOST:  # the same map costs nothing
            made = self._measure(_bits(self._between(low, high, fails, best)))
            if made.bit_map.digest == best.bit_map.digest:
                break
            if self.quality.passes(made.record):
                best, high = made, min(made.record.average_bits, 0.999 * high)
            else:
                fails, low = made, max(made.budget.limit, 1.001 * low)  # its map may use less than it is allowed
        return best

    def _between(self, low: float, high: float, fails: Tried | None, best: Tried) -> float:
        """The size that is tried next: where the line through both ends crosses the bound, at least a tenth inside."""
        share = 0.5
        if fails is not None:
            above, below = self.quality.missing(fails.record), -self.quality.missing(best.record)
            share = min(max(above / (above + below), 0.1), 0.9) if above + below > 0 else 0.5
        return float(low * (high / low) ** share)

    def _measure(self, budget: Budget) -> Tried:
        bit_map, data = allocation(self.run, self.method, budget)
        with bar_of(f"evaluate {self.method.name} at {budget.label()}", self.run.config.evaluate.samples) as bar:
            record = measured_record(self.run, self.method, budget, bit_map, data, bar.update)
        made = Tried(budget=budget, bit_map=bit_map, data=data, record=record)
        self.tried.append(made)
        value = self.quality.of(record)
        verdict = "passes" if self.quality.passes(record) else "does not pass"
        self.run.say(
            f"until {self.quality}: {record.size_bytes} bytes have {value.value:.4g} ({value.low:.4g} to "
            f"{value.high:.4g}), which {verdict}"
        )
        rows = [t.row(self.quality) for t in self.tried]
        path = self.run.path("until", f"{self.method.name}-{self.quality.metric}.csv")
        artifacts.write_text(path, artifacts.csv_text(COLUMNS, rows))
        return made


def _bits(value: float) -> Budget:
    """A budget in bits a parameter, to four decimals, so that its name is short."""
    return Budget(quantity="average_bits", limit=round(value, 4))
