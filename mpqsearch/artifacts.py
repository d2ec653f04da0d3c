"""Files: versioned envelopes, digests, atomic writes, and the rule for reuse.

Every JSON has the envelope ``{schema, version, created_by, inputs: {name: digest}, files: {name: digest}, digest,
data}``: ``files`` are those that were written with it, ``digest`` is of all the rest, so that nothing that was edited
or lost is taken for whole. A file is written to a temporary name in the same folder, flushed to disk and then renamed,
so a reader sees the old file or the new one and never half of one. Nothing is unpickled: JSON, CSV, safetensors and npz
without pickle only.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import platform
import secrets
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from mpqsearch import untrusted
from mpqsearch._version import __version__
from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.errors import ArtifactError, StaleArtifactError
from mpqsearch.untrusted import file_name, quoted

if TYPE_CHECKING:
    from torch import Tensor

VERSIONS = {
    "mpqsearch/calls": 2,
    "mpqsearch/digests": 1,
    "mpqsearch/identity": 1,
    "mpqsearch/layers": 1,
    "mpqsearch/profile": 1,
    "mpqsearch/partial-profile": 1,
    "mpqsearch/gradients": 1,
    "mpqsearch/allocation": 1,
    "mpqsearch/path": 1,
    "mpqsearch/explanation": 1,
    "mpqsearch/bitmap": 1,
    "mpqsearch/measured": 1,
    "mpqsearch/metrics": 1,
    "mpqsearch/pareto": 1,
    "mpqsearch/environment": 1,
    "mpqsearch/samples": 1,
    "mpqsearch/picture": 1,
    "mpqsearch/export": 1,
    "mpqsearch/packed": 2,
    "mpqsearch/checkpoint": 1,
    "mpqsearch/activations": 1,
    "mpqsearch/search": 1,
    "mpqsearch/values": 1,
}
"""The newest version of each schema. Readers accept this version and the one before."""

SIDECAR_CHANNELS = 4096
"""Channel vectors of a bit map go into a safetensors file beside the JSON when the model has more channels than this in
all."""


MADE_BY = {
    "mpqsearch/calls": "record",
    "mpqsearch/layers": "layers",
    "mpqsearch/profile": "profile",
    "mpqsearch/allocation": "allocate",
    "mpqsearch/path": "allocate --path",
    "mpqsearch/explanation": "allocate --explain",
    "mpqsearch/bitmap": "allocate",
    "mpqsearch/metrics": "evaluate",
    "mpqsearch/pareto": "report",
    "mpqsearch/export": "export",
    "mpqsearch/checkpoint": "distill",
    "mpqsearch/search": "search",
}
"""The verb that makes a kind of artifact."""

_MADE_IN = {"distilled": "distill", "search": "search", "metrics": "evaluate", "stats": "evaluate"}
"""The verb that makes what lies in a folder of a run, whatever its kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An envelope read from disk; ``files`` are the digests of those beside it, by their paths from its folder."""

    schema: str
    version: int
    created_by: str = ""
    inputs: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    data: Any

    def check_files(self, path: Path) -> None:
        """Raise `ArtifactError` that names a file of ``path``'s that is missing or is not the one it was written
        with."""
        for name, digest in self.files.items():
            file = Path(os.path.normpath(path.parent / name))
            if not file.is_file():
                raise ArtifactError(f"{file} does not exist, although {path.name} does. {again(path, self.schema)}")
            if digest_file(file) != digest:
                raise ArtifactError(
                    f"{file} is not the file that {path.name} was written with. {again(path, self.schema)}"
                )


def verb_of(path: Path, schema: str = "") -> str:
    """The verb that makes an artifact; empty for what every verb makes that needs it."""
    return next((_MADE_IN[part] for part in path.parts[-3:-1] if part in _MADE_IN), "") or MADE_BY.get(schema, "")


def again(path: Path, schema: str = "") -> str:
    """How an artifact is made again."""
    verb = verb_of(path, schema)
    return f"Make it again: mpqsearch {verb} --overwrite" if verb else "Delete it and run the same command again."


def absent(path: Path, schema: str = "") -> ArtifactError:
    """What is said of an artifact that is not there."""
    verb = verb_of(path, schema)
    how = f"`mpqsearch {verb}` writes it." if verb else "Run the stage that writes it first."
    return ArtifactError(f"{path} does not exist. {how}")


def digest_of(value: Any) -> str:
    """SHA-256 of plain JSON data, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes ``path`` when the block ends well, and vanishes when it does not.

    Raises `ArtifactError` when the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        yield handle


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Like `atomic_write` for libraries that want a path: yields a temporary one with the same suffix."""
    temporary = path.with_name(f"{temporary_prefix()}{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as handle:  # Windows flushes what is open for writing only
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


_TEMPORARY = ".mpqsearch-"
_HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_OLD_S = 86_400


def temporary_prefix() -> str:
    """How the names of this process's temporary files and folders begin."""
    return f"{_TEMPORARY}{_HERE}-{os.getpid()}-"


