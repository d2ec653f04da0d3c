"""Where a study lives: Optuna's journal file by default, a database for many machines."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mpqsearch.errors import ArtifactError, ConfigError, install, shown
from mpqsearch.progress import say
from mpqsearch.secrets import keep_secret, redact

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

STORAGE_VARIABLE = "MPQSEARCH_STORAGE"
"""Environment variable for a storage URL: unlike an argument it shows in no process list and no shell history."""

SCHEMES = ("postgresql", "postgres", "mysql", "mariadb", "sqlite", "redis", "rediss")
"""Kinds of storage URLs, a driver's name after a plus sign left out."""

HEARTBEAT_S = 30
"""Seconds between two heartbeats of a trial in a database; after four without one the trial is failed."""

RETRIES = 3
"""Times that a trial whose worker died is tried again."""

CREATION_ATTEMPTS = 6
"""Workers that start together on an empty database all try to make its tables; those that come second try again."""

CONNECT_S = 8
"""Seconds in which a server must answer."""

OUTAGE_S = 600
"""Seconds that a server which answered before may be away, as in a restart, before a search gives up."""

LOCK_S = 10
"""Seconds after which it is said that another process keeps the journal."""


@contextmanager
def unwarned() -> Iterator[None]:
    """Without Optuna's warnings of what it calls experimental, which the user did not ask for by that name."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def check_storage(where: str | Path, *, workers: int = 1) -> None:
    """Raise `ConfigError` for a kind of storage that is unknown, or that cannot serve so many workers. Opens
    nothing."""
    if "://" not in str(where):
        _refuse_broken_url(str(where))
        return
    scheme = str(where).split("://", 1)[0].lower().split("+", 1)[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"unknown storage {shown(redact(str(where)))}: write {', '.join(f'{s}://...' for s in SCHEMES)} or the "
            "path of a journal file"
        )
    if scheme == "sqlite" and workers > 1:
        raise ConfigError(
            f"SQLite cannot serve {workers} workers: it has no row locks, so two workers take the same trial (the FAQ "
            "of Optuna advises against it). Leave --storage out for a journal file, or use postgresql:// or mysql://."
        )


def _refuse_broken_url(where: str) -> None:
    """Raise `ConfigError` for what was meant as an address: as a path it would put a password into a folder's name."""
    if re.match(r"\w[\w+]+:", where) or ("@" in where and ":" in where.partition("@")[0][2:]):
        raise ConfigError(
            f"the storage that begins with {shown(where.partition(':')[0])}: is no address and no path. An address "
            f"begins with {', '.join(f'{s}://' for s in SCHEMES)}; the path of a journal file holds no colon."
        )


def open_storage(where: str | Path, *, workers: int = 1, heartbeat_s: int = HEARTBEAT_S) -> BaseStorage:
    """Optuna's storage for a journal file or a URL (``postgresql://``, ``mysql://``, ``sqlite://``, ``redis://``).

    In a database the trials of dead workers are failed when their heartbeat stops, and tried again.

    Raises:
        ConfigError: SQLite with several workers; a driver is missing; the database does not answer. No message holds a
            password.
        ArtifactError: A journal file is no journal, or damaged.
    """
    check_storage(where, workers=workers)
    url = str(where)
    if "://" not in url:
        return _journal(Path(url))
    keep_secret(url)
    for attempt in range(CREATION_ATTEMPTS):
        try:
            with unwarned():
                return _served(_with_driver(url), heartbeat_s)
        except ImportError as error:
            raise ConfigError(
                f"the driver for {shown(redact(url))} is not installed ({error.name}). For PostgreSQL: "
                f"{install('postgres')}; for MySQL: pip install pymysql; for Redis: pip install redis."
            ) from None
        except Exception as error:  # noqa: BLE001 - drivers raise errors of their own, with the address in them
            text = str(error).lower()
            race = any(words in text for words in ("already exists", "duplicate key", "duplicate entry"))
            if not race or attempt + 1 == CREATION_ATTEMPTS:
                raise ConfigError(f"the storage {shown(redact(url))} cannot be opened: {first_line(error)}") from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError  # the last attempt has returned or raised


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalLock(path)
    try:
        _cut_torn_line(path, lock)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type] # as it is called
    except OSError as error:
        raise ArtifactError(f"{path} cannot be a journal: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is no journal of a study, or damaged: {error}. Cut the damaged line out, choose another "
            "--storage, or delete the file."
        ) from error


class JournalLock:
    """A lock that the system keeps for a process on the journal itself and takes back when the process ends, however it
    ends: there is no file to be left behind, and no lock of a dead process to be waited for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock; after `LOCK_S` it is said what is waited for."""
        file = self._path.open("ab")
        began, told, pause = time.monotonic(), False, 0.001
        try:
            while not _locked(file):
                if not told and time.monotonic() - began > LOCK_S:
                    say(f"search: waiting for another process that is writing {self._path}")
                    told = True
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        except BaseException:
            file.close()
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Give it back."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


