from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from mpqsearch.search.objective import Objective
from mpqsearch.search.surrogate import Surrogate
from tests.support.searches import objective, surrogate
from tests.unit.search import servers


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of the tests' own; skips where there can be none."""
    if reason := servers.missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(servers.postgres())


@pytest.fixture
def make_surrogate() -> Callable[..., Surrogate]:
    return surrogate


@pytest.fixture
def make_objective() -> Callable[..., Objective]:
    return objective
