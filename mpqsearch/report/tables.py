"""Tables: the Pareto points as CSV and JSON, and which differences are ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from mpqsearch.artifacts import read_json, write_json, write_text
from mpqsearch.core import MetricValue, StudyRecord
from mpqsearch.pareto import FULL_PRECISION_METHOD, records_table
from mpqsearch.untrusted import build, cells


def write_pareto_csv(path: Path, records: Iterable[StudyRecord]) -> None:
    """Write ``pareto.csv`` atomically: one row per record, numbers in full precision, empty cells where nothing was
    measured."""
    import pandas as pd  # half a second that figures do not need

    write_text(path, pd.DataFrame(map(cells, records_table(records))).to_csv(index=False, lineterminator="\n"))


def write_pareto_json(
    path: Path, records: Iterable[StudyRecord], inputs: Mapping[str, str] | None = None, files: Iterable[Path] = ()
) -> None:
    """Write ``pareto.json`` atomically: the whole records, with the labels of all values, and the digests of
    ``files``."""
    data = _without_nan({"records": [r.to_data() for r in records]})
    write_json(path, "mpqsearch/pareto", data, inputs or {}, files)


def read_pareto_json(path: Path) -> list[StudyRecord]:
    """The records of a ``pareto.json``. Raises `ArtifactError` when it is damaged."""
    data = read_json(path, "mpqsearch/pareto").data
    return list(build(_Records, _with_nan(data), str(path))["records"])


class _Records(TypedDict):
    records: tuple[StudyRecord, ...]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _with_nan(value: Any) -> Any:
    """The reverse of `_without_nan`: no field of a record may be null."""
    if isinstance(value, Mapping):
        return {k: _with_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_nan(v) for v in value]
    return float("nan") if value is None else value


def tied(first: MetricValue, second: MetricValue) -> bool:
    """True when the 95 % intervals overlap, so that the difference is not called a win. Unknown bounds tie with
    everything.

    With common noise the difference of two methods spreads less than each value does, so this errs on the side of ties.
    """
    return not (first.high < second.low or second.high < first.low)


def standings(records: Sequence[StudyRecord], metric: str) -> list[str]:
    """For each record ``"best"``, ``"tie"`` (not told from the best of its budget by the intervals) or ``""``.

    Records of one budget share its label; one that is alone there is not called the best. The full-precision record
    takes no part.
    """
    budgets: dict[str, list[StudyRecord]] = {}
    for record in records:
        if record.method != FULL_PRECISION_METHOD and metric in record.metrics:
            budgets.setdefault(record.budget, []).append(record)
    marks: dict[int, str] = {}
    for group in (group for group in budgets.values() if len(group) > 1):
        best = min(group, key=lambda r: _to_minimise(r.metrics[metric]))
        ties = {id(r): "tie" for r in group if tied(r.metrics[metric], best.metrics[metric])}
        marks |= ties | {id(best): "best"}
    return [marks.get(id(r), "") for r in records]


def _to_minimise(value: MetricValue) -> float:
    return -value.value if value.higher_is_better else value.value
