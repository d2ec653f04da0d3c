from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import optuna
import pytest

from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.search import storage as storage_module
from mpqsearch.search.storage import open_storage, redact, repair_journal


def journal_with(path: Path, trials: int) -> optuna.Study:
    study = optuna.create_study(study_name="s", storage=open_storage(path), load_if_exists=True)
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=trials)
    return study


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_a_torn_tail_is_cut_and_kept_beside(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "study.journal"
    journal_with(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    study = journal_with(path, 2)  # opens, repairs and goes on
    assert len([t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]) >= 4
    assert (tmp_path / "study.journal.bak").read_bytes() == whole[:-cut]
    assert repair_journal(path) == 0


def test_a_torn_line_that_was_written_over_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    journal_with(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join(lines[:-3]) + lines[-3][:-9] + b"".join(lines[-2:])
    )  # the next append went on in the torn line
    assert repair_journal(path) == 1
    assert len(journal_with(path, 1).get_trials()) >= 3


def test_a_whole_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    journal_with(path, 2)
    before = path.read_bytes()
    assert repair_journal(path) == 0
    assert path.read_bytes() == before
    assert list(tmp_path.glob("*.bak*")) == []
    assert list(tmp_path.glob("*.lock")) == []


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no journal\nat all\n")
    with pytest.raises(ArtifactError, match="no journal of a study"):
        open_storage(path)
    assert path.read_text() == "no journal\nat all\n"


def test_sqlite_is_refused_for_several_workers_with_the_reason(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with pytest.raises(ConfigError, match="no row locks"):
        open_storage(url, workers=2)
    assert isinstance(open_storage(url), optuna.storages.RDBStorage)


def test_an_unknown_kind_of_storage_is_named_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"unknown storage ftp://me:\*\*\*@host/x: write postgresql://"):
        open_storage("ftp://me:hunter2@host/x")


@pytest.mark.parametrize("base", ["redis", "sqlite", "grpc", "oracle+oracledb", "ftp"])
def test_where_no_journal_can_be_kept_is_said_with_what_to_write_instead(base: str) -> None:
    where = re.escape(f"journal+{base}://me:***@host/x")
    with pytest.raises(
        ConfigError, match=rf"no journal can be kept at {where}: write journal\+postgresql://.*redis://.*path"
    ):
        open_storage(f"journal+{base}://me:hunter2@host/x")


def test_a_driver_that_sends_no_several_statements_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of the drivers pymysql, mysqldb, not by mysqlconnector") as caught:
        open_storage("journal+mysql+mysqlconnector://me:hunter2@host/x")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@db.example:5432/studies",
        "mysql+pymysql://me:hunter2@db/x?charset=utf8",
        "postgresql://me:hu/nt@er2@db/x".replace("hu/nt@er2", "hunter2/%40@"),
        "postgresql://db/x?user=me&password=hunter2&sslmode=require",
        "redis://:hunter2@cache:6379/0",
        "journal+postgresql://me:hunter2@db.example:5432/studies",
        "journal+mysql+pymysql://me:hunter2@db/x?charset=utf8",
    ],
)
def test_passwords_are_never_shown(url: str) -> None:
    text = redact(f"mpqsearch search --storage {url} --workers 4")
    assert "hunter2" not in text
    assert "***" in text
    assert text.endswith("--workers 4")


def test_what_has_no_password_stays_as_it_is() -> None:
    for text in (
        "runs/a/study.journal",
        "grpc://localhost:13000",
        "sqlite:///a.db",
        "see https://optuna.org/ or mail me@example.org",
    ):
        assert redact(text) == text


@pytest.mark.parametrize(
    ("package", "url"),
    [
        ("psycopg", "postgresql://me:hunter2@127.0.0.1:9/none"),
        ("pymysql", "mysql://me:hunter2@127.0.0.1:9/none"),
        ("pymysql", "mariadb://me:hunter2@127.0.0.1:9/none"),
        ("psycopg", "journal+postgresql://me:hunter2@127.0.0.1:9/none"),
        ("psycopg", "journal+postgres://me:hunter2@127.0.0.1:9/none"),
        ("pymysql", "journal+mysql://me:hunter2@127.0.0.1:9/none"),
        ("pymysql", "journal+mariadb://me:hunter2@127.0.0.1:9/none"),
        ("redis", "redis://:hunter2@127.0.0.1:9/0"),
    ],
)
def test_a_server_that_does_not_answer_is_said_without_the_password(package: str, url: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(ConfigError) as caught:
        open_storage(url)
    assert "cannot be opened" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_proxy_that_does_not_answer_is_said_with_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc")
    monkeypatch.setattr(storage_module, "PROXY_WAIT_S", 0.2)
    with pytest.raises(
        ConfigError, match=r"no proxy answers at grpc://127.0.0.1:9 .*run_grpc_proxy_server\(storage, .*port=9\)"
    ):
        open_storage("grpc://127.0.0.1:9")
    with pytest.raises(ConfigError, match="write grpc://host:port"):
        open_storage("grpc://127.0.0.1:studies")


@pytest.mark.parametrize(
    ("name", "url", "extra"),
    [
        ("GrpcStorageProxy", "grpc://host:13000", "grpc"),
        ("journal.JournalRedisBackend", "redis://:hunter2@host/0", "redis"),
        ("RDBStorage", "mysql://me:hunter2@host/x", "mysql"),
        ("sqlalchemy.create_engine", "journal+postgresql://me:hunter2@host/x", "postgres"),
    ],
)
def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, name: str, url: str, extra: str) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("No module")

    monkeypatch.setattr(name if name.startswith("sqlalchemy") else f"optuna.storages.{name}", absent)
    with pytest.raises(ConfigError, match=rf"pip install 'mpqsearch\[{extra}\]'") as caught:
        open_storage(url)
    assert "hunter2" not in str(caught.value)


def test_own_lines_are_read_back_without_the_disk_and_those_of_others_are_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    mine, other = (open_storage(path)._backend for _ in range(2))  # type: ignore[attr-defined]
    lines = [{"op_code": 8, "worker_id": "w", "trial_id": 10**6, "i": i} for i in range(7)]

    def read(backend: Any, begin: int) -> list[dict[str, Any]]:
        return list(backend.read_logs(begin))

    mine.append_logs(lines[:1])
    assert read(mine, 0) == lines[:1]
    other.append_logs(lines[1:2])
    other.append_logs(lines[2:3])
    mine.append_logs(lines[3:4])
    assert read(mine, 1) == lines[1:4]
    mine.append_logs(lines[4:5])
    other.append_logs(lines[5:6])
    assert read(mine, 4) == lines[4:5]  # what came after it is read the next time
    assert read(mine, 5) == lines[5:6]
    assert read(mine, 6) == []
    assert read(other, 0) == lines[:6]
    mine.append_logs(lines[6:])
    path.rename(tmp_path / "gone")
    assert read(mine, 6) == lines[6:]
    assert [json.loads(line) for line in (tmp_path / "gone").read_text().splitlines()] == lines
