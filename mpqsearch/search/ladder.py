"""The ladder of measurements, cheap rungs first, with common random numbers, and its cache: no map is measured twice.

==== ================================================= =========================
rung what                                              samples
==== ================================================= =========================
0    predicted loss                                    none
1    error of the denoiser's output                    calibration inputs
2    paired error of final samples, in chunks of seeds search seeds
     the same for the best few maps of each budget     final seeds
     slopes and steps of the closing refinement        fresh seeds
3    Fréchet distance to full precision                report seeds
4    Fréchet distance to data                          report seeds
==== ================================================= =========================

Every map sees the same inputs, noise and classes. Search, final and report seeds are disjoint: the final seeds choose
among what the search seeds proposed, and what was chosen is judged on noise that neither saw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.search.cache import EvaluationCache, Measured
from mpqsearch.search.surrogate import Candidate


class Evaluator(Protocol):
    """Measures maps of one model. ``identity`` is a digest of all that its values depend on besides the map."""

    @property
    def identity(self) -> str:
        """Digest of model, sampler, calibration inputs and their seeds."""
        ...

    @property
    def error_name(self) -> str:
        """What `sample_errors` measures, for axes and tables."""
        ...

    def output_error(self, candidate: Candidate) -> Measured:
        """Mean squared error of the denoiser's output on the calibration inputs."""
        ...

    def sample_errors(self, candidate: Candidate, seeds: Sequence[int]) -> Measured:
        """Error of the final sample of each seed against full precision."""
        ...

    def final_errors(self, candidate: Candidate, seeds: Sequence[int]) -> Measured:
        """A distance to full precision of all samples together, by which finalists are ordered, and after it what
        `sample_errors` gives."""
        ...

    def slopes(self, candidate: Candidate, seeds: Sequence[int], batch: int) -> Slopes:
        """Slope of the squared error of final samples for every channel at every width, ``batch`` seeds at a time."""
        ...

    def report(self, candidate: Candidate) -> Measured:
        """``error`` (the mean of `sample_errors`), ``fd_fp``, ``paired_psnr``, and ``fd_data`` where there are data
        statistics, with ``<name>_low`` and ``_high``, on the report seeds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Slopes:
    """What to first order becomes of the squared error of final samples (mean over pixels) when one channel takes
    another width.

    ``rows`` ``[P, C, W]``: half the change, for each of P batches of seeds, C channels and W widths of the profile; 0
    for channels that are not searched. ``error`` is the squared error itself, ``forwards`` what they cost, a backward
    pass counted as two forward passes.
    """

    rows: np.ndarray[Any, np.dtype[np.float64]]
    error: float
    forwards: int


@dataclass(kw_only=True)
class Ladder:
    """The rungs for one study. ``seeds`` are the search seeds, measured ``chunk`` at a time; ``final`` the final seeds
    (none: no finals).

    ``spent`` counts forward passes that were really made through this object, ``asked`` those that would have been
    without a cache: the cost by which arms are compared.
    """

    evaluator: Evaluator
    seeds: tuple[int, ...]
    chunk: int = 4
    final: tuple[int, ...] = ()
    cache: EvaluationCache = field(default_factory=EvaluationCache)
    spent: int = 0
    asked: int = 0

    def __post_init__(self) -> None:
        if len(self.seeds) < 2 or not 1 <= self.chunk <= len(self.seeds):
            raise ConfigError(
                f"a search needs at least 2 seeds and a chunk of 1..{len(self.seeds)}, got chunk={self.chunk}"
            )
        if set(self.seeds) & set(self.final):
            raise ConfigError("the final seeds of a search must not be among its search seeds: they would choose twice")

    @property
    def chunks(self) -> int:
        """Number of chunks of search seeds."""
        return -(-len(self.seeds) // self.chunk)

    def output_error(self, candidate: Candidate) -> float:
        """Rung 1."""
        found = self._measure(candidate, "output", [], lambda: self.evaluator.output_error(candidate))
        return float(_row(found)[0])

    def chunk_errors(self, candidate: Candidate, index: int) -> tuple[float, ...]:
        """Rung 2, one chunk: the error of each of its seeds."""
        part = self.seeds[index * self.chunk : (index + 1) * self.chunk]
        found = self._measure(candidate, "samples", list(part), lambda: self.evaluator.sample_errors(candidate, part))
        return _row(found)

    def errors(self, candidate: Candidate) -> tuple[float, ...]:
        """Rung 2, all chunks."""
        return tuple(v for i in range(self.chunks) for v in self.chunk_errors(candidate, i))

    def paired_error(self, candidate: Candidate) -> float:
        """Rung 2: mean over the search seeds."""
        return float(np.mean(self.errors(candidate)))

    def errors_on(self, candidate: Candidate, seeds: Sequence[int]) -> tuple[float, ...]:
        """Rung 2 on any seeds."""
        found = self._measure(candidate, "samples", list(seeds), lambda: self.evaluator.sample_errors(candidate, seeds))
        return _row(found)

    def final_errors(self, candidate: Candidate) -> tuple[float, tuple[float, ...]]:
        """On the final seeds: the distance of rung 3, and the errors of rung 2."""
        found = self._measure(
            candidate, "final", list(self.final), lambda: self.evaluator.final_errors(candidate, self.final)
        )
        distance, *errors = _row(found)
        return distance, tuple(errors)

    def slopes(self, candidate: Candidate, seeds: Sequence[int], batch: int) -> Slopes:
        """Slopes at a map; they are large and used once, so they are not kept."""
        found = self.evaluator.slopes(candidate, seeds, batch)
        if not (np.isfinite(found.rows).all() and math.isfinite(found.error)):
            raise NumericsError(
                f"the slopes at the map {candidate.digest[:10]} at {candidate.budget.label()} are not finite"
            )
        self.asked += found.forwards
        self.spent += found.forwards
        return found

    def report(self, candidate: Candidate) -> dict[str, float]:
        """Rungs 3 and 4."""
        found = self._measure(candidate, "report", [], lambda: self.evaluator.report(candidate))
        assert isinstance(found.values, Mapping)
        return dict(found.values)

    def _measure(self, candidate: Candidate, rung: str, seeds: list[int], make: Callable[[], Measured]) -> Measured:
        # quicker than `digest_of`, many times a trial
        of_all = f"{self.evaluator.identity} {candidate.digest} {rung} {seeds}"
        key = hashlib.sha256(of_all.encode()).hexdigest()

        def checked() -> Measured:
            value = make()
            numbers = list(value.values.values()) if isinstance(value.values, Mapping) else value.values
            # Infinity would count as a finished trial and poison the sampler's model: it ends the trial as failed
            # instead.
            if not all(math.isfinite(v) for v in numbers):
                raise NumericsError(
                    f"the {rung} errors of the map {candidate.digest[:10]} at {candidate.budget.label()} are not finite"
                )
            return value

        found, made = self.cache.measure(key, checked)
        self.asked += found.forwards
        self.spent += found.forwards if made else 0
        return found


def _row(found: Measured) -> tuple[float, ...]:
    assert isinstance(found.values, tuple)
    return found.values


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; NaN with fewer than three points or without spread. Ties get their mean rank."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def spearman_interval(
    a: Sequence[float], b: Sequence[float], *, draws: int = 500, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of `spearman` over pairs."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    values: list[float] = []
    for _ in range(draws):
        pick = rng.integers(0, len(x), len(x))
        values.append(spearman(x[pick].tolist(), y[pick].tolist()))
    known = np.array([v for v in values if not math.isnan(v)])
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def rung_correlations(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rank correlation of every rung with the next ones over measured maps.

    ``points`` hold any of ``predicted``, ``output``, ``paired``, ``fd_fp``, ``fd_data`` and a ``budget``: correlations
    are within a budget, averaged, since between budgets everything correlates.
    """
    names = ("predicted", "output", "paired", "fd_fp", "fd_data")
    rows: list[dict[str, Any]] = []
    budgets = sorted({str(p["budget"]) for p in points})
    for i, cheap in enumerate(names):
        for dear in names[i + 1 :]:
            per: list[float] = []
            count = 0
            for budget in budgets:
                having = [
                    p for p in points if p["budget"] == budget and p.get(cheap) is not None and p.get(dear) is not None
                ]
                value = spearman([float(p[cheap]) for p in having], [float(p[dear]) for p in having])
                if not math.isnan(value):
                    per.append(value)
                    count += len(having)
            if per:
                rows.append(
                    {
                        "cheap": cheap,
                        "dear": dear,
                        "spearman": round(float(np.mean(per)), 3),
                        "maps": count,
                        "budgets": len(per),
                    }
                )
    return rows


def _ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    ranks: np.ndarray[Any, np.dtype[np.float64]] = mean_rank[inverse]
    return ranks
