"""Finished parts of a profile on disk, so that a run that was killed continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mpqsearch import artifacts
from mpqsearch.errors import ArtifactError

Arrays = dict[str, NDArray[Any]]
"""Measurements by name, as `SensitivityProfile` has them."""

_SCHEMA = "mpqsearch/partial-profile"


@dataclass
class Partial:
    """Finished parts of a profile (layers, and steps over all layers), a file each, so that a run that was killed
    continues with the next.

    ``inputs`` are the digests that the profile depends on: files of other inputs are not used. A file is written
    atomically, so there is never half a part.
    """

    folder: Path
    inputs: Mapping[str, str]
    _ready: bool = field(default=False, init=False)

    def finished(self) -> int:
        """How many layers are kept."""
        self._open()
        return len(list(self.folder.glob("[0-9]*.npz")))

    def load(self, part: int | str) -> Arrays | None:
        """The arrays of a part, or None when it is still to do: the layer at a position of the table, or a step by
        name. A file that is damaged or of another part is none."""
        self._open()
        try:
            return artifacts.read_arrays(self._path(part), self._belongs(part))
        except ArtifactError:
            return None

    def save(self, part: int | str, arrays: Arrays) -> None:
        """Keep a finished part."""
        self._open()
        artifacts.write_arrays(self._path(part), arrays, self._belongs(part))

    def _belongs(self, part: int | str) -> str:
        return artifacts.digest_of([dict(self.inputs), part])

    def _path(self, part: int | str) -> Path:
        return self.folder / (f"{part:05d}.npz" if isinstance(part, int) else f"{part.replace(' ', '-')}.npz")

    def _open(self) -> None:
        """Check once whose files these are; files of other inputs are deleted."""
        if self._ready:
            return
        head = self.folder / "partial.json"
        if not artifacts.is_current(head, _SCHEMA, self.inputs, overwrite=True):
            for stale in self.folder.glob("*.npz"):
                stale.unlink()
            artifacts.write_json(head, _SCHEMA, {}, self.inputs)
        self._ready = True


def resumed(partial: Partial | None, part: int | str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a part: those that an earlier run kept, or made now and kept."""
    arrays = partial.load(part) if partial is not None else None
    if arrays is None:
        arrays = make()
        if partial is not None:
            partial.save(part, arrays)
    return arrays