def sweep(folder: Path) -> list[Path]:
    """Delete what killed processes left half written in ``folder``, and return it: temporary files of processes of this
    machine that are gone, and those of other machines after a day."""
    left = [file for file in folder.rglob(f"{_TEMPORARY}*") if _is_left(file)]
    for file in left:
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        else:
            file.unlink(missing_ok=True)
    return left


def _is_left(file: Path) -> bool:
    machine, _, rest = file.name.removeprefix(_TEMPORARY).partition("-")
    process = rest.partition("-")[0]
    if machine != _HERE or not process.isdecimal() or os.name == "nt":  # where asking for a process would end it
        with contextlib.suppress(OSError):
            return time.time() - file.stat().st_mtime > _OLD_S
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic_write(path) as handle:
        handle.write(text.encode())


def csv_text(header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV under ``header``; what a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(untrusted.cells, rows))
    return text.getvalue()


def write_json(path: Path, schema: str, data: Any, inputs: Mapping[str, str], files: Iterable[Path] = ()) -> None:
    """Write ``data`` in the envelope of ``schema``, made from ``inputs`` (name to digest), with the digests of
    ``files``, which belong to it. NaN and infinity are refused."""
    body = {
        "schema": schema,
        "version": VERSIONS[schema],
        "created_by": f"mpqsearch {__version__}",
        "inputs": dict(inputs),
    }
    if names := {Path(os.path.relpath(f, path.parent)).as_posix(): digest_file(f) for f in files}:
        body["files"] = names
    try:
        body["digest"] = _digest(body, data)
        text = json.dumps(body | {"data": data}, indent=1, allow_nan=False)
    except ValueError as error:
        raise ArtifactError(f"{path.name} would hold a NaN or an infinity, which no artifact may: {error}") from error
    write_text(path, text + "\n")


