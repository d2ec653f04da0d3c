"""Measured maps correct the sensitivity table, and the integer program is solved again: does that pay?

The program believes ``error = sum over layers of T_l(b_l)``. With measured errors of many maps at hand the belief can
be corrected: a multiplier for every layer, fitted in the logarithm and held towards 1 by a ridge whose alpha
cross-validation chooses. What remains is the additivity residual; pairs of neighbouring layers whose joint term
explains it significantly become pairwise terms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import PairwiseTerms, solve_alternatives
from mpqsearch.core import FULL_PRECISION, Budget
from mpqsearch.errors import ConfigError
from mpqsearch.methods import allocate, program_of
from mpqsearch.search.ladder import Ladder, spearman
from mpqsearch.search.surrogate import Candidate, Floats, Surrogate

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Alphas among which cross-validation chooses; the last leaves the table as it is."""

FOLDS = 5
MIN_MAPS = 12
"""Fewer maps than this cannot correct dozens of layers."""

SIGNIFICANCE = 0.01
"""Level at which a pairwise term is taken in, shared between all pairs that are tried (Bonferroni)."""


@dataclass(frozen=True, kw_only=True)
class Refit:
    """A corrected table with what it is worth.

    ``multipliers`` ``[L]`` belong to the layers of the profile; those of layers that no map varied are 1.
    ``rms_before`` and ``rms_after`` are root mean squares of the log error of prediction, ``rank_before`` and
    ``rank_after`` rank correlations, both on maps that were left out of the fit. ``residual`` is the mean and the
    standard deviation of ``log(measured) - log(predicted)`` under the plain table after one common factor: the spread
    is what additivity misses.
    """

    multipliers: Floats
    ridge: float
    n_maps: int
    rms_before: float
    rms_after: float
    rank_before: float
    rank_after: float
    residual: tuple[float, float]
    pairs: tuple[tuple[str, str, float, float], ...] = ()

    @property
    def helps(self) -> bool:
        """True when the fit predicts left-out maps better than the plain table."""
        return self.rms_after < self.rms_before

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data; numbers that are not known are None."""
        data = {
            k: getattr(self, k)
            for k in ("ridge", "n_maps", "rms_before", "rms_after", "rank_before", "rank_after", "helps")
        }
        return {
            **{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()},
            "multipliers": self.multipliers.tolist(),
            "residual": list(self.residual),
            "pairs": [{"first": a, "second": b, "alpha": s, "t": t} for a, b, s, t in self.pairs],
        }


def contributions(surrogate: Surrogate, candidates: Sequence[Candidate]) -> Floats:
    """Predicted loss ``[M, L]`` of every layer in every map, under the method's own table; fixed layers count 0."""
    losses = surrogate.losses_of({}, surrogate.method)
    profile = surrogate.profile
    column = {b: j for j, b in enumerate(profile.widths)}
    searched = {la.name for la in surrogate.table if surrogate.policy.fixed_width(la) is None}
    out = np.zeros((len(candidates), len(profile.names)))
    for i, candidate in enumerate(candidates):
        for j, name in enumerate(profile.names):
            if name not in searched:
                continue
            widths = candidate.bit_map.channel_widths(name, profile.channels[j])
            rows = losses[profile.rows(name)]
            picked = [column.get(int(b), -1) for b in widths]
            if FULL_PRECISION in widths:
                continue
            out[i, j] = rows[np.arange(len(widths)), picked].sum()
    return out


