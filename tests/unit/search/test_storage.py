from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest

from mpqsearch.errors import ArtifactError, ConfigError, StaleArtifactError
from mpqsearch.search.storage import JournalLock, open_storage, outage
from mpqsearch.search.study import Plan, delete_study, open_study, work
from mpqsearch.secrets import redact


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
    "text", ["postgresql:/me:hunter2@db/x", "postgresq:hunter2@db/x?token=hunter2", "me:hunter2@db/x"]
)
def test_a_broken_address_is_no_path(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"is no address and no path") as caught:
        open_storage(text)
    assert "hunter2" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@db.example:5432/studies",
        "mysql+pymysql://me:hunter2@db/x?charset=utf8",
        "postgresql://me:hunter2/%40@@db/x",
        "postgresql://db/x?user=me&password=hunter2&sslmode=require",
        "redis://:hunter2@cache:6379/0",
        "redis://hunter2@cache:6379/0",
        "postgresql://me:hunter2 and more@db/x",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dhunter2",
        "grpc://h?token=hunter2",
        "mysql://h/x?ssl_key_secret=hunter2;a=b",
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
        ("RDBStorage", "postgresql://me:hunter2@host/x", r"'.*\[postgres\]'"),
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


LOCKED = """
import sys, time
from pathlib import Path
from mpqsearch.search.storage import JournalLock
JournalLock(Path(sys.argv[1])).acquire()
print("locked", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_process_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    with subprocess.Popen([sys.executable, "-c", LOCKED, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"locked"
        threading.Timer(0.3, other.kill).start()
        lock = JournalLock(path)
        lock.acquire()  # when the other is dead
        assert other.wait() != 0
        lock.release()
    assert [p.name for p in tmp_path.iterdir()] == ["study.journal"]


def test_a_lock_file_that_an_older_version_left_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q").mkdir()
    Path("q/study.journal.lock").symlink_to("q/study.journal")  # which leads nowhere from there
    optuna.create_study(study_name="a", storage=open_storage("q/study.journal"))
    assert optuna.load_study(study_name="a", storage=open_storage("q/study.journal")).trials == []


class Away(Exception):  # noqa: N818
    """Stands for an error of a driver."""

    __module__ = "psycopg.errors"


def test_a_storage_that_goes_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(tmp_path / "study.journal")
    failing = iter([Away("no route to postgresql://me:hunter2@db/x"), Away("still none"), None])

    def names(_storage: object) -> list[str]:
        error = next(failing)
        if error is not None:
            raise error
        return []

    monkeypatch.setattr(optuna, "get_all_study_names", names)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    calls = []

    def objective(trial: optuna.Trial) -> float:
        calls.append(trial.number)
        if len(calls) == 2:
            raise AssertionError("Should not reach.") from Away("server closed the connection")
        return float(trial.number)

    plan = Plan(name="a", trials=3, sampler="random", pruner="none")
    study = open_study(plan, storage)
    work(study, plan, objective, storage=storage)
    assert len(calls) == 4
    said = capsys.readouterr().err
    assert "does not answer (server closed the connection); waiting" in said
    assert "answers again" in said
    assert "hunter2" not in said


def test_an_error_of_an_objective_is_no_outage(tmp_path: Path) -> None:
    assert outage(ValueError("x")) is None
    assert isinstance(outage(Away()), Away)
    plan = Plan(name="a", trials=3, sampler="random", pruner="none")
    storage = open_storage(tmp_path / "study.journal")

    def objective(_trial: optuna.Trial) -> float:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        work(open_study(plan, storage), plan, objective, storage=storage)


def test_overwriting_deletes_no_study_of_another_folder(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study.journal")
    mine, theirs = (Plan(name="a", trials=1, folder=folder) for folder in ("mine", "theirs"))
    open_study(theirs, storage)
    with pytest.raises(StaleArtifactError, match=r"belongs to another run folder \(theirs\).*search\.study=NAME"):
        delete_study(mine, storage)
    delete_study(theirs, storage)
    assert optuna.get_all_study_names(storage) == []
    delete_study(mine, storage)
