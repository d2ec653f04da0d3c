from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpqsearch.core import Budget, Policy, QuantFormat
from mpqsearch.methods import MethodSpec
from mpqsearch.search.cache import EvaluationCache
from mpqsearch.search.ladder import Ladder
from mpqsearch.search.objective import Objective, Pruning
from mpqsearch.search.space import parse_space
from mpqsearch.search.surrogate import Surrogate
from tests.support.synthetic import SyntheticEvaluator
from tests.support.tiny import tiny_profile, tiny_table
from tests.unit.search import servers

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
    method = MethodSpec(name="plain", allocator=allocator, loss="gain", scheme="auto", bias_correction=True)
    return Surrogate(
        table=table, profile=tiny_profile(table), policy=Policy(), format=QuantFormat(), method=method, **more
    )


@pytest.fixture(scope="session")
def urls() -> Iterator[Callable[[str], str]]:
    """The URL of a kind of storage, whose server is started when it is first asked for; skips where there can be
    none."""
    with contextlib.ExitStack() as stack:
        started: dict[str, str] = {}

        def url(kind: str) -> str:
            if reason := servers.missing(kind):
                pytest.skip(reason)
            base = kind.removeprefix(servers.JOURNAL)  # both kinds in a database share its server
            if base not in started:
                started[base] = stack.enter_context(servers.server(base))
            return kind.removesuffix(base) + started[base]

        yield url


@pytest.fixture
def make_surrogate() -> Callable[..., Surrogate]:
    return surrogate


@pytest.fixture
def make_objective() -> Callable[..., Objective]:
    def make(
        space: dict[str, object] | None = None,
        folder: Path | None = None,
        pause_s: float = 0.0,
        pruning: Pruning = "none",
    ) -> Objective:
        s = surrogate()
        evaluator = SyntheticEvaluator(table=s.table, profile=s.profile, pause_s=pause_s)
        ladder = Ladder(evaluator=evaluator, seeds=tuple(range(8)), chunk=2, cache=EvaluationCache(folder))
        return Objective(
            surrogate=s,
            space=parse_space(SPACE if space is None else space),
            ladder=ladder,
            budgets=BUDGETS,
            pruning=pruning,
        )

    return make
