"""``mpqsearch report``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_lines

if TYPE_CHECKING:
    from mpqsearch.stages import Run


@study_verb()
def report(run: Run, *, as_json: bool) -> None:
    """Draw the front, tables, heat maps and sample grids into one report.html.

    Example: `mpqsearch report -c studies/quickstart.toml`
    """
    from mpqsearch import stages

    table = stages.layers(run)
    run.require_sampler("a report of samples (report)")
    measured = stages.profile(run, table)
    if measured is None:
        return
    records = stages.evaluate(run, table, measured)
    records += stages.trained(run, table, measured, records)
    print_lines([stages.report(run, table, measured, records)], as_json=as_json)
