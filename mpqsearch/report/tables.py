"""Tables: the Pareto points as CSV and JSON, and which differences are ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import atomic_write, read_json, write_json
from mpqsearch.core import MetricValue, StudyRecord
from mpqsearch.errors import ArtifactError, NumericsError
from mpqsearch.pareto import FULL_PRECISION_METHOD, METRICS, ParetoFront, records_table

if TYPE_CHECKING:
    import pandas as pd


def pareto_frame(records: Iterable[StudyRecord]) -> pd.DataFrame:
    """`mpqsearch.pareto.records_table` as a data frame; what was not measured is NaN."""
    import pandas as pd  # half a second that figures do not need

    return pd.DataFrame(records_table(records))


def write_pareto_csv(path: Path, records: Iterable[StudyRecord]) -> None:
    """Write ``pareto.csv`` atomically: one row per record, numbers in full precision, empty cells where nothing was
    measured."""
    with atomic_write(path) as handle:
        handle.write(pareto_frame(records).to_csv(index=False, lineterminator="\n").encode())


def write_pareto_json(path: Path, records: Iterable[StudyRecord], inputs: Mapping[str, str] | None = None) -> None:
    """Write ``pareto.json`` atomically: the whole records, the flat rows, and fronts and hypervolumes per metric."""
    every = list(records)
    data = {"records": [r.to_data() for r in every], "rows": records_table(every), "fronts": _fronts(every)}
    write_json(path, "mpqsearch/pareto", _without_nan(data), inputs or {})


def read_pareto_json(path: Path) -> list[StudyRecord]:
    """The records of a ``pareto.json``. Raises `ArtifactError` when it is damaged."""
    data = read_json(path, "mpqsearch/pareto").data
    try:
        return [StudyRecord.from_data(_with_nan(r)) for r in data["records"]]
    except (KeyError, TypeError, AttributeError, NumericsError) as error:
        raise ArtifactError(f"{path} holds no whole records: {type(error).__name__} {error}. Make it again.") from error


def tied(first: MetricValue, second: MetricValue) -> bool:
    """True when the 95 % intervals overlap, so that the difference is not called a win. Unknown bounds tie with
    everything.

    With common noise the difference of two methods spreads less than each value does, so this errs on the side of ties.
    """
    return not (first.high < second.low or second.high < first.low)


def standings(records: Sequence[StudyRecord], metric: str) -> list[str]:
    """For each record ``"best"``, ``"tie"`` (not told from the best of its budget by the intervals) or ``""``.

    Records of one budget share its label. The full-precision record takes no part.
    """
    groups: dict[str, list[StudyRecord]] = {}
    for record in records:
        if record.method != FULL_PRECISION_METHOD and metric in record.metrics:
            groups.setdefault(record.budget, []).append(record)
    best = {budget: min(group, key=lambda r: _to_minimise(r.metrics[metric])) for budget, group in groups.items()}
    return [_standing(r, best.get(r.budget), metric) for r in records]


def _standing(record: StudyRecord, best: StudyRecord | None, metric: str) -> str:
    if best is None or record.method == FULL_PRECISION_METHOD or metric not in record.metrics:
        return ""
    if record is best:
        return "best"
    return "tie" if tied(record.metrics[metric], best.metrics[metric]) else ""


def _to_minimise(value: MetricValue) -> float:
    return -value.value if value.higher_is_better else value.value


def _fronts(records: Sequence[StudyRecord]) -> dict[str, Any]:
    fronts: dict[str, Any] = {}
    for metric in dict.fromkeys([*METRICS, *sorted({m for r in records for m in r.metrics})]):
        front = ParetoFront.from_records(records, metric)
        if not front.records:
            continue
        ideal, corner = front.corners
        fronts[metric] = {
            "log": front.log,
            "ideal": ideal.tolist(),
            "reference": corner.tolist(),
            "hypervolume": {"all": front.hypervolume(), **{m: front.hypervolume(m) for m in front.methods}},
            "front": [
                {"method": r.method, "budget": r.budget, "bit_map_digest": r.bit_map_digest} for r in front.front
            ],
        }
    return fronts


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _with_nan(data: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ("average_bits", "act_bits", "seconds", "predicted_loss")
    record = {k: float("nan") if v is None and k in numbers else v for k, v in data.items()}
    record["metrics"] = {
        name: {k: float("nan") if v is None and k in ("low", "high") else v for k, v in metric.items()}
        for name, metric in data["metrics"].items()
    }
    return record