def _digest(body: Mapping[str, Any], data: Any) -> str:
    """SHA-256 of an envelope without its digest and without the version of the program that wrote it."""
    told = [body[key] for key in ("schema", "version", "inputs")] + [body.get("files", {}), data]
    return hashlib.sha256(json.dumps(told, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def read_json(path: Path, schema: str) -> Artifact:
    """Read an envelope; `ArtifactError` when it is missing, damaged, edited, of another kind or newer than this version
    knows. Its files are not looked at, see `Artifact.check_files`."""
    if not path.exists():
        raise absent(path, schema)
    try:
        body = untrusted.read_json(path)
        artifact = untrusted.build(Artifact, body, f"{path} is damaged or no artifact of mpqsearch")
    except ArtifactError as error:
        raise ArtifactError(f"{error}. {again(path, schema)}") from error
    if artifact.schema != schema:
        raise ArtifactError(f"{path} holds {quoted(artifact.schema)}, but {schema!r} is needed")
    newest, version = VERSIONS[schema], artifact.version
    if version > newest:
        raise ArtifactError(
            f"{path} has version {version} of {schema!r}; this mpqsearch ({__version__}) reads up to {newest}. "
            "Upgrade it."
        )
    if version < newest - 1:
        raise ArtifactError(
            f"{path} has version {version} of {schema!r}; this mpqsearch reads {newest - 1} and {newest}. "
            + again(path, schema)
        )
    unsigned = not artifact.digest and schema in _FOREIGN
    if not unsigned and artifact.digest != _digest(body, artifact.data):
        raise ArtifactError(f"{path} was changed after it was written, or is damaged. {again(path, schema)}")
    return artifact


_FOREIGN = ("mpqsearch/bitmap",)
"""Kinds that other programs may write, which need not give a digest."""


def is_current(path: Path, schema: str, inputs: Mapping[str, str], *, overwrite: bool = False) -> bool:
    """True when ``path`` was made from exactly ``inputs``, False when it must be made.

    Raises `StaleArtifactError`, naming the inputs that differ, when it exists and was made from others; with
    ``overwrite`` that is answered with False instead.
    """
    if not path.exists():
        return False
    if overwrite:
        with contextlib.suppress(ArtifactError):
            return dict(read_json(path, schema).inputs) == dict(inputs)
        return False
    before = read_json(path, schema).inputs
    changed = sorted(k for k in {*before, *inputs} if before.get(k) != inputs.get(k))
    if not changed:
        return True
    described = ", ".join(f"{k} ({_brief(before.get(k))} on disk, {_brief(inputs.get(k))} now)" for k in changed)
    raise StaleArtifactError(
        f"{path} was made from other inputs: {described}. Use another --run-dir, or --overwrite to make it again."
    )


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], belongs: str = "") -> None:
    """Write an npz (no pickle) atomically; ``belongs`` is a digest of what it is a part of, kept in its comment.

    `numpy.savez` takes the names as keywords, so that some cannot be used, and cannot refuse pickles before numpy 2.2.
    """
    with atomic_write(path) as handle, zipfile.ZipFile(handle, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array(part, np.asanyarray(array), allow_pickle=False)
        archive.comment = belongs.encode()


def read_arrays(path: Path, belongs: str = "") -> dict[str, NDArray[Any]]:
    """Read an npz (no pickle); `ArtifactError` when it is missing or damaged, would take more memory than its file
    says, or was not written as a part of what ``belongs`` is the digest of."""
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist, although its JSON file does. Delete that file and run the stage again."
        )
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            whose, left = archive.comment.decode(errors="replace"), path.stat().st_size
            arrays = {}
            for part in archive.infolist():
                left -= part.file_size
                arrays[part.filename.removesuffix(".npy")] = _array(file, part, left)
    except Exception as error:  # zipfile.BadZipFile, struct.error and ValueError have no common base
        raise ArtifactError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it and run the stage again."
        ) from error
    if belongs and whose != belongs:
        raise ArtifactError(f"{path} was written as a part of something else. Delete it and run the stage again.")
    return arrays


def _array(file: IO[bytes], part: zipfile.ZipInfo, left: int) -> NDArray[Any]:
    """One array of an npz, read at once: `zipfile` reads in pieces, which takes twice as long. Its header may not claim
    more bytes than there are; ``left`` are those of the file without this and all earlier arrays."""
    if left < 0:
        raise ValueError(f"{part.filename} claims {part.file_size} bytes, more than the file has")
    if part.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{part.filename} is compressed, which no file of ours is")
    file.seek(part.header_offset + 26)  # in a local header of 30 bytes, the lengths of what stands before the content
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    content = bytearray(part.file_size)
    if file.readinto(content) != part.file_size or zlib.crc32(content) != part.CRC:  # type: ignore[attr-defined]
        raise ValueError(f"{part.filename} has another checksum than was written")
    length, size = (2, "<H") if content[6] == 1 else (4, "<I")  # as numpy.lib.format has it
    start = 8 + length + struct.unpack_from(size, content, 8)[0]
    shape, columns_first, dtype = _npy_header(bytes(content[:start]))
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > len(content) - start:
        raise ValueError(f"{part.filename} claims the shape {shape} of {dtype} in {part.file_size} bytes")
    array: NDArray[Any] = np.frombuffer(content, dtype, math.prod(shape), start)
    return array.reshape(shape, order="F" if columns_first else "C")


