"""``mpqsearch allocate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mpqsearch.cli.app import BudgetOption, study_verb
from mpqsearch.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from mpqsearch.stages import Run


@study_verb(settings=lambda own: [f"allocate.budgets={json.dumps(own['budget'])}"] if own["budget"] else [])
def allocate(run: Run, *, as_json: bool, budget: BudgetOption = None) -> None:  # noqa: ARG001  (read through the settings)
    """Choose widths for every method of the study at every budget; needs a profile (measures one when there is none).

    Example: `mpqsearch allocate --model fmnist-unet --budget 3bit --budget 450kB`
    """
    from mpqsearch import stages

    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is None:
        return
    made = stages.allocations(run, table, measured)
    if as_json:
        print_json([data for _, _, _, data in made])
        return
    rows = []
    for method, limit, bit_map, data in made:
        solved = data["result"] or {}
        rows.append(
            [
                limit.label(),
                method.name,
                bit_map.granularity,
                f"{data['size_bits'] / table.n_parameters:.4f}",
                -(-data["size_bits"] // 8),
                f"{data['predicted_loss']:.4g}",
                solved.get("status", "-"),
                f"{solved['gap']:.1e}" if "gap" in solved else "-",
                "yes" if data["within_budget"] else "over",
            ]
        )
    print_table(
        "allocations", ["budget", "method", "by", "bits a parameter", "bytes", "predicted loss", "status", "gap", "in budget"], rows
    )
