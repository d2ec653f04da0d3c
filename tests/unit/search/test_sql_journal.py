from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from mpqsearch.errors import ArtifactError
from mpqsearch.search.sql_journal import JOURNAL, NEXT, SqlJournalBackend
from mpqsearch.search.storage import _with_driver, open_storage
from tests.unit.search import servers

ROOT = Path(__file__).parents[3]
ATTR, STATE = 8, 6  # operations of Optuna's

WRITER = """
import sys
from mpqsearch.search.storage import open_storage
backend = open_storage(sys.argv[1])._backend
for i in range(10**6):
    backend.append_logs([{"op_code": 8, "worker_id": "1", "trial_id": 10**6, "i": i}])
"""


@pytest.fixture(params=["postgresql", "mysql"])
def url(request: pytest.FixtureRequest, urls: Callable[[str], str]) -> Iterator[str]:
    """A database without the tables."""
    url = urls(servers.JOURNAL + request.param)
    drop_tables(url)
    yield url
    drop_tables(url)


def drop_tables(url: str) -> None:
    run(url, f"DROP TABLE IF EXISTS {JOURNAL}", f"DROP TABLE IF EXISTS {NEXT}")


def run(url: str, *statements: str) -> Any:
    """What the last statement finds, on a connection of its own."""
    engine = sa.create_engine(_with_driver(url.removeprefix(servers.JOURNAL)))
    with contextlib.closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        patience = "lock_timeout = '5s'" if "postgresql" in url else "SESSION lock_wait_timeout = 5"
        for statement in (
            f"SET {patience}",
            *statements,
        ):  # a transaction that was left open fails a test and does not hang it
            cursor.execute(statement)
        found = cursor.fetchall() if cursor.description else None
        connection.commit()
    engine.dispose()
    return found


def backend(url: str) -> SqlJournalBackend:
    return open_storage(url)._backend  # type: ignore[attr-defined, no-any-return]


def entry(worker: int, i: int, op: int = ATTR) -> dict[str, Any]:
    """Of a trial that does not exist, so that Optuna passes it over."""
    return {"op_code": op, "worker_id": str(worker), "trial_id": 10**6, "i": i}


def test_writers_at_once_leave_no_gap_and_a_reader_misses_nothing(url: str) -> None:
    each, writers = 60, 4
    read: list[dict[str, Any]] = []

    def write(worker: int) -> None:
        mine, n = backend(url), 0
        for i in range(each):
            mine.append_logs([entry(worker, i)])
            new = mine.read_logs(n)
            assert entry(worker, i) in new  # Optuna looks for what it wrote
            n += len(new)

    def follow() -> None:
        other = backend(url)
        while len(read) < each * writers:
            read.extend(other.read_logs(len(read)))

    with ThreadPoolExecutor(writers + 1) as pool:
        for job in [*(pool.submit(write, w) for w in range(writers)), pool.submit(follow)]:
            job.result(timeout=60)
    assert read == backend(url).read_logs(0)
    for worker in range(writers):
        assert [e["i"] for e in read if e["worker_id"] == str(worker)] == list(range(each))
    assert (
        sum(a["worker_id"] != b["worker_id"] for a, b in itertools.pairwise(read)) > writers
    )  # they did write at once


def test_own_entries_are_read_back_without_a_statement_and_those_of_others_are_not_missed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = backend(url), backend(url)
    statements: list[str] = []
    execute = mine._execute

    def noted(cursor: Any, statement: str, *rest: Any) -> Any:
        statements.append(statement)
        return execute(cursor, statement, *rest)

    monkeypatch.setattr(mine, "_execute", noted)
    mine.append_logs([entry(0, 0)])
    assert mine.read_logs(0) == [entry(0, 0)]
    assert len(statements) == 1
    other.append_logs([entry(1, 0), entry(1, 1)])
    mine.append_logs([entry(0, 1)])
    assert mine.read_logs(1) == [entry(1, 0), entry(1, 1), entry(0, 1)]
    assert mine.read_logs(3) == [entry(0, 1)]
    assert mine.read_logs(4) == []
    assert len(statements) == 5
    assert other.read_logs(1) == [entry(1, 0), entry(1, 1), entry(0, 1)]


def test_what_an_entry_says_comes_back_as_it_was(url: str) -> None:
    odd = entry(0, 0) | {
        "user_attr": {"a%sb%(c)s": "é '\"\\';--\n\0 😀", "long": "x" * 100_000},
        "values": [float("inf"), 1e-300, None],
    }
    mine = backend(url)
    mine.append_logs([odd])
    assert mine.read_logs(0) == [odd]
    assert backend(url).read_logs(0) == [odd]


