"""Measured selection: of a handful of maps that differ in kind, the one whose samples are nearest to full precision.

The outer search in small: the same measurement of the same candidates, by successive halving and without a model of
what comes next. A prediction chooses the widths inside each candidate, a measurement chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpqsearch.errors import NumericsError
from mpqsearch.ranks import spearman
from mpqsearch.search.surrogate import Candidate

FIRST = 4
"""Samples of the first round; every further round doubles them."""

CLEAR = 2.0
"""Standard errors by which a candidate must be behind to be given up."""

CLOSE = 1.0
"""Standard errors within which the best candidate does not displace a safer one."""

APART = "could not be told apart"

Measure = Callable[[Candidate, Sequence[int]], Sequence[float]]
"""Errors of the samples of some seeds."""


@dataclass(kw_only=True)
class Rival:
    """A candidate in the race, with its errors so far, seed by seed; ``failed``: what was wrong with its samples."""

    label: str
    candidate: Candidate
    errors: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def mean(self) -> float:
        """Mean error; infinite for what failed."""
        return math.inf if self.failed or not self.errors else float(np.mean(self.errors))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """``rivals`` safest first, with all that was measured; ``chosen`` is handed out, ``close`` are the others that
    could not be told apart from it."""

    rivals: Sequence[Rival]
    chosen: Rival
    close: Sequence[Rival]

    @property
    def spearman(self) -> float:
        """Rank correlation of predicted and measured losses over the candidates; NaN with fewer than three."""
        known = [r for r in self.rivals if math.isfinite(r.mean) and math.isfinite(r.candidate.predicted)]
        return spearman([r.candidate.predicted for r in known], [r.mean for r in known])

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data: one row a candidate."""
        value = self.spearman
        return {
            "spearman": None if math.isnan(value) else round(value, 3),
            "samples": len(self.chosen.errors),
            "rows": [self._row(r) for r in self.rivals],
        }

    def _row(self, rival: Rival) -> dict[str, Any]:
        known = math.isfinite(rival.mean)
        predicted = rival.candidate.predicted
        verdict = "chosen" if rival is self.chosen else APART if rival in self.close else rival.failed or "worse"
        return {
            "candidate": rival.label,
            "size_bytes": rival.candidate.size_bytes,
            "predicted": predicted if math.isfinite(predicted) else None,
            "error": rival.mean if known else None,
            "ratio": math.exp(log_ratio(rival, self.chosen)[0]) if known and self.chosen.mean > 0 else None,
            "samples": len(rival.errors),
            "verdict": verdict,
        }


def select(rivals: Sequence[Rival], measure: Measure, seeds: Sequence[int]) -> Selection:
    """Measure the rivals, safest first, on more and more seeds, until one is clear of all others.

    A round keeps at most half of them, and none that is more than `CLEAR` standard errors behind the best. In the end
    the best is handed out; among those that are within `CLOSE` standard errors of it, the safest. A rival whose samples
    are not finite is out. Raises `NumericsError` when all are.
    """
    alive, done, end = list(rivals), 0, min(FIRST, len(seeds))
    while alive and done < len(seeds):
        for rival in alive:
            _extend(rival, measure, seeds[done:end])
        alive = [r for r in alive if not r.failed]
        if alive:
            alive = _kept(alive, room=max(2, (len(alive) + 1) // 2))
        done, end = end, min(2 * end, len(seeds))
        if len(alive) == 1:
            break
    if not alive:
        raise NumericsError(f"no candidate has finite samples: {rivals[0].failed}")
    best = min(alive, key=lambda r: r.mean)
    close = [r for r in alive if _behind(r, best) <= CLOSE]
    chosen = close[0]
    return Selection(rivals=rivals, chosen=chosen, close=[r for r in close if r is not chosen])


def log_ratio(a: Rival, b: Rival) -> tuple[float, float]:
    """Logarithm of the ratio of two mean errors and its standard error (delta method), over the seeds that both have;
    NaN for fewer than two."""
    n = min(len(a.errors), len(b.errors))
    x, y = (np.array(r.errors[:n]) for r in (a, b))
    if n and x.mean() == y.mean():
        return 0.0, 0.0 if n > 1 else math.nan
    value = math.log(max(float(x.mean()), 1e-300)) - math.log(max(float(y.mean()), 1e-300))
    if n < 2:
        return value, math.nan
    parts = x / max(x.mean(), 1e-300) - y / max(y.mean(), 1e-300)
    return value, float(parts.std(ddof=1)) / math.sqrt(n)


def _extend(rival: Rival, measure: Measure, seeds: Sequence[int]) -> None:
    try:
        rival.errors += measure(rival.candidate, seeds) if seeds else []
    except NumericsError as error:
        rival.failed = str(error)


def _kept(alive: Sequence[Rival], room: int) -> list[Rival]:
    """The best ``room`` that are not clearly behind, in their order."""
    best = min(alive, key=lambda r: r.mean)
    left = sorted((r for r in alive if _behind(r, best) <= CLEAR), key=lambda r: r.mean)[:room]
    return [r for r in alive if r in left]


def _behind(rival: Rival, best: Rival) -> float:
    """Standard errors by which a rival is behind the best; 0 where that is not known."""
    value, error = log_ratio(rival, best)
    if rival is best or value <= 0 or math.isnan(error):
        return 0.0
    return value / error if error else math.inf
