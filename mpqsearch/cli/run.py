"""``mpqsearch run``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_lines, print_records

if TYPE_CHECKING:
    from mpqsearch.stages import Run


@study_verb("run", positional=True)
def run_study(run: Run, *, as_json: bool) -> None:
    """Run a whole study: layers, profile, allocate, evaluate, report, export. Run it again to continue or to reuse.

    Example: `mpqsearch run studies/quickstart.toml`
    """
    from mpqsearch import stages

    print_records(stages.everything(run), as_json=as_json)
    if not (run.dry_run or as_json):
        print_lines([run.path("report.html")], as_json=False)
