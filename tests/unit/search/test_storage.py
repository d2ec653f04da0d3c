from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.search.storage import open_storage, redact


def test_a_journal_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "study.journal"
    for trials in (2, 3):
        study = optuna.create_study(study_name="s", storage=open_storage(path), load_if_exists=True)
        study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=trials)
    assert len(study.get_trials()) == 5


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no journal\nat all\n")
    with pytest.raises(ArtifactError, match="no journal of a study, or damaged"):
        open_storage(path)
    assert path.read_text() == "no journal\nat all\n"


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_a_torn_last_line_is_cut_and_the_study_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "study.journal"
    for more in (3, 2):
        study = optuna.create_study(study_name="s", storage=open_storage(path), load_if_exists=True)
        study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=more)
        path.write_bytes(path.read_bytes()[:-cut])
    trials = optuna.load_study(study_name="s", storage=open_storage(path)).get_trials()
    assert sum(t.state == optuna.trial.TrialState.COMPLETE for t in trials) == 3


def test_a_line_that_is_damaged_inside_is_said(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = optuna.create_study(study_name="s", storage=open_storage(path))
    for name in "abc":
        study.set_user_attr(name, 1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-9] + b"".join(lines[2:]))
    with pytest.raises(ArtifactError, match="Cut the damaged line out"):
        open_storage(path)


def test_sqlite_is_refused_for_several_workers_with_the_reason(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with pytest.raises(ConfigError, match="no row locks"):
        open_storage(url, workers=2)
    assert isinstance(open_storage(url), optuna.storages.RDBStorage)


def test_an_unknown_kind_of_storage_is_named_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"unknown storage ftp://me:\*\*\*@host/x: write postgresql://"):
        open_storage("ftp://me:hunter2@host/x")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@db.example:5432/studies",
        "mysql+pymysql://me:hunter2@db/x?charset=utf8",
        "postgresql://me:hunter2/%40@@db/x",
        "postgresql://db/x?user=me&password=hunter2&sslmode=require",
        "redis://:hunter2@cache:6379/0",
    ],
)
def test_passwords_are_never_shown(url: str) -> None:
    text = redact(f"mpqsearch search --storage {url} --workers 4")
    assert "hunter2" not in text
    assert "***" in text
    assert text.endswith("--workers 4")


def test_what_has_no_password_stays_as_it_is() -> None:
    for text in ("runs/a/study.journal", "sqlite:///a.db", "see https://optuna.org/ or mail me@example.org"):
        assert redact(text) == text


def test_a_server_that_does_not_answer_is_said_without_the_password() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        open_storage("postgresql://me:hunter2@127.0.0.1:9/none")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "url", "package"),
    [
        ("journal.JournalRedisBackend", "redis://:hunter2@host/0", "redis"),
        ("RDBStorage", "mysql://me:hunter2@host/x", "pymysql"),
        ("RDBStorage", "postgresql://me:hunter2@host/x", r"'mpqsearch\[postgres\]'"),
    ],
)
def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, name: str, url: str, package: str) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("No module")

    monkeypatch.setattr(f"optuna.storages.{name}", absent)
    with pytest.raises(ConfigError, match=f"pip install {package}") as caught:
        open_storage(url)
    assert "hunter2" not in str(caught.value)


def test_a_connection_that_the_server_closed_is_replaced(postgres: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    study = optuna.create_study(study_name="rested", storage=open_storage(postgres))
    try:
        with psycopg.connect(postgres, autocommit=True) as other:
            others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
            closed = other.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}").fetchall()
        assert closed
        study.set_user_attr("a", 1)
        assert study.user_attrs == {"a": 1}
    finally:
        optuna.delete_study(study_name="rested", storage=open_storage(postgres))
