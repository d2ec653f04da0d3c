"""Optuna's journal in one table of a database: one statement an entry, where Optuna's own tables take some fifty a
trial.

Every worker replays the journal in its memory and asks for what came after the last entry it has. That is only right
when numbers have no gaps and become visible in their order: a row of a second table holds the next number, and whoever
takes one locks that row until the entry is committed. Taking the number, writing and committing is sent at once, so
that a worker that is killed, held up or cut off leaves neither half an entry nor the lock behind.

Like Optuna's own storages it is opened after a process is forked, not before.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._storage import JournalOperation

from mpqsearch.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from sqlalchemy.pool import PoolProxiedConnection

DATABASES = ("postgresql", "mysql", "mariadb")
"""Those that a journal can be kept in, as SQLAlchemy calls them."""

MYSQL_DRIVERS = ("pymysql", "mysqldb")
"""Drivers of MySQL that send several statements at once."""

MULTI_STATEMENTS = 1 << 16
"""Flag of MySQL's protocol with which a connection allows for that."""

JOURNAL, NEXT = "mpqsearch_journal", "mpqsearch_journal_next"
"""Tables of the entries, and of the next number."""

_READ = f"SELECT number, entry FROM {JOURNAL} WHERE number >= %s ORDER BY number"  # noqa: S608 - a constant

# The end of a trial waits for the disk as the server is set, other entries do not: a crash of the server may cost those
# of running trials.
_APPEND_POSTGRESQL = f"""
WITH taken AS (UPDATE {NEXT} SET next = next + 1 RETURNING next - 1 AS number),
     written AS (INSERT INTO {JOURNAL} (number, entry) SELECT number, %s::text FROM taken RETURNING number)
SELECT number, CASE WHEN NOT %s::boolean THEN set_config('synchronous_commit', 'off', true) END FROM written
"""  # noqa: S608

# LAST_INSERT_ID with an argument is MySQL's own way to read a counter back; the update's answer brings it. Nothing is
# read before the lock is had, so that the isolation level is all one, and everyone waits at that lock first, so that
# nobody can wait in a circle.
_APPEND_MYSQL = f"""
START TRANSACTION;
UPDATE {NEXT} SET next = LAST_INSERT_ID(next) + 1;
INSERT INTO {JOURNAL} (number, entry) VALUES (LAST_INSERT_ID(), %s);
COMMIT
"""  # noqa: S608


