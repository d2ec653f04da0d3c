"""A PostgreSQL server of the tests' own: temporary folder, random port, unprivileged user, and a password."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PASSWORD = "s3cret-w0rd"
USERS = ("postgres", "nobody")
"""Who runs the server, which refuses to run as root."""


def missing() -> str:
    """Why there can be no server here, or nothing."""
    if not any(importlib.util.find_spec(name) for name in ("psycopg", "psycopg2")):
        return "no driver for PostgreSQL: pip install 'mpqsearch[postgres]'"
    if not _programs():
        return "no PostgreSQL server: apt-get install postgresql"
    if os.getuid() == 0 and _unprivileged() is None:
        return f"PostgreSQL refuses to run as root, and there is no user {' or '.join(USERS)}"
    return ""


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Start the server and yield its URL, with a password in it."""
    user = _unprivileged() if os.getuid() == 0 else None
    programs, folder = _programs(), Path(tempfile.mkdtemp(prefix="postgresql-"))
    data, secret = folder / "data", folder / "password"
    secret.write_text(PASSWORD + "\n")
    for path in (folder, secret) if user is not None else ():
        shutil.chown(path, user=user)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, user=user, cwd=folder, timeout=60, stdout=subprocess.DEVNULL)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        users = ("-U", "search", "-A", "scram-sha-256", f"--pwfile={secret}")
        run(f"{programs}/initdb", "-D", str(data), *users, "--no-sync", "-E", "UTF8")
        options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"
        run(f"{programs}/pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://search:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run(f"{programs}/pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> str:
    found = shutil.which("initdb")
    if found and shutil.which("pg_ctl"):
        return str(Path(found).parent)
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")  # off the path
    folders = sorted(debian, key=lambda p: int(p.parts[4]))
    return str(folders[-1].parent) if folders else ""


def _unprivileged() -> str | None:
    for name in USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None