@functools.lru_cache(maxsize=1024)
def _npy_header(text: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array; the same few headers stand before the arrays of all layers."""
    file = io.BytesIO(text)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    return read(file)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `ArtifactError` when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise absent(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error


def save_tensors(path: Path, schema: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, str]) -> None:
    """Write tensors to ``path`` with the suffix ``.safetensors``, and last ``path``, which says that they are whole."""
    from safetensors.torch import save

    side = path.with_suffix(".safetensors")
    with atomic_write(side) as handle:
        handle.write(save(dict(tensors)))
    write_json(path, schema, {"tensors": len(tensors)}, inputs, [side])


def save_layers(path: Path, table: LayerTable, inputs: Mapping[str, str]) -> None:
    """Write ``layers.json``."""
    write_json(path, "mpqsearch/layers", table.to_data(), inputs)


def load_layers(path: Path) -> LayerTable:
    """Read ``layers.json``."""
    return untrusted.build(LayerTable, read_json(path, "mpqsearch/layers").data, str(path))


def save_profile(path: Path, profile: SensitivityProfile, inputs: Mapping[str, str]) -> None:
    """Write ``profile.json`` and ``profile.npz`` beside it; the JSON last, since it says that both are whole."""
    arrays = {f"arrays:{k}": v for k, v in profile.arrays.items()}
    arrays |= {f"means:{k}": v for k, v in profile.means.items()}
    arrays |= {f"input_max:{k}": v for k, v in profile.input_max.items()}
    side = path.with_suffix(".npz")
    write_arrays(side, arrays)
    write_json(path, "mpqsearch/profile", profile.header(), inputs, [side])


def load_profile(path: Path) -> SensitivityProfile:
    """Read ``profile.json`` and ``profile.npz``; the digest of the arrays is checked."""
    artifact = read_json(path, "mpqsearch/profile")
    artifact.check_files(path)
    parts: dict[str, dict[str, NDArray[Any]]] = {"arrays": {}, "means": {}, "input_max": {}}
    for key, array in read_arrays(path.with_suffix(".npz")).items():
        part, _, name = key.partition(":")
        parts.setdefault(part, {})[name] = array
    header = untrusted.build(dict, artifact.data, str(path))
    return untrusted.build(SensitivityProfile, {**header, **parts}, str(path))


def save_bit_map(
    path: Path, bit_map: BitMap, inputs: Mapping[str, str], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a bit map; long channel vectors go into a safetensors file of the same name beside it."""
    data = {**bit_map.to_data(), **(extra or {})}
    vectors = {name: w for name, w in bit_map.weights.items() if w.ndim}
    if sum(len(w) for w in vectors.values()) > SIDECAR_CHANNELS:
        from safetensors.numpy import save

        side = path.with_suffix(".safetensors")
        with atomic_write(side) as handle:
            handle.write(save({name: np.ascontiguousarray(w) for name, w in vectors.items()}))
        data["sidecar"] = {"file": side.name, "sha256": digest_file(side)}
        for name in vectors:
            data["layers"][name]["channel_bits"] = {"encoding": "safetensors", "tensor": name}
    write_json(path, "mpqsearch/bitmap", data, inputs)


def load_bit_map(path: Path) -> BitMap:
    """Read a bit map and its sidecar; the sidecar's digest is checked and it must lie in the same folder."""
    data = read_json(path, "mpqsearch/bitmap").data
    sidecar = untrusted.build(_WithSidecar, data, str(path)).get("sidecar")
    vectors = {} if sidecar is None else _sidecar(path, sidecar)
    with untrusted.said_of(path):
        return BitMap.from_data(data, vectors)


class _Sidecar(TypedDict):
    """The file with the channel widths of a map, in its folder."""

    file: str
    sha256: str


class _WithSidecar(TypedDict):
    sidecar: NotRequired[_Sidecar]


def _sidecar(path: Path, entry: _Sidecar) -> dict[str, NDArray[Any]]:
    """The channel vectors beside a bit map."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    side = path.parent / file_name(entry["file"], f"{path}: the sidecar, which lies in the same folder,", ArtifactError)
    if not side.is_file() or digest_file(side) != entry["sha256"]:
        raise ArtifactError(f"{side} is missing or is not the file that {path.name} was written with")
    try:
        return dict(load_file(side))
    except SafetensorError as error:
        raise ArtifactError(f"{side} is damaged: {error}") from error


def environment(
    libraries: tuple[str, ...] = ("torch", "diffusers", "optuna", "pulp", "highspy", "numpy"),
) -> dict[str, Any]:
    """Versions and machine, for the record that every run keeps."""
    from importlib import metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    return {
        "mpqsearch": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "libraries": {name: version(name) for name in libraries},
    }


def _brief(digest: str | None) -> str:
    return "nothing" if digest is None else digest[:10]


def disk_error(path: Path, error: OSError) -> ArtifactError:
    """What is said when a file cannot be written."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return ArtifactError(
            f"the disk is full: {path} was not written. What was finished before is kept; free some space and run the "
            "same command again."
        )
    return ArtifactError(f"cannot write {path}: {error.strerror or error}")
