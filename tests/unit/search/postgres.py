"""A PostgreSQL server of the test's own: temporary folder, random port, unprivileged user, password required."""

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


def missing() -> str:
    """Why there can be no server here, or nothing."""
    if importlib.util.find_spec("psycopg") is None and importlib.util.find_spec("psycopg2") is None:
        return "no PostgreSQL driver: pip install 'psycopg[binary]'"
    if not _programs():
        return "no PostgreSQL server: apt-get install postgresql"
    if os.getuid() == 0 and _unprivileged() is None:
        return "PostgreSQL refuses to run as root, and there is no user 'postgres' or 'nobody'"
    return ""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Start a server and yield the URL of its database, with the password in it."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    user = _unprivileged() if os.getuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user=user)
    programs, data, secret = _programs(), folder / "data", folder / "password"
    secret.write_text(PASSWORD + "\n")
    if user is not None:
        shutil.chown(secret, user=user)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)

    try:
        run(
            f"{programs}/initdb",
            "-D",
            str(data),
            "-U",
            "search",
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
            "--no-sync",
            "-E",
            "UTF8",
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[4])
    )  # Debian's place, off the path
    return str(folders[-1].parent) if folders else ""


def _unprivileged() -> str | None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None
