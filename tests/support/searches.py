"""An outer search of a model made of numbers."""

from __future__ import annotations

from pathlib import Path

from mpqsearch.core import Budget, Policy, QuantFormat
from mpqsearch.methods import MethodSpec
from mpqsearch.search.measure import Measurements, ValueCache
from mpqsearch.search.objective import Objective
from mpqsearch.search.space import parse_space
from mpqsearch.search.surrogate import Surrogate
from tests.support.synthetic import SyntheticEvaluator
from tests.support.tiny import tiny_profile, tiny_table

SPACE = {
    "exponent": [0.5, 2.0],
    "low_bits": [-1.0, 1.0],
    "depth": [-2.0, 2.0],
    "role_linear": [0.25, 4.0],
    "granularity": ["layer", "channel"],
}
BUDGETS = (Budget.parse("uniform:2.5"), Budget.parse("uniform:3.5"))


def surrogate(allocator: str = "ilp-layer", **more: object) -> Surrogate:
    table = tiny_table(n_layers=14, channels=12, fan_in=40)
    # Sensitivities as they are: the synthetic model answers by them.
    method = MethodSpec(
        name="plain", allocator=allocator, loss="probe", scheme="auto", bias_correction=True, shrinkage=0.0
    )
    return Surrogate(
        table=table, profile=tiny_profile(table), policy=Policy(), format=QuantFormat(), method=method, **more
    )


def objective(space: dict[str, object] | None = None, folder: Path | None = None, pause_s: float = 0.0) -> Objective:
    """An objective over a synthetic model: eight search seeds, two at a time, values kept in ``folder``."""
    s = surrogate()
    evaluator = SyntheticEvaluator(table=s.table, profile=s.profile, pause_s=pause_s)
    measurements = Measurements(evaluator=evaluator, seeds=tuple(range(8)), chunk=2, cache=ValueCache(folder))
    return Objective(
        surrogate=s, space=parse_space(SPACE if space is None else space), measurements=measurements, budgets=BUDGETS
    )
