from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpqsearch.errors import ArtifactError
from mpqsearch.search.cache import FILE, EvaluationCache, Measured

KEYS = [c * 64 for c in "abcdef"]


def never() -> Measured:
    raise AssertionError("it is known")


def of(*values: float) -> Callable[[], Measured]:
    return lambda: Measured(values=values, forwards=3)


def test_values_come_back_to_the_bit_in_memory_and_from_the_file(tmp_path: Path) -> None:
    first = EvaluationCache(tmp_path / "made" / "when needed")
    by_name = Measured(values={"fd_fp": 0.1 + 0.2, "paired_psnr": 31.7}, forwards=7)
    assert first.measure(KEYS[0], of(math.pi, 5e-324)) == (Measured(values=(math.pi, 5e-324), forwards=3), True)
    assert first.measure(KEYS[1], lambda: by_name) == (by_name, True)
    for cache in (first, EvaluationCache(first.folder)):
        assert cache.measure(KEYS[0], never) == (Measured(values=(math.pi, 5e-324), forwards=3), False)
        assert cache.measure(KEYS[1], never) == (by_name, False)
        assert cache.hits == 2
    assert (first.misses, cache.misses) == (2, 0)
    memory = EvaluationCache()
    assert [memory.measure(KEYS[0], make)[1] for make in (of(1.0), never)] == [True, False]


def test_what_is_torn_is_measured_again_and_spoils_nothing_after_it(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path)
    for i in (0, 1, 2):
        cache.measure(KEYS[i], of(float(i)))
    file = tmp_path / FILE
    first, second, third = file.read_bytes().splitlines(keepends=True)
    # The first line was damaged, the last one torn by a power cut.
    file.write_bytes(first[:9] + b"\0" + first[10:] + second + third[:-20])
    again = EvaluationCache(tmp_path)
    assert [again.measure(KEYS[i], of(float(i))) for i in (0, 1, 2, 3)] == [
        (Measured(values=(float(i),), forwards=3), i != 1) for i in (0, 1, 2, 3)
    ]
    third = EvaluationCache(tmp_path)
    assert [third.measure(KEYS[i], never)[0].values for i in (0, 1, 2, 3)] == [(0.0,), (1.0,), (2.0,), (3.0,)]


def test_those_that_want_the_same_value_measure_it_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def slow() -> Measured:
        calls.append(1)
        time.sleep(0.2)
        return Measured(values=(1.5,), forwards=3)

    # Each cache has a memory of its own, as each process has; what they share is the file and its locks.
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: EvaluationCache(tmp_path).measure(KEYS[0], slow), range(4)))
    assert len(calls) == 1
    assert [m.values for m, _ in found] == [(1.5,)] * 4
    assert sum(made for _, made in found) == 1


def test_those_that_want_different_values_do_not_wait_for_each_other(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=20)

    def meets(value: float) -> Measured:
        together.wait()
        return Measured(values=(value,), forwards=1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: EvaluationCache(tmp_path).measure(KEYS[i], lambda: meets(float(i))), range(4)))
    assert [m.values[0] for m, _ in found] == [0.0, 1.0, 2.0, 3.0]
    late = EvaluationCache(tmp_path)
    assert [late.measure(KEYS[i], never)[0].values for i in range(4)] == [(0.0,), (1.0,), (2.0,), (3.0,)]


def test_a_measurement_that_fails_leaves_nothing_and_holds_nothing(tmp_path: Path) -> None:
    cache, other = EvaluationCache(tmp_path), EvaluationCache(tmp_path)
    with pytest.raises(AssertionError):
        cache.measure(KEYS[0], never)
    assert other.measure(KEYS[0], of(1.0))[1]
    assert cache.measure(KEYS[0], never)[0].values == (1.0,)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way of a folder")
    with pytest.raises(ArtifactError, match=rf"cannot write .*cache/{FILE}"):
        EvaluationCache(tmp_path / "cache").measure(KEYS[0], of(1.0))
    if Path("/dev/full").exists():
        full = tmp_path / "full"
        full.mkdir()
        (full / FILE).symlink_to("/dev/full")
        with pytest.raises(ArtifactError, match="the disk is full: .* was not written"):
            EvaluationCache(full).measure(KEYS[0], of(1.0))
