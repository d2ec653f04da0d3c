"""All stages in one."""

from __future__ import annotations

from mpqsearch.core import StudyRecord
from mpqsearch.stages.base import Run, start
from mpqsearch.stages.discovering import layers
from mpqsearch.stages.evaluating import evaluate
from mpqsearch.stages.exporting import export
from mpqsearch.stages.profiling import profile
from mpqsearch.stages.reporting import rank_correlations, report
from mpqsearch.stages.searching import search


def everything(run: Run) -> list[StudyRecord]:
    """All stages, from the model to the report and the exports."""
    start(run)
    table = layers(run)
    measured = profile(run, table)
    if measured is None:
        run.say("allocate, evaluate, report, export: would follow")
        return []
    if run.config.search.trials:
        search(run, table, measured)
    records = evaluate(run, table, measured)
    if not run.dry_run:
        for row in rank_correlations(table, measured):
            run.say(
                f"profile: rank correlation of {row['predictor']!r} with one layer at a time, {row['bits']} bits: {row['spearman']:.2f}"
            )
    report(run, table, measured, records)
    export(run, table, measured, records)
    return records
