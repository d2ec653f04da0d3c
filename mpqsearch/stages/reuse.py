"""One way to reuse what a run folder holds or to make it: all stages go through `reuse_or_make`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mpqsearch import artifacts
from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.errors import ArtifactError
from mpqsearch.stages.base import Run, log

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A kind of artifact: its schema, and how it is read and written."""

    schema: str
    load: Callable[[Path], T]
    save: Callable[[Path, T, Mapping[str, str]], None]


def plain(schema: str, files: Callable[[Path, Any], Iterable[Path]] = lambda _path, _data: ()) -> Kind[Any]:
    """A kind of artifact that is plain data in an envelope; ``files`` of (path, data) are those that belong to it, and
    without which it counts for nothing."""

    def load(path: Path) -> Any:
        artifact = artifacts.read_json(path, schema)
        artifact.check_files(path)
        return artifact.data

    return Kind(
        schema,
        load,
        lambda path, data, inputs: artifacts.write_json(path, schema, data, inputs, files(path, data)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAllocation:
    """A bit map with what ``allocation.json`` says of it; ``extra`` goes into ``bitmap.json`` for other programs."""

    bit_map: BitMap
    data: dict[str, Any]
    extra: Mapping[str, Any] | None = None


def _load_allocation(path: Path) -> SavedAllocation:
    artifact = artifacts.read_json(path, ALLOCATION.schema)
    artifact.check_files(path)
    return SavedAllocation(bit_map=artifacts.load_bit_map(path.with_name("bitmap.json")), data=artifact.data)


def _save_allocation(path: Path, solved: SavedAllocation, inputs: Mapping[str, str]) -> None:
    """The map first: ``allocation.json`` says that both are whole."""
    file = path.with_name("bitmap.json")
    artifacts.save_bit_map(file, solved.bit_map, inputs, solved.extra)
    artifacts.write_json(path, ALLOCATION.schema, solved.data, inputs, [file])


LAYERS: Kind[LayerTable] = Kind("mpqsearch/layers", artifacts.load_layers, artifacts.save_layers)
PROFILE: Kind[SensitivityProfile] = Kind("mpqsearch/profile", artifacts.load_profile, artifacts.save_profile)
ALLOCATION: Kind[SavedAllocation] = Kind("mpqsearch/allocation", _load_allocation, _save_allocation)


def _load_gradients(path: Path) -> dict[str, Tensor]:
    artifacts.read_json(path, GRADIENTS.schema).check_files(path)
    return artifacts.read_tensors(path.with_suffix(".safetensors"))


def _save_gradients(path: Path, moments: Mapping[str, Tensor], inputs: Mapping[str, str]) -> None:
    artifacts.save_tensors(path, GRADIENTS.schema, moments, inputs)


GRADIENTS: Kind[Mapping[str, Tensor]] = Kind("mpqsearch/gradients", _load_gradients, _save_gradients)


def _measured(path: Path, _data: Any) -> Iterable[Path]:
    """What belongs to metrics: of a map its features and pictures, of a training the student and its log."""
    folder = path.parent
    if folder.name == "metrics":
        features = folder.parent / "stats" / f"{path.stem}.npz"
        return [features] if features.is_file() else []
    if folder.parent.name != "distilled":
        return []
    unfinished = (path, folder / "latest.json", *folder.glob("ckpt-*/*"))  # from which a training goes on
    return sorted(p for p in folder.rglob("*") if p.is_file() and p not in unfinished)


METRICS = plain("mpqsearch/metrics", _measured)
SEARCH = plain("mpqsearch/search", lambda path, _: sorted([*path.parent.glob("*.csv"), *path.parent.glob("maps/*")]))
EXPORT = plain("mpqsearch/export", lambda path, data: [path.with_suffix("") / name for name in data["files"]])
PARETO = plain("mpqsearch/pareto")


def reuse_or_make(
    run: Run, kind: Kind[T], path: Path, inputs: Mapping[str, str], make: Callable[[], T], *, stage: str = ""
) -> T:
    """What ``path`` holds when it was made from exactly ``inputs``; else what ``make`` returns, written there.

    A dry run writes nothing. With ``stage`` one line says that the file was reused. Raises `StaleArtifactError` when
    the file was made from other inputs, unless the run may overwrite, and `ArtifactError`, naming the verb, for a
    missing one where the run only reads.
    """
    if artifacts.is_current(path, kind.schema, inputs, overwrite=run.overwrite):
        with suppress(ArtifactError) if run.overwrite else nullcontext():
            found = kind.load(path)
            if stage:
                run.say(f"{stage}: reused {path}")
            return found
    if run.reads_only:
        raise artifacts.absent(path, kind.schema)
    if run.path("pareto.json").exists() and not path.exists():
        verb = artifacts.verb_of(path, kind.schema)
        run.say(f"{path} is missing from a finished run or was never made: it is made now (mpqsearch {verb})")
    made = make()
    if not run.dry_run:
        kind.save(path, made, inputs)
    return made


def current(kind: Kind[T], path: Path, inputs: Mapping[str, str]) -> T | None:
    """What ``path`` holds when it was made from exactly ``inputs``; None for a missing file, one from other inputs, and
    one that is not whole, which the caller makes again."""
    if not artifacts.is_current(path, kind.schema, inputs, overwrite=True):
        return None
    try:
        return kind.load(path)
    except ArtifactError as error:
        log.warning("%s", error)
        return None
