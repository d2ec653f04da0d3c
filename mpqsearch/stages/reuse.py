"""One way to reuse what a run folder holds or to make it: all stages go through `reuse_or_make`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mpqsearch import artifacts
from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.stages.base import Run

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A kind of artifact: its schema, and how it is read and written."""

    schema: str
    load: Callable[[Path], T]
    save: Callable[[Path, T, Mapping[str, str]], None]


def plain(schema: str) -> Kind[Any]:
    """A kind of artifact that is plain data in an envelope."""
    return Kind(
        schema,
        lambda path: artifacts.read_json(path, schema).data,
        lambda path, data, inputs: artifacts.write_json(path, schema, data, inputs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAllocation:
    """A bit map with what ``allocation.json`` says of it; ``extra`` goes into ``bitmap.json`` for other programs."""

    bit_map: BitMap
    data: dict[str, Any]
    extra: Mapping[str, Any] | None = None


def _load_allocation(path: Path) -> SavedAllocation:
    data = artifacts.read_json(path, ALLOCATION.schema).data
    return SavedAllocation(bit_map=artifacts.load_bit_map(path.with_name("bitmap.json")), data=data)


def _save_allocation(path: Path, solved: SavedAllocation, inputs: Mapping[str, str]) -> None:
    """The map first: ``allocation.json`` says that both are whole."""
    artifacts.save_bit_map(path.with_name("bitmap.json"), solved.bit_map, inputs, solved.extra)
    artifacts.write_json(path, ALLOCATION.schema, solved.data, inputs)


LAYERS: Kind[LayerTable] = Kind("mpqsearch/layers", artifacts.load_layers, artifacts.save_layers)
PROFILE: Kind[SensitivityProfile] = Kind("mpqsearch/profile", artifacts.load_profile, artifacts.save_profile)
ALLOCATION: Kind[SavedAllocation] = Kind("mpqsearch/allocation", _load_allocation, _save_allocation)
METRICS = plain("mpqsearch/metrics")
SEARCH = plain("mpqsearch/search")
EXPORT = plain("mpqsearch/export")


def reuse_or_make(
    run: Run, kind: Kind[T], path: Path, inputs: Mapping[str, str], make: Callable[[], T], *, stage: str = ""
) -> T:
    """What ``path`` holds when it was made from exactly ``inputs``; else what ``make`` returns, written there.

    A dry run writes nothing. With ``stage`` one line says that the file was reused. Raises
    `StaleArtifactError` when the file was made from other inputs, unless the run may overwrite.
    """
    if artifacts.is_current(path, kind.schema, inputs, overwrite=run.overwrite):
        if stage:
            run.say(f"{stage}: reused {path}")
        return kind.load(path)
    made = make()
    if not run.dry_run:
        kind.save(path, made, inputs)
    return made


def current(kind: Kind[T], path: Path, inputs: Mapping[str, str]) -> T | None:
    """What ``path`` holds when it was made from exactly ``inputs``; None for a missing file and one from other inputs,
    which the caller makes again."""
    return kind.load(path) if artifacts.is_current(path, kind.schema, inputs, overwrite=True) else None
