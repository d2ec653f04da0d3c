"""Where a study lives: Optuna's journal file by default, a database for many machines. Passwords never leave this
module."""

from __future__ import annotations

import importlib.util
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from mpqsearch.errors import ArtifactError, ConfigError

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

_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.\-]*://[^\s:/@]*:)(?P<password>[^\s]*)(?=@)", re.IGNORECASE)
_QUERY = re.compile(r"(?P<head>[?&](?:password|passwd|pwd|sslpassword)=)[^&\s]*", re.IGNORECASE)


@contextmanager
def unwarned() -> Iterator[None]:
    """Without Optuna's warnings of what it calls experimental, which the user did not ask for by that name."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def redact(text: str) -> str:
    """Text with the passwords of all URLs in it replaced by ``***``."""
    return _QUERY.sub(r"\g<head>***", _PASSWORD.sub(r"\g<head>***", text))


def check_storage(where: str | Path, *, workers: int = 1) -> None:
    """Raise `ConfigError` for a kind of storage that is unknown, or that cannot serve so many workers. Opens
    nothing."""
    if "://" not in str(where):
        return
    scheme = str(where).split("://", 1)[0].lower().split("+", 1)[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"unknown storage {redact(str(where))}: write {', '.join(f'{s}://...' for s in SCHEMES)} or the path of a "
            "journal file"
        )
    if scheme == "sqlite" and workers > 1:
        raise ConfigError(
            f"SQLite cannot serve {workers} workers: it has no row locks, so two workers take the same trial (the FAQ "
            "of Optuna advises against it). Leave --storage out for a journal file, or use postgresql:// or mysql://."
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
    for attempt in range(CREATION_ATTEMPTS):
        try:
            with unwarned():
                return _served(_with_driver(url), heartbeat_s)
        except ImportError as error:
            raise ConfigError(
                f"the driver for {redact(url)} is not installed ({error.name}). For PostgreSQL: "
                "pip install 'mpqsearch[postgres]'; for MySQL: pip install pymysql; for Redis: pip install redis."
            ) from None
        except Exception as error:  # noqa: BLE001 - drivers raise errors of their own, with the address in them
            text = str(error).lower()
            race = any(words in text for words in ("already exists", "duplicate key", "duplicate entry"))
            if not race or attempt + 1 == CREATION_ATTEMPTS:
                raise ConfigError(f"the storage {redact(url)} cannot be opened: {_first_line(error, url)}") from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError  # the last attempt has returned or raised


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock

    path.parent.mkdir(parents=True, exist_ok=True)
    # Windows has no symbolic links for everyone.
    lock = JournalFileOpenLock(str(path)) if os.name == "nt" else JournalFileSymlinkLock(str(path))
    _cut_torn_line(path, lock)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path} is no journal of a study, or damaged: {error}. Cut the damaged line out, choose another "
            "--storage, or delete the file."
        ) from error


def _cut_torn_line(path: Path, lock: Any) -> None:
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


def _served(url: str, heartbeat_s: int) -> BaseStorage:
    from optuna import storages

    if url.startswith("redis"):
        from optuna.storages.journal import JournalRedisBackend

        return storages.JournalStorage(JournalRedisBackend(url))
    # A server closes connections that rest while a trial measures for minutes; a ping finds that out.
    options: dict[str, Any] = {} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return storages.RDBStorage(
        url,
        engine_kwargs=options,
        heartbeat_interval=heartbeat_s,
        grace_period=4 * heartbeat_s,
        heartbeat_stale_trial_callback=storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
    )


def _with_driver(url: str) -> str:
    """``postgresql://`` with psycopg 3 when psycopg 2, SQLAlchemy's default, is absent; likewise ``mysql://`` and
    ``mariadb://`` with PyMySQL."""
    scheme, rest = url.split("://", 1)
    if scheme in ("postgresql", "postgres"):
        return f"postgresql{'' if importlib.util.find_spec('psycopg2') else '+psycopg'}://{rest}"
    if scheme in ("mysql", "mariadb") and not importlib.util.find_spec("MySQLdb"):
        return f"{scheme}+pymysql://{rest}"
    return url


def _first_line(error: Exception, url: str) -> str:
    """The first line of an error's message, without the passwords of the URL."""
    message = redact(str(error)).splitlines()[0]
    secrets = [m.group("password") for m in _PASSWORD.finditer(url)]
    for secret in (s for raw in secrets for s in (raw, unquote(raw)) if s):
        message = message.replace(secret, "***")
    return message
