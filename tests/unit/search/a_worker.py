"""A worker process of the tests: python a_worker.py STORAGE FOLDER INDEX TRIALS PAUSE_S [random|tpe]. No model, no
torch."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from mpqsearch.search.cache import EvaluationCache
from mpqsearch.search.ladder import Ladder
from mpqsearch.search.objective import Objective
from mpqsearch.search.space import parse_space
from mpqsearch.search.storage import open_storage
from mpqsearch.search.study import Plan, open_study, work
from tests.support.synthetic import SyntheticEvaluator
from tests.unit.search.conftest import BUDGETS, surrogate

STUDY = "shared"


def objective_in(folder: Path, pause_s: float) -> Objective:
    s = surrogate()
    ladder = Ladder(
        evaluator=SyntheticEvaluator(table=s.table, profile=s.profile, pause_s=pause_s),
        seeds=(0, 1),
        chunk=2,
        cache=EvaluationCache(folder / "cache"),
    )
    space = parse_space({"exponent": [0.5, 2.0], "low_bits": [-1.0, 1.0], "depth": [-2.0, 2.0]})
    return Objective(surrogate=s, space=space, ladder=ladder, budgets=BUDGETS, use_output=False, pruning="none")


def plan_of(o: Objective, trials: int, sampler: str = "random") -> Plan:
    return Plan(name=STUDY, trials=trials, sampler=sampler, pruner="none", context=o.context)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    where, folder, index, trials, pause_s, *rest = sys.argv[1:]
    o = objective_in(Path(folder), float(pause_s))
    plan = plan_of(o, int(trials), *rest)
    study = open_study(plan, open_storage(where, workers=4))
    with (Path(folder) / "measured.txt").open("a") as log:

        def measured(trial: object) -> None:
            log.write(f"{index} {trial.number} {' '.join(o.ladder.evaluator.measured)}\n")
            log.flush()
            o.ladder.evaluator.measured.clear()

        work(
            study,
            plan,
            o.front,
            worker=int(index),
            heartbeat_s=0.5,
            grace_s=6,
            after_trial=measured,
        )
