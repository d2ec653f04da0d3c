"""A worker process of the tests, without a model: STORAGE FOLDER INDEX TRIALS PAUSE_S HEARTBEAT_S."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import Plan, open_study, work
from tests.support.searches import objective

STUDY = "shared"
SPACE = {"exponent": [0.5, 2.0], "low_bits": [-1.0, 1.0], "depth": [-2.0, 2.0]}


def main() -> None:
    where, folder, index, trials, pause_s, heartbeat_s = sys.argv[1:]
    o = objective(SPACE, Path(folder) / "cache", float(pause_s))
    plan = Plan(name=STUDY, trials=int(trials), sampler="random", pruner="none", context=o.context)
    storage = open_storage(where, workers=4, heartbeat_s=int(heartbeat_s))
    study = open_study(plan, storage)

    def ended(_study: Any, trial: Any) -> None:
        with (Path(folder) / f"ended-{index}.txt").open("a") as log:
            log.write(f"{trial.number}\n")

    work(study, plan, o, storage=storage, worker=int(index), callbacks=[ended])
