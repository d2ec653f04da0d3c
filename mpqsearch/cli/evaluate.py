"""``mpqsearch evaluate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mpqsearch.cli.app import BudgetOption, study_verb
from mpqsearch.cli.printing import print_records

if TYPE_CHECKING:
    from mpqsearch.stages import Run


@study_verb(settings=lambda own: [f"allocate.budgets={json.dumps(own['budget'])}"] if own["budget"] else [])
def evaluate(run: Run, *, as_json: bool, budget: BudgetOption = None) -> None:  # noqa: ARG001  (read through the settings)
    """Sample from every allocated map and measure it against full precision and data.

    Example: `mpqsearch evaluate -c studies/quickstart.toml --set evaluate.samples=64`
    """
    from mpqsearch import stages

    stages.start(run)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is not None:
        print_records(stages.evaluate(run, table, measured), as_json=as_json)