class SqlJournalBackend(BaseJournalBackend):
    """Backend of `optuna.storages.JournalStorage` in a table of PostgreSQL, MySQL or MariaDB, which is made when it is
    missing.

    There are no snapshots, which would be pickles: a worker reads the whole journal when it starts.

    Args:
        url: SQLAlchemy's URL of the database, such as ``postgresql+psycopg://user:password@host/studies``.

    Attributes:
        engine: SQLAlchemy's engine, which holds the connections.

    Raises:
        ConfigError: Another database, or a driver of MySQL that cannot send several statements at once. ImportError:
        The driver is missing. sqlalchemy.exc.SQLAlchemyError: The server does not answer, or another process made the
        tables at the same moment.
    """

    def __init__(self, url: str) -> None:
        import sqlalchemy

        kind, driver = (parsed := sqlalchemy.make_url(url)).get_backend_name(), parsed.get_driver_name()
        if kind not in DATABASES:
            raise ConfigError(f"a journal is kept in {', '.join(DATABASES)}, not in {kind}")
        options: dict[str, Any] = {}
        if kind != "postgresql":
            if driver not in MYSQL_DRIVERS:
                raise ConfigError(
                    f"a journal in MySQL is written by one of the drivers {', '.join(MYSQL_DRIVERS)}, not by {driver}"
                )
            options = {"client_flag": MULTI_STATEMENTS}
        self.engine = sqlalchemy.create_engine(
            parsed, isolation_level="AUTOCOMMIT", pool_pre_ping=False, pool_reset_on_return=None, connect_args=options
        )
        self._postgresql = kind == "postgresql"
        self._last: tuple[int, str] | None = None  # an entry that was seen
        self._own = threading.local()
        self._make_tables()

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Entries from a number on.

        Raises:
            ArtifactError: Entries are missing in the table, or the server lost some that were seen before.
        """
        own = getattr(self._own, "entry", None)
        self._own.entry = None
        if (
            own is not None and own[0] == log_number_from
        ):  # Optuna reads after every append: nobody else wrote in between
            return [json.loads(own[1])]
        with self._cursor() as cursor:
            rows = self._execute(cursor, _READ, log_number_from).fetchall()
        if [number for number, _ in rows] != list(range(log_number_from, log_number_from + len(rows))):
            raise ArtifactError(
                f"entries of the journal are missing in the table {JOURNAL} from number {log_number_from} on"
            )
        if rows:
            self._last = (rows[-1][0], rows[-1][1])
        return [json.loads(entry) for _, entry in rows]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write entries, each in a transaction of its own; Optuna hands over one at a time.

        Raises:
            ArtifactError: The server lost entries that were seen before.
        """
        for log in logs:
            entry = json.dumps(log, separators=(",", ":"))
            with self._cursor() as cursor:
                if self._postgresql:
                    ends = log.get("op_code") == JournalOperation.SET_TRIAL_STATE_VALUES
                    number = self._execute(cursor, _APPEND_POSTGRESQL, entry, ends).fetchone()[0]
                else:
                    self._execute(cursor, _APPEND_MYSQL, entry)
                    cursor.nextset()
                    number = cursor.lastrowid
                    while cursor.nextset():  # raises what a later statement failed with
                        pass
            self._last = self._own.entry = (number, entry)

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Any]:
        """A cursor of the driver's on a connection of the pool, which is closed when anything fails: what it had begun
        is undone."""
        connection = self.engine.raw_connection()
        try:
            cursor = connection.cursor()
            if not connection.info.get("checked"):
                self._check(connection, cursor)
            yield cursor
            cursor.close()
        except BaseException:
            connection.invalidate()
            raise
        connection.close()

    def _check(self, connection: PoolProxiedConnection, cursor: Any) -> None:
        """Once a connection, since no connection outlives a crash of the server: numbers mean what they did before."""
        if self._postgresql:
            cursor.execute(
                "SET default_transaction_isolation = 'read committed'"
            )  # or an update that waited for another one fails
        if self._last is not None:
            cursor.execute(f"SELECT entry FROM {JOURNAL} WHERE number = %s", (self._last[0],))  # noqa: S608
            if cursor.fetchone() != (self._last[1],):
                raise ArtifactError(
                    "the database has lost the end of the journal, as after a crash of its server: start this worker "
                    "again, it goes on "
                    "from what is left"
                )
        connection.info["checked"] = True

    def _execute(self, cursor: Any, statement: str, *parameters: Any) -> Any:
        """The driver's own way: SQLAlchemy has none to the later answers when several statements are sent at once."""
        cursor.execute(statement, parameters)
        return cursor

    def _make_tables(self) -> None:
        import sqlalchemy as sa
        from sqlalchemy.dialects.mysql import LONGTEXT

        def number(name: str) -> sa.Column[int]:
            return sa.Column(name, sa.BigInteger(), primary_key=name != "next", autoincrement=False, nullable=False)

        tables, text = sa.MetaData(), sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")
        engine: Any = {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}  # the one with transactions
        sa.Table(JOURNAL, tables, number("number"), sa.Column("entry", text, nullable=False), **engine)
        counter = sa.Table(NEXT, tables, number("id"), number("next"), **engine)
        tables.create_all(self.engine)
        with self.engine.connect() as connection:
            if connection.execute(sa.select(counter)).first() is None:
                connection.execute(counter.insert().values(id=1, next=0))