if sys.platform == "win32":
    import msvcrt

    def _locked(file: IO[bytes]) -> bool:
        """Whether the lock was taken: of a byte far behind the end, since nobody can read one that is locked."""
        file.seek(1 << 40)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:

    def _locked(file: IO[bytes]) -> bool:
        """Whether the lock was taken."""
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def joined(file: Path) -> Iterator[bool]:
    """Count among the processes that hold ``file`` while the block runs, however they end; yields whether this is the
    only one. Where the system has no shared locks nobody is known to be alone."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with file.open("rb") as handle:
        alone = _locked(handle)
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield alone


def _cut_torn_line(path: Path, lock: JournalLock) -> None:
    """Cut off a last line that a crash left half written: Optuna would append to it, and could never read it again."""
    if not path.exists():
        return
    lock.acquire()
    try:
        lines, _, torn = path.read_bytes().rpartition(b"\n")
        if torn and lines.startswith(b'{"op_code"'):
            os.truncate(path, len(lines) + 1)
    finally:
        lock.release()


def outage(error: BaseException) -> BaseException | None:
    """The error of a server that did not answer, from which ``error`` followed: the first of a driver, since libraries
    make other errors of it; None where there is none."""
    from optuna.exceptions import StorageInternalError

    chain: list[BaseException] = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    kinds = [type(e).__module__.partition(".")[0] in _DRIVERS for e in chain]
    if any(kinds):
        return chain[kinds.index(True)]
    return next((e for e in chain if isinstance(e, StorageInternalError)), None)


_DRIVERS = ("sqlalchemy", "psycopg", "psycopg2", "pymysql", "MySQLdb", "redis")


def wait_for(storage: BaseStorage, error: BaseException) -> None:
    """Wait until a storage that failed with ``error``, an `outage`, answers again. Raises `ConfigError` after
    `OUTAGE_S`."""
    import optuna

    say(f"search: the storage does not answer ({first_line(error)}); waiting up to {OUTAGE_S // 60} minutes for it")
    began = time.monotonic()
    while True:
        time.sleep(1)
        try:
            optuna.get_all_study_names(storage)
        except Exception as again:
            if outage(again) is None:
                raise
            if time.monotonic() - began > OUTAGE_S:
                raise ConfigError(
                    f"the storage did not answer for {OUTAGE_S // 60} minutes: {first_line(again)}. The same command "
                    "continues when it does."
                ) from None
        else:
            say(f"search: the storage answers again after {time.monotonic() - began:.0f} s")
            return


def _served(url: str, heartbeat_s: int) -> BaseStorage:
    from optuna import storages

    if url.startswith("redis"):
        from optuna.storages.journal import JournalRedisBackend

        sign = "&" if "?" in url else "?"
        return storages.JournalStorage(JournalRedisBackend(f"{url}{sign}socket_connect_timeout={CONNECT_S}"))
    # A server closes connections that rest while a trial measures for minutes; a ping finds that out.
    options: dict[str, Any] = {} if url.startswith("sqlite") else {"pool_pre_ping": True}
    if url.startswith(("postgresql", "mysql", "mariadb")):
        options["connect_args"] = {"connect_timeout": CONNECT_S}
    if "+pymysql" in url:
        _await_greeting(url)
    return storages.RDBStorage(
        url,
        engine_kwargs=options,
        heartbeat_interval=heartbeat_s,
        grace_period=4 * heartbeat_s,
        heartbeat_stale_trial_callback=storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
    )


def _await_greeting(url: str) -> None:
    """Connect once with a limit on reading, too: PyMySQL waits for ever for a server that accepts and says nothing. The
    limit is not kept, since a query may rightly wait longer for a lock."""
    from sqlalchemy import create_engine

    engine = create_engine(url, connect_args={"connect_timeout": CONNECT_S, "read_timeout": CONNECT_S})
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _with_driver(url: str) -> str:
    """``postgresql://`` with psycopg 3 when psycopg 2, SQLAlchemy's default, is absent; likewise ``mysql://`` and
    ``mariadb://`` with PyMySQL."""
    scheme, rest = url.split("://", 1)
    if scheme in ("postgresql", "postgres"):
        return f"postgresql{'' if importlib.util.find_spec('psycopg2') else '+psycopg'}://{rest}"
    if scheme in ("mysql", "mariadb") and not importlib.util.find_spec("MySQLdb"):
        return f"{scheme}+pymysql://{rest}"
    return url


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without secrets."""
    return shown(redact(next(iter(str(error).splitlines()), type(error).__name__)))
