"""What came out of a study: the chosen map of every budget beside its control arms, and how far it can be trusted."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError
from mpqsearch.ranks import spearman, spearman_interval
from mpqsearch.search.objective import SAMPLES, Objective, Point, points_of
from mpqsearch.search.study import WORKER, finished_trials
from mpqsearch.search.surrogate import Candidate
from mpqsearch.untrusted import cells

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

TINY = 1e-30


def measured_points(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """Every map that was measured on all search seeds, with the trial that found it first; equal maps once a
    budget."""
    points: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in trials:
        for point in points_of(trial):
            if point["error"] is not None:
                key = (point["budget"], point["digest"])
                points.setdefault(key, {**point, "trial": trial.number, "params": dict(trial.params)})
    return list(points.values())


def top_k(objective: Objective, points: Sequence[Mapping[str, Any]], budget: Budget, k: int) -> list[dict[str, Any]]:
    """The best ``k`` maps of a budget on the search seeds and the plain program's, best first; each with its
    ``candidate``.

    The *final* seeds judge, by which nothing was chosen before: ``lead`` says by how many standard errors of the paired
    difference a map is better than the plain one, ``distance`` is that of all samples together. Maps that lead by more
    than one come first, the nearest before the others, then the plain map, then the rest: without evidence the plain
    map is handed out. Without final seeds the search seeds decide.
    """
    measurements = objective.measurements
    here = sorted((p for p in points if p["budget"] == budget.label()), key=lambda p: (p["error"], p["trial"]))
    plain = objective.surrogate.candidate({}, budget)
    entries = [{**p, "candidate": rebuilt(objective, p, budget)} for p in here[:k]]
    if all(e["digest"] != plain.digest for e in entries):
        point = {**asdict(Point.of(plain, measurements.error(plain))), "trial": None, "params": {}}
        entries.append({**next((p for p in here if p["digest"] == plain.digest), point), "candidate": plain})
    if not measurements.final:
        return sorted(entries, key=lambda e: float(e["error"]))
    base = np.array(measurements.final_errors(plain)[1])
    for entry in entries:
        distance, errors = measurements.final_errors(entry["candidate"])
        entry |= {"final": float(np.mean(errors)), "lead": _lead(np.array(errors) - base), "distance": distance}

    def order(entry: Mapping[str, Any]) -> tuple[int, float]:
        rank = 1 if entry["digest"] == plain.digest else 0 if entry["lead"] > 1 else 2
        return rank, float(entry["distance"])

    return sorted(entries, key=order)


def rebuilt(objective: Objective, point: Mapping[str, Any], budget: Budget) -> Candidate:
    """The map of a measured point, solved again. Raises `ConfigError` when it is not the one that was measured: the
    code or the profile has changed meanwhile."""
    candidate = objective.surrogate.candidate(objective.space.theta(point["params"]), budget)
    if candidate.digest != point["digest"]:
        raise ConfigError(
            f"trial {point['trial']} measured the map {point['digest'][:10]}, its parameters now give "
            f"{candidate.digest[:10]}: mpqsearch or the profile has changed since. Search again with --overwrite."
        )
    return candidate


def summarize(objective: Objective, study: Study, *, k: int = 4) -> tuple[dict[str, Any], dict[str, Candidate]]:
    """All results of a study as plain data, and the chosen map of every budget by its label.

    Measures what is still missing: the top ``k`` maps on the final seeds, and the chosen, the plain and the uniform map
    on the report seeds, which only say what they are worth (the winner's curse).
    """
    trials = finished_trials(study)
    points = measured_points(trials)
    chosen: dict[str, Candidate] = {}
    budgets = []
    for budget in objective.budgets:
        best = top_k(objective, points, budget, k)[0]
        chosen[budget.label()] = best["candidate"]
        rows = [
            _row(objective, "uniform", objective.surrogate.uniform(budget)),
            _row(objective, "plain", objective.surrogate.candidate({}, budget)),
            _row(objective, "search", best["candidate"])
            | {key: best[key] for key in ("trial", "params", "final", "lead", "distance") if key in best},
        ]
        budgets.append({"budget": budget.label(), "rows": rows, **_verdict(rows)})
    return {
        "error": objective.measurements.evaluator.error_name,
        "trials": len(trials),
        "pruned": sum(t.state.name == "PRUNED" for t in trials),
        "forwards": sum(_forwards(objective, t) for t in trials),
        "distinct_maps": len({p["digest"] for p in points}),
        "budgets": budgets,
        "predicted_vs_measured": prediction_quality(points),
        "importances": importances(study),
        "trials_table": [{"number": t.number, "value": t.value, "params": dict(t.params)} for t in trials],
        "points": [{key: v for key, v in p.items() if key != "params"} for p in points],
    }, chosen


def importances(study: Study) -> dict[str, float]:
    """Share of each parameter in the variance of the value among the better trials (PED-ANOVA); empty with too few
    trials."""
    import optuna

    if len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))) < 10:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except (RuntimeError, ValueError):  # no two trials differ
        return {}


def prediction_quality(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rank correlation of predicted loss with measured error at each budget, with its 95 % bootstrap interval."""
    rows = []
    for budget in sorted({str(p["budget"]) for p in points}):
        here = [p for p in points if p["budget"] == budget]
        predicted, measured = ([float(p[key]) for p in here] for key in ("predicted", "error"))
        value = spearman(predicted, measured)
        if not math.isnan(value):
            low, high = spearman_interval(predicted, measured)
            rows.append(
                {"budget": budget, "maps": len(here), "spearman": value, "low": low, "high": high, "weak": value < 0.7}
            )
    return rows


def trials_csv(study: Study) -> str:
    """The whole study as a table: an archive that needs no storage of Optuna's to be read."""
    trials = study.get_trials(deepcopy=False)
    names = sorted({n for t in trials for n in t.params})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["number", "state", "value", "worker", "started", "ended", *names])
    for t in trials:
        times = (x.isoformat() if x is not None else "" for x in (t.datetime_start, t.datetime_complete))
        params = cells({n: t.params.get(n, "") for n in names}).values()
        writer.writerow([t.number, t.state.name, t.value, t.user_attrs.get(WORKER, ""), *times, *params])
    return buffer.getvalue()


