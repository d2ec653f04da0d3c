"""All stages in one."""

from __future__ import annotations

import itertools
from dataclasses import replace

from mpqsearch.core import Budget, MetricValue, StudyRecord
from mpqsearch.errors import ArtifactError
from mpqsearch.specs.distill import TRAINED
from mpqsearch.stages.base import Run, start
from mpqsearch.stages.delivering import delivered_records
from mpqsearch.stages.distilling import distill
from mpqsearch.stages.evaluating import evaluate
from mpqsearch.stages.exporting import export, require_good
from mpqsearch.stages.preflight import require_targets
from mpqsearch.stages.profiling import prepare
from mpqsearch.stages.reporting import rank_correlations, report
from mpqsearch.stages.searching import check_search, search


def everything(run: Run) -> list[StudyRecord]:
    """All stages, from the model to the report and the exports."""
    if run.config.search.trials:
        check_search(run)
    require_targets(run)
    start(run)
    if not prepare(run, "a whole study, with samples of every map (run)", run.config.export.targets):
        for line in _would_follow(run):
            run.say(line)
        return []
    if run.config.search.trials:
        search(run)
    records = evaluate(run)
    if not run.dry_run:
        for row in rank_correlations(run.table, run.profile):
            run.say(
                f"profile: rank correlation of {row['predictor']!r} with one layer at a time, {row['bits']} bits: "
                f"{row['spearman']:.2f}"
            )
    records += trained(run, records)
    c = run.config
    budgets = () if c.export.budget else c.allocate.parsed()
    try:
        exports = export(run, records, budgets=budgets)
    finally:  # the report shows what was stored; whatever an export runs into, the results are drawn
        records += [] if run.dry_run else delivered_records(run)
        report(run, records)
    require_good(exports)
    return records


def _would_follow(run: Run) -> list[str]:
    """What a dry run says of the stages whose inputs are not there yet."""
    c = run.config
    methods, budgets = ", ".join(m.name for m in c.methods), ", ".join(b.label() for b in c.allocate.parsed())
    lines = [f"search: would try {c.search.trials} maps"] if c.search.trials else []
    lines.append(f"allocate: would choose widths at {budgets} by {methods}")
    lines.append(f"evaluate: would draw {c.evaluate.samples} samples at full precision, and as many of each map")
    if c.distill.methods:
        lines.append(f"distill: would train {', '.join(c.distill.methods)} for {c.distill.steps} steps")
    lines.append(f"export: would write {', '.join(c.export.targets)}")
    return [*lines, f"report: would draw {run.path('report.html')}"]


def trained(run: Run, records: list[StudyRecord]) -> list[StudyRecord]:
    """Train the maps that the study names; a record ``<method>+trd`` for each, beside that of the untrained map."""
    c = run.config.distill
    found = []
    budgets = [Budget.parse(text) for text in c.budgets] or list(run.config.allocate.parsed())
    for name, budget in itertools.product(c.methods, budgets):
        try:
            data = distill(run, name, budget)
        except ArtifactError as error:
            if not run.reads_only:
                raise
            run.say(f"{name} at {budget.label()}, trained, is left out: {error}")
            continue
        before = next((r for r in records if r.method == name and r.budget == budget.label()), None)
        if data and before is not None:
            metrics = {k: MetricValue(**v) for k, v in data["after"].items()}
            found.append(replace(before, method=f"{name}{TRAINED}", metrics=metrics))
    return found
