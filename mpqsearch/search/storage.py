"""Where a study lives: a journal file by default, a database or a proxy for many machines. Passwords never leave this
module."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mpqsearch.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

log = logging.getLogger("mpqsearch")

T = TypeVar("T")

STORAGE_VARIABLE = "MPQSEARCH_STORAGE"
"""Environment variable for a storage URL: unlike an argument it shows in no process list and no shell history."""

SCHEMES = ("postgresql", "postgres", "mysql", "mariadb", "sqlite", "mssql", "oracle", "redis", "rediss", "grpc")
"""Kinds of storage URLs, a driver's name after a plus sign left out."""

JOURNAL = "journal+"
"""What stands before the URL of a database that is to hold a journal instead of Optuna's tables."""

JOURNAL_SCHEMES = ("postgresql", "postgres", "mysql", "mariadb")
"""Databases that can."""

PROXY_PORT = 13000
"""Port of Optuna's gRPC proxy where the address names none, as Optuna has it."""

PROXY_WAIT_S = 20.0
"""Seconds that a proxy is waited for."""

REST_S = 1.0
"""Seconds of rest after which a connection to a database is tried before it is used; a trial uses one dozens of times
at once."""

CREATION_ATTEMPTS = 6
"""Workers that start together on an empty database all try to make its tables; those that come second try again."""

_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.\-]*://[^\s:/@]*:)(?P<password>[^\s]*)(?=@)", re.IGNORECASE)
_QUERY = re.compile(r"(?P<head>[?&](?:password|passwd|pwd|sslpassword)=)[^&\s]*", re.IGNORECASE)


def redact(text: str) -> str:
    """Text with the passwords of all URLs in it replaced by ``***``."""
    return _QUERY.sub(r"\g<head>***", _PASSWORD.sub(r"\g<head>***", text))


def open_storage(where: str | Path | BaseStorage, *, workers: int = 1) -> BaseStorage:
    """An Optuna storage.

    Args:
        where: A journal file, a URL (``postgresql://``, ``mysql://``, ``sqlite://``, ``redis://``,
        ``grpc://host:port``,
            ``journal+postgresql://``, ``journal+mysql://``), or a storage object, which is returned as it is.
        workers: How many processes will use it.

    Raises:
        ConfigError: SQLite with several workers; a driver is missing; the database does not answer. No message holds a
        password. ArtifactError: A journal is no journal.
    """
    if not isinstance(where, (str, Path)):
        return where
    check_storage(where, workers=workers)
    text = str(where)
    if "://" not in text:
        return _journal(Path(text))
    scheme = text.split("://", 1)[0].lower()
    if scheme == "grpc":
        return _proxy(text)
    if scheme.startswith("redis"):
        return _redis(text)
    if scheme.startswith(JOURNAL):
        return _journal_in_database(_with_driver(text[len(JOURNAL) :]))
    return _database(_with_driver(text))


def check_storage(where: str | Path, *, workers: int = 1) -> None:
    """Raise `ConfigError` for a kind of storage that is unknown, or that cannot serve so many workers. Opens
    nothing."""
    if "://" not in str(where):
        return
    scheme = str(where).split("://", 1)[0].lower()
    if scheme.startswith(JOURNAL):
        base = scheme.removeprefix(JOURNAL).split("+", 1)[0]
        if base not in JOURNAL_SCHEMES:
            raise ConfigError(
                f"no journal can be kept at {redact(str(where))}: write "
                f"{', '.join(f'{JOURNAL}{s}://...' for s in JOURNAL_SCHEMES)}, "
                "redis://... (which is a journal as it is) or the path of a journal file"
            )
        return
    if scheme.split("+", 1)[0] not in SCHEMES:
        known = (*SCHEMES, *(JOURNAL + s for s in JOURNAL_SCHEMES))
        raise ConfigError(
            f"unknown storage {redact(str(where))}: write {', '.join(f'{s}://...' for s in known)} or the path of a "
            "journal file"
        )
    if scheme.startswith("sqlite") and workers > 1:
        raise ConfigError(
            f"SQLite cannot serve {workers} workers: it has no row locks, so two workers take the same trial and one "
            "of them dies (the "
            "FAQ of Optuna advises against it). Leave --storage out for a journal file, or use postgresql:// or "
            "mysql://."
        )


