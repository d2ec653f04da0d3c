"""What was measured, by digest: in memory, and in one file that the workers of a search share."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mpqsearch import artifacts

FILE = "values.jsonl"
"""Name of the file: a line of JSON a value, appended as they are measured."""

_APPENDING = 2**40
"""Place in the file whose lock whoever appends holds; those of values lie below. Locks need no bytes under them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``values`` by name or in order of the seeds, and what they cost: forward passes of the denoiser on one sample."""

    values: Mapping[str, float] | tuple[float, ...]
    forwards: int


class EvaluationCache:
    """Measured values by digest, in memory and in ``folder / "values.jsonl"``, which workers share; without a folder,
    in memory only.

    `measure` locks a place in the file that stands for the value while it works, so that of several processes that want
    the same value one measures and the others wait for it. The locks belong to the kernel: they go when their holder is
    killed. A line that a killed process or a power cut has torn is no value, and is measured again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.hits = 0
        self.misses = 0
        self._memory: dict[str, Measured] = {}
        self._guard = threading.Lock()
        self._file: FileIO | None = None
        self._seen = 0  # bytes of the file that are in memory

    def measure(self, key: str, make: Callable[[], Measured]) -> tuple[Measured, bool]:
        """The value of ``key``, a digest, and whether it was made now.

        Raises:
            ArtifactError: The file cannot be written.
        """
        with self._guard:
            known, made = self._memory.get(key), False
            if known is None:
                known, made = self._shared(key, make)
                self._memory[key] = known
            self.hits += not made
            self.misses += made
            return known, made

    def _shared(self, key: str, make: Callable[[], Measured]) -> tuple[Measured, bool]:
        """The value by whichever process comes first, and whether it was this one."""
        if self.folder is None:
            return make(), True
        with self._locked(int(key[:10], 16)) as file:
            self._take_in(file)
            if key in self._memory:
                return self._memory[key], False
            value = make()
            self._append(file, key, value)
            return value, True

    def _take_in(self, file: FileIO) -> None:
        """Take what was appended since the last look into memory, up to the last whole line."""
        size = os.fstat(file.fileno()).st_size
        if size <= self._seen:
            return
        whole = os.pread(file.fileno(), size - self._seen, self._seen).rpartition(b"\n")[0]
        self._seen += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: measured again when it is asked for
                entry = json.loads(line)
                values = entry["values"]
                known = Measured(
                    values=tuple(values) if isinstance(values, list) else values, forwards=int(entry["forwards"])
                )
                self._memory.setdefault(str(entry["evaluation"]), known)

    def _append(self, file: FileIO, key: str, value: Measured) -> None:
        entry = {"evaluation": key, "values": value.values, "forwards": value.forwards}
        line = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._locked(_APPENDING), self._said_plainly():
            size = os.fstat(file.fileno()).st_size
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # what a killed process has torn ends here
                line = b"\n" + line
            file.write(line)

    @contextlib.contextmanager
    def _locked(self, place: int) -> Iterator[FileIO]:
        """The file, with one place in it locked against all other processes and caches."""
        with self._said_plainly():
            if self._file is None:
                assert self.folder is not None
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = (self.folder / FILE).open("ab+", buffering=0)
            _lock(self._file.fileno(), place, fcntl.F_WRLCK)
        try:
            yield self._file
        finally:
            _lock(self._file.fileno(), place, fcntl.F_UNLCK)

    @contextlib.contextmanager
    def _said_plainly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            assert self.folder is not None
            raise artifacts.disk_error(self.folder / FILE, error) from error


def _lock(file: int, place: int, kind: int) -> None:
    """Lock or unlock one byte of a file, waiting for whoever has it."""
    if hasattr(
        fcntl, "F_OFD_SETLKW"
    ):  # Linux's belong to the open file, so that two caches of one process have their own
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi", kind, os.SEEK_SET, place, 1, 0))
    else:
        fcntl.lockf(file, fcntl.LOCK_EX if kind == fcntl.F_WRLCK else fcntl.LOCK_UN, 1, place)