def test_two_studies_share_a_journal(url: str) -> None:
    def study(name: str) -> optuna.Study:
        return optuna.create_study(study_name=name, storage=open_storage(url), load_if_exists=True)

    for name, n in (("a", 3), ("b", 2), ("a", 1)):
        study(name).optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=n)
    assert [len(study(name).trials) for name in "ab"] == [4, 2]
    optuna.delete_study(study_name="a", storage=open_storage(url))
    assert optuna.get_all_study_names(open_storage(url)) == ["b"]


@pytest.mark.slow
def test_a_writer_that_is_stopped_holds_nobody_up_and_a_killed_one_leaves_no_half(url: str) -> None:
    mine = backend(url)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, url], cwd=ROOT)
    with ThreadPoolExecutor(1) as pool:
        try:
            end = time.monotonic() + 60
            while len(mine.read_logs(0)) < 20:
                assert time.monotonic() < end
                time.sleep(0.05)
            for i in range(20):
                writer.send_signal(signal.SIGSTOP)
                pool.submit(mine.append_logs, [entry(0, i)]).result(timeout=5)
                writer.send_signal(signal.SIGCONT)
                time.sleep(0.0137)
            assert writer.poll() is None
        finally:
            writer.kill()
            writer.wait()
    mine.append_logs([entry(0, 20)])
    read = backend(url).read_logs(0)
    assert [e["i"] for e in read if e["worker_id"] == "0"] == list(range(21))
    theirs = [e["i"] for e in read if e["worker_id"] == "1"]
    assert theirs == list(range(len(theirs)))


def test_a_statement_that_fails_undoes_the_others(url: str) -> None:
    mine = backend(url)
    mine.append_logs([entry(0, 0)])
    run(url, f"INSERT INTO {JOURNAL} (number, entry) VALUES (1, '{{}}')")  # in the way
    with pytest.raises(Exception, match=r"(?i)duplicate"):
        mine.append_logs([entry(0, 1)])
    assert run(url, f"SELECT next FROM {NEXT}")[0][0] == 1
    run(url, f"DELETE FROM {JOURNAL} WHERE number = 1")
    mine.append_logs([entry(0, 2)])
    assert mine.read_logs(0) == [entry(0, 0), entry(0, 2)]


def test_workers_that_start_together_make_the_tables_once(url: str) -> None:
    together = threading.Barrier(6)

    def begin(worker: int) -> None:
        together.wait(timeout=30)
        backend(url).append_logs([entry(worker, 0)])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(begin, range(6)))
    assert sorted(e["worker_id"] for e in backend(url).read_logs(0)) == list("012345")
    assert run(url, f"SELECT id, next FROM {NEXT}")[0] == (1, 6)


def test_a_server_that_lost_the_end_in_a_crash_is_noticed_before_anything_is_written(url: str) -> None:
    mine = backend(url)
    mine.append_logs([entry(0, i) for i in range(3)])
    run(url, f"DELETE FROM {JOURNAL} WHERE number = 2", f"UPDATE {NEXT} SET next = 2")
    backend(url).append_logs([entry(1, 0)])  # another worker's, at the number that was lost
    mine.engine.dispose()  # no connection outlives a crash
    for use in (lambda: mine.append_logs([entry(0, 3)]), lambda: mine.read_logs(3)):
        with pytest.raises(ArtifactError, match="lost the end of the journal"):
            use()
    assert backend(url).read_logs(0) == [entry(0, 0), entry(0, 1), entry(1, 0)]


def test_entries_that_are_missing_are_noticed(url: str) -> None:
    backend(url).append_logs([entry(0, i) for i in range(3)])
    run(url, f"DELETE FROM {JOURNAL} WHERE number = 1")
    with pytest.raises(ArtifactError, match=f"missing in the table {JOURNAL} from number 0 on"):
        backend(url).read_logs(0)


def test_postgresql_waits_for_the_disk_at_the_end_of_a_trial_alone(urls: Callable[[str], str]) -> None:
    mine = backend(urls(f"{servers.JOURNAL}postgresql"))
    with mine.engine.connect() as watch:

        def on_disk(op: int) -> int:
            found = 0
            for i in range(20):  # the server flushes what nobody waits for every 0.2 seconds
                mine.append_logs([entry(0, i, op)])
                found += watch.execute(
                    sa.text("SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()")
                ).scalar_one()
            return found

        assert on_disk(STATE) > 15
        assert on_disk(ATTR) < 5
    drop_tables(urls(f"{servers.JOURNAL}postgresql"))