def repair_journal(path: Path) -> int:
    """Cut what a crash left half-written out of a journal, under its lock; the old file is kept as ``.bak``. Returns
    the lines dropped.

    Optuna appends to a torn last line and can never read the file again. Only lines that are no JSON are dropped.
    """
    if not path.exists() or path.stat().st_size == 0:
        return 0
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        lines = path.read_bytes().split(b"\n")
        tail = lines.pop()  # what follows the last line end: empty in a whole file
        good = [line for line in lines if _is_record(line)]
        dropped = len(lines) - len(good) + (1 if tail else 0)
        if not dropped:
            return 0
        if not good:
            raise ArtifactError(
                f"{path} is no journal of a study: not one line of it can be read. Choose another --storage or delete "
                "it."
            )
        shutil.copy2(path, _free_name(path))
        whole = b"".join(line + b"\n" for line in good)
        if path.read_bytes().startswith(whole):
            os.truncate(path, len(whole))  # the same file stays in place for workers that have it open
        else:
            from mpqsearch.artifacts import atomic_write

            with atomic_write(path) as handle:
                handle.write(whole)
    finally:
        lock.release()
    log.warning("%s: dropped %d damaged line(s); the file as it was is kept beside it", path.name, dropped)
    return dropped


def _journal(path: Path) -> BaseStorage:
    import optuna

    path.parent.mkdir(parents=True, exist_ok=True)
    repair_journal(path)
    return optuna.storages.JournalStorage(_journal_backend(path))


def _journal_backend(path: Path) -> Any:
    """Optuna's journal, flushed to the disk once a trial instead of at every line.

    A killed process loses nothing either way; a power cut loses at most the lines of running trials. Flushing takes
    milliseconds, and a trial writes dozens of lines.
    """
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import get_lock_file
    from optuna.storages.journal._storage import JournalOperation

    class Backend(JournalFileBackend):
        _own: tuple[int, bytes] | None = None  # where the last line of this process begins, and what it says

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            self._own = None
            if any(entry.get("op_code") == JournalOperation.SET_TRIAL_STATE_VALUES for entry in logs):
                super().append_logs(logs)
                return
            text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in logs).encode()
            with get_lock_file(self._lock), path.open("ab") as handle:
                began = handle.tell()
                handle.write(text)
            if len(logs) == 1:
                self._own = began, text

        def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
            # Optuna reads after every line that it writes: where nobody else wrote meanwhile, it need not ask the disk.
            own, self._own = self._own, None
            if own is not None and self._log_number_offset.get(log_number_from) == own[0]:
                self._log_number_offset[log_number_from + 1] = own[0] + len(own[1])
                yield json.loads(own[1])
            else:
                yield from super().read_logs(log_number_from)

    return Backend(str(path))


