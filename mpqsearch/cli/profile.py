"""``mpqsearch profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_json, print_profile

if TYPE_CHECKING:
    from mpqsearch.stages import Run


@study_verb()
def profile(run: Run, *, as_json: bool) -> None:
    """Measure kurtosis, exact output errors and gains of every channel at every width.

    Example: `mpqsearch profile --model fmnist-unet --set calibration.samples=16`
    """
    from mpqsearch import stages

    stages.start(run)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is None:
        return
    if as_json:
        print_json(measured.header())
    else:
        print_profile(table, measured)