def refit(surrogate: Surrogate, candidates: Sequence[Candidate], errors: Sequence[float], *, seed: int = 0) -> Refit:
    """Fit multipliers of layers to measured errors of maps.

    Minimises ``mean((log y - c - log sum_l exp(theta_l) x_l)**2) + ridge * mean(theta**2)`` over ``theta`` and ``c``.

    Raises:
        ConfigError: Fewer than `MIN_MAPS` maps, or an error is not positive.
    """
    y = np.asarray(errors, dtype=np.float64)
    if len(candidates) < MIN_MAPS or len(candidates) != len(y):
        raise ConfigError(
            f"a re-fit needs at least {MIN_MAPS} measured maps with one error each, got {len(candidates)} and {len(y)}"
        )
    if not (y > 0).all():
        raise ConfigError("a re-fit needs positive errors")
    x = contributions(surrogate, candidates)
    live = np.flatnonzero((x > 0).any(axis=0) & (x.max(axis=0) > 1e-9 * x.sum(axis=1).max()))
    kept, logs = x[:, live], np.log(y)
    order = np.random.default_rng(seed).permutation(len(y))
    folds = np.array_split(order, FOLDS)

    def left_out(ridge: float) -> Floats:
        predicted = np.empty(len(y))
        for fold in folds:
            inside = np.setdiff1d(order, fold)
            theta, shift = _fit(kept[inside], logs[inside], ridge)
            predicted[fold] = shift + np.log(kept[fold] @ np.exp(theta))
        return predicted

    by_ridge = {ridge: left_out(ridge) for ridge in RIDGES}
    plain = np.empty(len(y))
    for fold in folds:
        inside = np.setdiff1d(order, fold)
        plain[fold] = np.log(kept[fold].sum(1)) + float(np.mean(logs[inside] - np.log(kept[inside].sum(1))))
    rms = {ridge: _rms(logs - p) for ridge, p in by_ridge.items()}
    ridge = min(rms, key=lambda r: (rms[r], -r))
    theta, _ = _fit(kept, logs, ridge)
    multipliers = np.ones(x.shape[1])
    multipliers[live] = np.exp(theta)
    gap = logs - np.log(kept.sum(1))
    return Refit(
        multipliers=multipliers,
        ridge=ridge,
        n_maps=len(y),
        rms_before=_rms(logs - plain),
        rms_after=rms[ridge],
        rank_before=spearman(plain.tolist(), logs.tolist()),
        rank_after=spearman(by_ridge[ridge].tolist(), logs.tolist()),
        residual=(float(gap.mean()), float(gap.std())),
        pairs=_significant_pairs(surrogate, x * multipliers, y),
    )


def _fit(x: Floats, logs: Floats, ridge: float) -> tuple[Floats, float]:
    """Multipliers' logarithms ``[k]`` and the common shift, by damped Gauss-Newton on a problem of a few dozen
    unknowns."""
    from scipy.optimize import least_squares

    k = x.shape[1]
    weight = math.sqrt(ridge / k)

    def residuals(p: Floats) -> Floats:
        fit = (logs - p[-1] - np.log(x @ np.exp(p[:-1]))) / math.sqrt(len(logs))
        return np.concatenate([fit, weight * p[:-1]])

    def jacobian(p: Floats) -> Floats:
        terms = x * np.exp(p[:-1])
        share = terms / terms.sum(1, keepdims=True)
        top = -np.concatenate([share, np.ones((len(logs), 1))], axis=1) / math.sqrt(len(logs))
        bottom = np.concatenate([weight * np.eye(k), np.zeros((k, 1))], axis=1)
        return np.concatenate([top, bottom])

    start = np.zeros(k + 1)
    start[-1] = float(np.mean(logs - np.log(x.sum(1))))
    found = least_squares(residuals, start, jac=jacobian, method="trf", xtol=1e-6, ftol=1e-6, max_nfev=60)
    theta: Floats = np.clip(found.x[:-1], -6.0, 6.0)
    return theta, float(found.x[-1])


def _significant_pairs(surrogate: Surrogate, x: Floats, y: Floats) -> tuple[tuple[str, str, float, float], ...]:
    """Neighbouring searched layers whose term ``sqrt(x_i x_j)`` explains the residual, with its alpha and t value.

    Alphas are in units of the table: ``y ~ scale * (sum x + alpha * sqrt(x_i x_j))``, each pair tested by itself on
    relative residuals.
    """
    from scipy import stats

    names = surrogate.profile.names
    searched = [j for j, n in enumerate(names) if surrogate.policy.fixed_width(surrogate.table[n]) is None]
    totals = x.sum(1)
    scale = float(np.exp(np.mean(np.log(y) - np.log(totals))))
    residual = y / (scale * totals) - 1
    residual = residual - residual.mean()
    pairs = list(itertools.pairwise(searched))
    threshold = float(stats.t.ppf(1 - SIGNIFICANCE / 2 / max(len(pairs), 1), max(len(y) - 2, 1)))
    found = []
    for a, b in pairs:
        feature = np.sqrt(x[:, a] * x[:, b]) / totals
        feature = feature - feature.mean()
        power = float(feature @ feature)
        if power <= 1e-18:
            continue
        alpha = float(feature @ residual) / power
        error = math.sqrt(float(np.square(residual - alpha * feature).sum()) / max(len(y) - 2, 1) / power)
        if error > 0 and abs(alpha) / error > threshold:
            found.append((names[a], names[b], alpha, alpha / error))
    return tuple(sorted(found, key=lambda r: -abs(r[3])))


def corrected(surrogate: Surrogate, fit: Refit) -> Surrogate:
    """The surrogate with the multipliers, and with the significant pairs as interactions (used at granularity
    ``layer``)."""
    correction = np.repeat(fit.multipliers[:, None], len(surrogate.profile.widths), axis=1)
    if surrogate.correction is not None:
        correction = correction * surrogate.correction
    return replace(surrogate, correction=correction, interactions=_terms(surrogate, fit), _remeasured={})