def _proxy(url: str) -> BaseStorage:
    """Optuna's proxy before a storage, when it answers."""
    import warnings

    import optuna

    host, _, port = url.split("://", 1)[1].rstrip("/").partition(":")
    if port and not port.isdecimal():
        raise ConfigError(
            f"{redact(url)} is no address of a proxy: write grpc://host:port (13000 where no port is given)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            proxy = optuna.storages.GrpcStorageProxy(host=host or "localhost", port=int(port or PROXY_PORT))
        proxy.wait_server_ready(timeout=PROXY_WAIT_S)
    except ImportError:
        raise ConfigError(f"{url} needs the packages grpcio and protobuf: pip install 'mpqsearch[grpc]'") from None
    except ConnectionError:
        raise ConfigError(
            f"no proxy answers at {url} within {PROXY_WAIT_S:g} seconds. It is started by "
            "optuna.storages.run_grpc_proxy_server(storage, "
            f"host='0.0.0.0', port={port or PROXY_PORT})."
        ) from None
    return proxy


def _redis(url: str) -> BaseStorage:
    """Optuna's journal in a Redis server, when it answers."""
    import warnings

    import optuna

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.JournalStorage(optuna.storages.journal.JournalRedisBackend(url))
    except ImportError:
        raise ConfigError(f"the driver for {redact(url)} is not installed: pip install 'mpqsearch[redis]'") from None
    except Exception as error:  # noqa: BLE001 - the driver's own, with the address in them
        raise ConfigError(f"the storage {redact(url)} cannot be opened: {_without_passwords(error, url)}") from None


def _database(url: str) -> BaseStorage:
    """Optuna's own tables."""
    import optuna

    if url.startswith("sqlite"):
        return _made(url, lambda: optuna.storages.RDBStorage(url))
    # Tried here, see below; said outright, since Optuna switches SQLAlchemy's own trial at every use on for MySQL.
    storage: Any = _made(url, lambda: optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": False}))
    _try_after_rest(storage.engine)
    return storage  # type: ignore[no-any-return]


def _journal_in_database(url: str) -> BaseStorage:
    import optuna

    from mpqsearch.search.sql_journal import SqlJournalBackend

    backend = _made(url, lambda: SqlJournalBackend(url))
    _try_after_rest(backend.engine)
    return optuna.storages.JournalStorage(backend)


def _made(url: str, make: Callable[[], T]) -> T:
    """What opens a database, tried again when others make its tables at the same moment."""
    for attempt in range(CREATION_ATTEMPTS):
        try:
            return make()
        except ConfigError:
            raise
        except ImportError:
            raise ConfigError(
                f"the driver for {redact(url)} is not installed. For PostgreSQL: pip install 'mpqsearch[postgres]'; "
                "for MySQL and "
                "MariaDB: pip install 'mpqsearch[mysql]'."
            ) from None
        except Exception as error:  # noqa: BLE001 - drivers raise errors of their own, with the address in them
            if attempt + 1 < CREATION_ATTEMPTS and _is_race(error):
                time.sleep(0.2 * 2**attempt)
                continue
            raise ConfigError(f"the storage {redact(url)} cannot be opened: {_without_passwords(error, url)}") from None
    raise AssertionError  # the last attempt has returned or raised


def _try_after_rest(engine: Any) -> None:
    """A connection that rested is tried before it is used, and replaced when the server has closed it meanwhile."""
    from sqlalchemy import event, exc

    @event.listens_for(engine, "checkin")
    def rests(_connection: Any, record: Any) -> None:
        record.info["rests since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def wakes(connection: Any, record: Any, _proxy: Any) -> None:
        if time.monotonic() - record.info.get("rests since", float("inf")) <= REST_S:
            return
        try:
            alive = engine.dialect.do_ping(connection)
        except Exception as error:
            raise exc.DisconnectionError from error
        if not alive:
            raise exc.DisconnectionError


def _is_race(error: Exception) -> bool:
    """True when another worker made the tables of an empty database at the same moment."""
    text = str(error).lower()
    return "already exists" in text or "duplicate key" in text or "duplicate entry" in text


def _with_driver(url: str) -> str:
    """``postgresql://`` with psycopg 3 when psycopg 2, SQLAlchemy's default, is absent; likewise ``mysql://`` and
    ``mariadb://`` with PyMySQL."""
    scheme, rest = url.split("://", 1)
    if scheme in ("postgresql", "postgres"):
        driver = "" if importlib.util.find_spec("psycopg2") else "+psycopg"
        return f"postgresql{driver}://{rest}"
    if scheme in ("mysql", "mariadb") and not importlib.util.find_spec("MySQLdb"):
        return f"{scheme}+pymysql://{rest}"
    return url


def _without_passwords(error: Exception, url: str) -> str:
    """The first line of an error's message."""
    message = redact(str(error)).splitlines()[0]
    for secret in _passwords(url):
        message = message.replace(secret, "***")
    return message


def _passwords(url: str) -> list[str]:
    from urllib.parse import unquote

    found = [m.group("password") for m in _PASSWORD.finditer(url)]
    return [s for raw in found for s in {raw, unquote(raw)} if s]


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _free_name(path: Path) -> Path:
    for number in range(1000):
        name = path.with_name(f"{path.name}.bak{number or ''}")
        if not name.exists():
            return name
    raise ArtifactError(f"there are a thousand backups of {path}; tidy up")
