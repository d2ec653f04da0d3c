"""What came out of a study: the best map of every budget beside its control arms, and how far it can be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch.core import BitMap, Budget
from mpqsearch.errors import ConfigError
from mpqsearch.pareto import hypervolume_2d
from mpqsearch.search.arms import ARMS, control_candidates
from mpqsearch.search.ladder import rung_correlations, spearman, spearman_interval
from mpqsearch.search.objective import TARGET, Objective, Point, finished_record
from mpqsearch.search.refine import Refinement, RefineSpec, refine
from mpqsearch.search.surrogate import Candidate

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FLOOR = 1e-4
"""The box of the hypervolume ends at this share of the error of the uniform map of the smallest budget."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """The box in which hypervolumes are shares: bits from the smallest budget to the uniform map of the widest width,
    log errors from that of the uniform map of the smallest budget down to `FLOOR` of it. It depends on no search, so
    that arms and studies can be compared."""

    bits: tuple[float, float]
    log_error: tuple[float, float]

    @classmethod
    def of(cls, objective: Objective) -> Box:
        """The box of an objective's budgets."""
        s = objective.surrogate
        smallest = min(objective.budgets, key=lambda b: objective.uniform(b).average_bits)
        widest = objective.uniform(Budget(quantity="uniform_bits", limit=float(max(s.policy.widths))))
        low = objective.uniform(smallest)
        top = math.log(max(objective.ladder.paired_error(low), 1e-30))
        return cls(bits=(low.average_bits, widest.average_bits), log_error=(top + math.log(FLOOR), top))

    def hypervolume(self, points: Sequence[tuple[float, float]]) -> float:
        """Share of the box that points (average bits, error) dominate, 0..1."""
        if not points:
            return 0.0
        (left, right), (bottom, top) = self.bits, self.log_error
        scaled = [
            ((bits - left) / (right - left), (max(math.log(max(error, 1e-30)), bottom) - bottom) / (top - bottom))
            for bits, error in points
        ]
        return hypervolume_2d([(max(x, 0.0), y) for x, y in scaled], (1.0, 1.0))


def finished_trials(study: Study) -> list[FrozenTrial]:
    """Trials with a record, in the order in which they ended."""
    from optuna.trial import TrialState

    trials = [
        t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if finished_record(t) is not None
    ]
    return sorted(trials, key=lambda t: (t.datetime_complete is None, t.datetime_complete, t.number))