def _terms(surrogate: Surrogate, fit: Refit) -> PairwiseTerms | None:
    if not fit.pairs:
        return surrogate.interactions
    profile = surrogate.profile
    totals = profile.layer_sum(surrogate.losses_of({}, surrogate.method)) * fit.multipliers[:, None]
    columns = [profile.widths.index(b) for b in sorted(surrogate.policy.widths)]
    searched = [la.name for la in surrogate.table if surrogate.policy.fixed_width(la) is None]
    position = {n: i for i, n in enumerate(searched)}
    value = [
        alpha * np.sqrt(totals[profile.index[a]][columns][:, None] * totals[profile.index[b]][columns][None, :])
        for a, b, alpha, _ in fit.pairs
    ]
    return PairwiseTerms(
        first=np.array([position[a] for a, *_ in fit.pairs]),
        second=np.array([position[b] for _, b, *_ in fit.pairs]),
        value=np.stack(value),
    )


def diverse_candidates(surrogate: Surrogate, budget: Budget, count: int, *, min_distance: int = 3) -> list[Candidate]:
    """The ``count`` best maps by layer that differ from each other in at least ``min_distance`` layers: what a re-fit
    learns most from."""
    method = replace(surrogate.method_of({}), name="ilp-layer", allocator="ilp-layer")
    program = program_of(method, budget, surrogate.table, surrogate.profile, surrogate.policy, surrogate.format)
    plain = surrogate.finished(
        allocate(method, budget, surrogate.table, surrogate.profile, surrogate.policy, surrogate.format)
    )
    maps: list[Candidate] = []
    for answer in solve_alternatives(
        program.problem, count, min_distance=min_distance, gap_tolerance=1e-4, time_limit_s=60.0
    ):
        bit_map = replace(plain.bit_map, weights={**plain.bit_map.weights, **program.weights(answer.choice)})
        maps.append(
            surrogate.measured_map(bit_map, budget, bias_correction=method.bias_correction, status=answer.status)
        )
    return maps


def close_the_loop(
    surrogate: Surrogate,
    ladder: Ladder,
    budgets: Sequence[Budget],
    candidates: Sequence[Candidate],
    *,
    diverse: int = 4,
) -> dict[str, Any]:
    """Re-fit on measured maps, solve again, measure again: plain data that say whether it pays.

    ``candidates`` are maps that the ladder has measured or will (the cache makes the first free); ``diverse`` more are
    added at each budget. The new maps are compared with the plain ones and with the best measured ones on the search
    seeds, and with the plain ones on the report seeds where the evaluator has some.
    """
    known = {c.digest: c for c in candidates}
    for budget in budgets:
        known |= {c.digest: c for c in diverse_candidates(surrogate, budget, diverse)}
    maps: list[Candidate] = list(known.values())
    errors = [ladder.paired_error(c) for c in maps]
    fit = refit(surrogate, maps, errors)
    better = corrected(surrogate, fit)
    reports = getattr(ladder.evaluator, "reference", True) is not None
    rows = []
    for budget in budgets:
        plain, again = surrogate.candidate({}, budget), better.candidate({}, budget)
        room = budget.limit_bits(surrogate.table, surrogate.policy)
        fitting = [e for c, e in zip(maps, errors, strict=True) if c.size_bytes * 8 <= room + 8]
        row: dict[str, Any] = {
            "budget": budget.label(),
            "plain": ladder.paired_error(plain),
            "refitted": ladder.paired_error(again),
            "best_measured": min(fitting, default=None),
            "digest": again.digest,
        }
        if fit.pairs:
            row["refitted_with_pairs"] = ladder.paired_error(
                better.candidate({"granularity": "layer", "pairwise": 1.0}, budget)
            )
        if reports:
            for arm, candidate in (("plain", plain), ("refitted", again)):
                row |= {
                    f"{arm}_{k}": v
                    for k, v in ladder.report(candidate).items()
                    if k in ("fd_fp", "fd_data", "paired_psnr")
                }
        rows.append(row)
    ratios = [r["refitted"] / max(r["plain"], 1e-30) for r in rows]
    return {
        "fit": fit.to_data() | {"layers": list(surrogate.profile.names)},
        "budgets": rows,
        "mean_log_ratio": float(np.mean(np.log(np.maximum(ratios, 1e-30)))),
        "pays": bool(np.mean(np.log(np.maximum(ratios, 1e-30))) < 0),
    }


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