def _forwards(objective: Objective, trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get(SAMPLES, 0)) * objective.measurements.evaluator.forwards_per_sample


def _row(objective: Objective, arm: str, candidate: Candidate) -> dict[str, Any]:
    """A map at a budget: its sizes, its error, and what it is worth on the report seeds."""
    report = objective.measurements.report(candidate)
    return {
        "arm": arm,
        "average_bits": candidate.average_bits,
        "size_bytes": candidate.size_bytes,
        "bit_map": candidate.bit_map.digest,
        "bias_correction": candidate.bias_correction,
        "predicted": candidate.predicted,
        "error": max(objective.measurements.error(candidate), TINY),
        **{("fresh_error" if key == "error" else key): v for key, v in report.items()},
    }


def _verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The chosen map against uniform and plain, on the search seeds and on fresh ones."""
    by = {r["arm"]: r for r in rows}
    winner = by["search"]
    verdict: dict[str, Any] = {}
    for arm in ("uniform", "plain"):
        ratios = {
            f"{prefix}ratio_to_{arm}": winner[key] / max(by[arm][key], TINY)
            for prefix, key in (("", "error"), ("fresh_", "fresh_error"), ("fd_", "fd_fp"))
            if key in winner
        }
        worse = max(ratios[f"ratio_to_{arm}"], ratios.get(f"fresh_ratio_to_{arm}", 0.0)) > 1
        verdict |= ratios | {f"worse_than_{arm}": worse}
    return verdict


def _lead(differences: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Minus the mean over its standard error; 0 where nothing differs, and bounded so that it is plain data."""
    mean = float(differences.mean())
    noise = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
    return 0.0 if mean == 0 else float(np.clip(-mean / max(noise, TINY), -1e6, 1e6))