def measured_points(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """Every map that was measured to the end, with the trial that found it first; equal maps once a budget."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in trials:
        record = finished_record(trial)
        assert record is not None
        for point in record["points"]:
            if point["paired"] is not None:
                found.setdefault(
                    (point["budget"], point["digest"]), {**point, "trial": trial.number, "params": dict(trial.params)}
                )
    return list(found.values())


def history(trials: Sequence[FrozenTrial], box: Box) -> list[dict[str, Any]]:
    """One row a trial: forward passes so far (what the trials would have cost without a cache), best value and
    hypervolume so far."""
    rows: list[dict[str, Any]] = []
    front: list[tuple[float, float]] = []
    forwards, best = 0, math.inf
    for trial in trials:
        record = finished_record(trial)
        assert record is not None
        forwards += int(record["forwards"])
        front += [(p["average_bits"], p["paired"]) for p in record["points"] if p["paired"] is not None]
        if len(trial.values) == 1:
            best = min(best, trial.values[0])
        rows.append(
            {
                "trial": trial.number,
                "forwards": forwards,
                "value": trial.values[0] if len(trial.values) == 1 else None,
                "best": best if math.isfinite(best) else None,
                "hypervolume": box.hypervolume(front),
                "pruned": bool(record["pruned"]),
            }
        )
    return rows


def finalists(
    objective: Objective,
    points: Sequence[Mapping[str, Any]],
    budget: Budget,
    count: int,
    more: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The best ``count`` maps of a budget on the search seeds, the plain program's, and ``more`` (points with a
    ``candidate``), best first.

    The *final* seeds judge, which nothing was chosen by before: ``final`` is the mean error there, ``lead`` by how many
    standard errors of the paired difference a map is better than the plain one, ``distance`` that of all samples
    together (`Evaluator.final_errors`). Those that lead by more than one come first, the nearest before the others,
    then the plain map, then the rest: without evidence the plain map is handed out. Without final seeds the order is
    that of the search seeds.
    """
    ladder = objective.ladder
    found = [*winner_candidates(objective, points, budget, count), *(dict(p) for p in more)]
    if not ladder.final:
        return sorted(found, key=lambda f: float(f["paired"]))
    plain = objective.surrogate.candidate({}, budget)
    if all(f["digest"] != plain.digest for f in found):
        own = [p for p in points if p["budget"] == budget.label() and p["digest"] == plain.digest]
        point = Point.of(plain, paired=ladder.paired_error(plain)).to_data()
        found += winner_candidates(objective, own, budget, 1) or [
            {**point, "trial": None, "params": {}, "candidate": plain}
        ]
    measured = {f["digest"]: ladder.final_errors(f["candidate"]) for f in found}
    base = np.array(measured[plain.digest][1])
    for f in found:
        distance, each = measured[f["digest"]]
        f |= {"final": float(np.mean(each)), "lead": _lead(np.array(each) - base), "distance": distance}
    rank = {True: 0, False: 2}
    return sorted(found, key=lambda f: (1 if f["digest"] == plain.digest else rank[f["lead"] > 1], f["distance"]))


def _lead(differences: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Minus the mean over its standard error; 0 where nothing differs, and bounded so that it is plain data."""
    mean = float(differences.mean())
    noise = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
    return 0.0 if mean == 0 else float(np.clip(-mean / max(noise, 1e-30), -1e6, 1e6))


def refine_winners(
    objective: Objective, study: Study, spec: RefineSpec, *, n_finalists: int, first_seed: int
) -> dict[str, Refinement]:
    """The best finalist of every budget refined (`mpqsearch.search.refine`), by the budget's label; nothing without
    rounds."""
    if not spec.rounds:
        return {}
    points = measured_points(finished_trials(study))
    return {
        b.label(): refine(
            objective.surrogate,
            objective.ladder,
            finalists(objective, points, b, n_finalists)[0]["candidate"],
            spec,
            first_seed=first_seed,
        )
        for b in objective.budgets
    }


def refined_points(
    objective: Objective, points: Sequence[Mapping[str, Any]], refinement: Refinement | None
) -> list[dict[str, Any]]:
    """A refined map as a finalist, with the trial and the parameters of the map that it started from; none where
    nothing was better."""
    if refinement is None or not refinement.moved:
        return []
    begun: Mapping[str, Any] = next(
        (p for p in points if p["digest"] == refinement.start.digest), {"trial": None, "params": {}}
    )
    candidate = refinement.candidate
    point = Point.of(candidate, paired=objective.ladder.paired_error(candidate)).to_data()
    return [{**point, "trial": begun["trial"], "params": begun["params"], "candidate": candidate, "refined": True}]


def winner_candidates(
    objective: Objective, points: Sequence[Mapping[str, Any]], budget: Budget, top: int
) -> list[dict[str, Any]]:
    """The ``top`` measured maps that fit ``budget`` with the least paired error, rebuilt from their points of the
    space.

    Raises `ConfigError` when a rebuilt map is not the one that was measured: the code or the profile has changed
    meanwhile.
    """
    room = (
        budget.limit_bits(objective.surrogate.table, objective.surrogate.policy) / 8 + 1
        if budget.quantity != "bops"
        else math.inf
    )
    fitting = [
        p for p in points if p["budget"] == budget.label() or (TARGET in p["params"] and p["size_bytes"] <= room)
    ]
    chosen = []
    for point in sorted(fitting, key=lambda p: (p["paired"], p["trial"]))[:top]:
        params = dict(point["params"])
        target = params.pop(TARGET, None)
        own = budget if target is None else Budget(quantity="uniform_bits", limit=target)
        candidate = objective.surrogate.candidate(objective.space.theta(params), own)
        if candidate.digest != point["digest"]:
            raise ConfigError(
                f"trial {point['trial']} measured the map {point['digest'][:10]}, its parameters now give "
                f"{candidate.digest[:10]}: mpqsearch or "
                "the profile has changed since. Search again with --overwrite."
            )
        chosen.append({**point, "candidate": candidate})
    return chosen


def summarize(
    objective: Objective,
    study: Study,
    *,
    top: int = 2,
    repeats: int = 3,
    n_finalists: int = 4,
    reported_arms: Sequence[str] = ("uniform", "plain"),
    start: BitMap | None = None,
    refined: Mapping[str, Refinement] | None = None,
) -> dict[str, Any]:
    """All results of a study as plain data, measuring what is still missing: arms, and winners on report seeds when
    there are any.

    ``n_finalists`` maps a budget, the best on the search seeds, the plain program's and the ``refined`` one (by the
    budget's label) run again on the final seeds, and what is better than the plain one beyond doubt is handed out
    (`finalists`); ``top`` of them are measured on the report seeds, which only say what the map is worth (the winner's
    curse), and whether it is worse than the uniform or the plain map there. ``start``: the map that the search started
    from, as one more row at every budget that it fits.
    """
    trials = finished_trials(study)
    points = measured_points(trials)
    box = Box.of(objective)
    reports = getattr(objective.ladder.evaluator, "reference", True) is not None
    budgets = []
    arm_points: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for budget in objective.budgets:
        arms = control_candidates(objective.surrogate, budget, repeats=repeats)
        rows = []
        for arm, candidates in arms.items():
            errors = [objective.ladder.paired_error(c) for c in candidates]
            arm_points[arm].append(
                (candidates[0].average_bits, float(np.exp(np.mean(np.log(np.maximum(errors, 1e-30))))))
            )
            report = objective.ladder.report(candidates[0]) if reports and arm in reported_arms else {}
            rows.append(_row(arm, candidates[0], errors, report))
        if start is not None:
            own = objective.surrogate.measured_map(
                start, budget, bias_correction=objective.surrogate.method.bias_correction
            )
            if _fits(objective, own, budget):
                report = objective.ladder.report(own) if reports else {}
                rows.append(_row("start", own, [objective.ladder.paired_error(own)], report))
        refinement = (refined or {}).get(budget.label())
        more = refined_points(objective, points, refinement)
        found = finalists(objective, points, budget, n_finalists if objective.ladder.final else top, more)
        for place, point in enumerate(found[:top]):
            report = objective.ladder.report(point["candidate"]) if reports else {}
            rows.append(
                _row(
                    "search" if place == 0 else f"search, place {place + 1}",
                    point["candidate"],
                    [point["paired"]],
                    report,
                )
                | {k: point.get(k) for k in ("trial", "params", "final", "lead", "distance")}
                | {"refined": bool(point.get("refined"))}
            )
        entry = {"budget": budget.label(), "rows": rows, **_verdict(rows)}
        if refinement is not None:
            entry["refinement"] = {"forwards": refinement.forwards, "rounds": list(refinement.rounds)}
        budgets.append(entry)
        points += [{k: v for k, v in p.items() if k != "candidate"} for p in more]
    searched = [(p["average_bits"], p["paired"]) for p in points]
    predicted = [(p["predicted"], p["paired"], p["budget"]) for p in points]
    return {
        "error": objective.ladder.evaluator.error_name,
        "trials": len(trials),
        "pruned": sum(bool((finished_record(t) or {})["pruned"]) for t in trials),
        "forwards": sum(int((finished_record(t) or {})["forwards"]) for t in trials),
        "new_forwards": sum(int((finished_record(t) or {})["new_forwards"]) for t in trials),
        "distinct_maps": len({p["digest"] for p in points}),
        "best_value": min((t.values[0] for t in trials if len(t.values) == 1), default=None),
        "budgets": budgets,
        "hypervolume": {
            "search": box.hypervolume(searched),
            **{arm: box.hypervolume(v) for arm, v in arm_points.items()},
        },
        "history": history(trials, box),
        "correlations": rung_correlations([*points, *_reported(budgets)]),
        "predicted_vs_measured": _calibration(predicted),
        "importances": importances(study),
        "trials_table": [
            {"number": t.number, "value": t.values[0] if len(t.values) == 1 else t.values[1], "params": dict(t.params)}
            for t in trials
        ],
        "points": [{k: v for k, v in p.items() if k != "params"} for p in points],
    }


def importances(study: Study) -> dict[str, float]:
    """Share of each parameter in the variance of the value among the better trials (PED-ANOVA); empty with too few
    trials."""
    import warnings

    import optuna

    trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(trials) < 10 or len(study.directions) > 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(study)
        except (ValueError, RuntimeError):  # too few distinct values to tell
            return {}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def trials_as_lines(study: Study) -> str:
    """The whole study as JSON lines: the archive, which needs no storage of Optuna's to be read."""
    lines = []
    for t in study.get_trials(deepcopy=False):
        data = {
            "number": t.number,
            "state": t.state.name,
            "values": t.values,
            "params": t.params,
            "attributes": {k: v for k, v in t.user_attrs.items() if not k.startswith("_")},
            "started": None if t.datetime_start is None else t.datetime_start.isoformat(),
            "ended": None if t.datetime_complete is None else t.datetime_complete.isoformat(),
        }
        lines.append(json.dumps(data, default=str))
    return "".join(line + "\n" for line in lines)


def _row(arm: str, candidate: Candidate, errors: Sequence[float], report: Mapping[str, float]) -> dict[str, Any]:
    return {
        "arm": arm,
        "average_bits": candidate.average_bits,
        "size_bytes": candidate.size_bytes,
        "bit_map": candidate.bit_map.digest,
        "digest": candidate.digest,
        "bias_correction": candidate.bias_correction,
        "predicted": candidate.predicted,
        "paired": float(np.exp(np.mean(np.log(np.maximum(errors, 1e-30))))),
        "paired_each": [float(e) for e in errors],
        **report,
    }


def _fits(objective: Objective, candidate: Candidate, budget: Budget) -> bool:
    """Whether a map from elsewhere keeps a budget of size."""
    s = objective.surrogate
    return budget.quantity != "bops" and 8 * candidate.size_bytes <= budget.limit_bits(s.table, s.policy) + 7


def _verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The winner against its arms, on the search seeds and on fresh ones."""
    by = {r["arm"]: r for r in rows}
    winner = by.get("search")
    if winner is None:
        return {"winner": None, "worse_than_uniform": False, "worse_than_plain": False}
    verdict: dict[str, Any] = {"winner": winner["digest"], **{k: winner[k] for k in ("trial", "params", "refined")}}
    worse = {}
    for arm in ("uniform", "plain"):
        verdict[f"ratio_to_{arm}"] = winner["paired"] / max(by[arm]["paired"], 1e-30)
        worse[arm] = verdict[f"ratio_to_{arm}"] > 1
        if "error" in winner and "error" in by[arm]:
            fresh = winner["error"] / max(by[arm]["error"], 1e-30)
            verdict[f"fresh_ratio_to_{arm}"] = fresh
            worse[arm] = worse[arm] or fresh > 1
        if "fd_fp" in winner and "fd_fp" in by[arm]:
            verdict[f"fd_ratio_to_{arm}"] = winner["fd_fp"] / max(by[arm]["fd_fp"], 1e-30)
    if "start" in by:
        verdict["ratio_to_start"] = winner["paired"] / max(by["start"]["paired"], 1e-30)
        verdict["worse_than_start"] = verdict["ratio_to_start"] > 1
    return verdict | {"worse_than_uniform": worse["uniform"], "worse_than_plain": worse["plain"]}


def _reported(budgets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Maps with Fréchet distances, for the correlations of the upper rungs."""
    keys = ("predicted", "paired", "fd_fp", "fd_data")
    return [{"budget": b["budget"], **{k: r.get(k) for k in keys}} for b in budgets for r in b["rows"] if "fd_fp" in r]


def _calibration(points: Sequence[tuple[float, float, str]]) -> list[dict[str, Any]]:
    """Rank correlation of predicted with measured error at each budget, with its interval."""
    rows = []
    for budget in sorted({b for *_, b in points}):
        predicted = [p for p, _, b in points if b == budget]
        measured = [m for _, m, b in points if b == budget]
        value = spearman(predicted, measured)
        if not math.isnan(value):
            low, high = spearman_interval(predicted, measured)
            rows.append(
                {
                    "budget": budget,
                    "maps": len(predicted),
                    "spearman": value,
                    "low": low,
                    "high": high,
                    "weak": value < 0.7,
                }
            )
    return rows
