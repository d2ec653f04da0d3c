"""Servers of the tests' own that a study can live on: temporary folder, random port, unprivileged user, and a password
where there are users."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PASSWORD = "s3cret-w0rd"

DRIVERS = {
    "postgresql": ("psycopg", "psycopg2"),
    "mysql": ("pymysql", "MySQLdb"),
    "redis": ("redis",),
    "grpc": ("grpc",),
}
"""Kinds of servers, and the packages of which one must be installed."""

JOURNAL = "journal+"
KINDS = (*DRIVERS, f"{JOURNAL}postgresql", f"{JOURNAL}mysql")
"""Kinds of storages: what a server holds, and journals in the two databases."""

USERS = {"postgresql": ("postgres", "nobody"), "mysql": ("mysql", "nobody"), "redis": (), "grpc": ()}
"""Who runs a server that refuses to run as root."""


def missing(kind: str) -> str:
    """Why there can be no server for such a storage here, or nothing."""
    kind = kind.removeprefix(JOURNAL)
    if not any(importlib.util.find_spec(name) for name in DRIVERS[kind]):
        return f"no driver for {kind}: pip install {DRIVERS[kind][0]}"
    if kind == "postgresql" and not _postgres_programs():
        return "no PostgreSQL server: apt-get install postgresql"
    if kind == "mysql" and not _mysql_programs():
        return "no MariaDB server: apt-get install mariadb-server"
    if kind == "redis" and not shutil.which("redis-server"):
        return "no Redis server: apt-get install redis-server"
    if USERS[kind] and os.getuid() == 0 and _unprivileged(kind) is None:
        return f"{kind} refuses to run as root, and there is no user {' or '.join(USERS[kind])}"
    return ""


@contextlib.contextmanager
def server(kind: str) -> Iterator[str]:
    """Start the server of a storage and yield its URL, with a password in it where it has users."""
    with _SERVERS[kind.removeprefix(JOURNAL)]() as url:
        yield JOURNAL + url if kind.startswith(JOURNAL) else url


@dataclass
class _Place:
    """A folder of the server's user, a free port, and commands that run as that user in the folder."""

    kind: str
    user: str | None = field(init=False)
    folder: Path = field(init=False)
    port: int = field(init=False)

    def __enter__(self) -> _Place:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.kind}-"))
        self.user = _unprivileged(self.kind) if os.getuid() == 0 else None
        self.own(self.folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def own(self, path: Path) -> None:
        if self.user is not None:
            shutil.chown(path, user=self.user)

    def run(self, *command: str, text: str | None = None) -> None:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        subprocess.run(command, check=True, user=self.user, cwd=self.folder, input=text, text=True, timeout=60, **pipes)

    @contextlib.contextmanager
    def serving(self, *command: str, ready: Callable[[], bool]) -> Iterator[None]:
        """Run a server in the foreground of a process, from when it is ready."""
        log = self.folder / "log"
        with log.open("ab") as handle:
            process = subprocess.Popen(command, user=self.user, cwd=self.folder, stdout=handle, stderr=handle)
        try:
            end = time.monotonic() + 60
            while not ready():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{self.kind} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextlib.contextmanager
def _postgres() -> Iterator[str]:
    with _Place("postgresql") as place:
        programs, data, secret = _postgres_programs(), place.folder / "data", place.folder / "password"
        secret.write_text(PASSWORD + "\n")
        place.own(secret)
        users = ("-U", "search", "-A", "scram-sha-256", f"--pwfile={secret}")
        place.run(f"{programs}/initdb", "-D", str(data), *users, "--no-sync", "-E", "UTF8")
        options = f"-p {place.port} -h 127.0.0.1 -k {place.folder} -c fsync=off"
        place.run(f"{programs}/pg_ctl", "-D", str(data), "-o", options, "-l", str(place.folder / "log"), "-w", "start")
        try:
            yield f"postgresql://search:{PASSWORD}@127.0.0.1:{place.port}/postgres"
        finally:
            place.run(f"{programs}/pg_ctl", "-D", str(data), "-m", "immediate", "stop")


@contextlib.contextmanager
def _mysql() -> Iterator[str]:
    with _Place("mysql") as place:
        install, daemon, client = _mysql_programs()
        data, door = place.folder / "data", place.folder / "socket"
        place.run(
            install, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal", "--skip-test-db"
        )
        options = (
            "--no-defaults",
            f"--datadir={data}",
            f"--socket={door}",
            f"--port={place.port}",
            "--bind-address=127.0.0.1",
        )
        with place.serving(
            daemon, *options, "--innodb-flush-log-at-trx-commit=0", ready=lambda: door.exists() and place.answers()
        ):
            who = f"'search'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'"
            orders = f"CREATE DATABASE studies; CREATE USER {who}; GRANT ALL ON studies.* TO 'search'@'127.0.0.1';"
            place.run(client, "--no-defaults", f"--socket={door}", "-u", "root", text=orders)
            yield f"mysql://search:{PASSWORD}@127.0.0.1:{place.port}/studies"


@contextlib.contextmanager
def _redis() -> Iterator[str]:
    with _Place("redis") as place:
        options = (
            "--port",
            str(place.port),
            "--bind",
            "127.0.0.1",
            "--requirepass",
            PASSWORD,
            "--save",
            "",
            "--appendonly",
            "no",
        )
        with place.serving("redis-server", *options, ready=place.answers):
            yield f"redis://:{PASSWORD}@127.0.0.1:{place.port}/0"


@contextlib.contextmanager
def _grpc() -> Iterator[str]:
    """Optuna's proxy before a journal file, by the command of the guide; a database behind it differs in nothing that a
    worker sees."""
    with _Place("grpc") as place:
        behind = f"open_storage({str(place.folder / 'journal')!r})"
        serve = f"optuna.storages.run_grpc_proxy_server({behind}, host='127.0.0.1', port={place.port})"
        code = f"import optuna; from mpqsearch.search.storage import open_storage; {serve}"
        with place.serving(sys.executable, "-c", code, ready=place.answers):
            yield f"grpc://127.0.0.1:{place.port}"


_SERVERS = {"postgresql": _postgres, "mysql": _mysql, "redis": _redis, "grpc": _grpc}


def _postgres_programs() -> str:
    found = shutil.which("initdb")
    if found and shutil.which("pg_ctl"):
        return str(Path(found).parent)
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[4])
    )  # Debian's place, off the path
    return str(folders[-1].parent) if folders else ""


def _mysql_programs() -> tuple[str, ...]:
    """Installer, server and client, or nothing when one is missing."""
    everywhere = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))
    found = [shutil.which(name, path=everywhere) for name in ("mariadb-install-db", "mariadbd", "mariadb")]
    return tuple(name for name in found if name) if all(found) else ()


def _unprivileged(kind: str) -> str | None:
    for name in USERS[kind]:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None
