"""Files: versioned envelopes, digests, atomic writes, and the rule for reuse.

Every JSON has the envelope ``{schema, version, created_by, inputs: {name: digest}, data}``. A file is written to a
temporary name in the same folder, flushed to disk and then renamed, so a reader sees the old file or the new one and
never half of one. Nothing is unpickled: JSON, CSV, safetensors and npz without pickle only.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch._version import __version__
from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.errors import ArtifactError, StaleArtifactError

VERSIONS = {
    "mpqsearch/calls": 1,
    "mpqsearch/digests": 1,
    "mpqsearch/layers": 1,
    "mpqsearch/profile": 1,
    "mpqsearch/partial-profile": 1,
    "mpqsearch/final-errors": 2,
    "mpqsearch/allocation": 1,
    "mpqsearch/path": 1,
    "mpqsearch/explanation": 1,
    "mpqsearch/bitmap": 1,
    "mpqsearch/metrics": 1,
    "mpqsearch/pareto": 1,
    "mpqsearch/environment": 1,
    "mpqsearch/statistics": 1,
    "mpqsearch/samples": 1,
    "mpqsearch/picture": 1,
    "mpqsearch/export": 1,
    "mpqsearch/packed": 1,
    "mpqsearch/checkpoint": 1,
    "mpqsearch/activations": 1,
    "mpqsearch/search": 1,
    "mpqsearch/values": 1,
}
"""The newest version of each schema. Readers accept this version and the one before."""

SIDECAR_CHANNELS = 4096
"""Channel vectors of a bit map go into a safetensors file beside the JSON when the model has more channels than this in
all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An envelope read from disk."""

    schema: str
    version: int
    inputs: Mapping[str, str]
    data: Any


def digest_of(value: Any) -> str:
    """SHA-256 of plain JSON data, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes ``path`` when the block ends well, and vanishes when it does not.

    Raises `ArtifactError` when the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = tempfile.NamedTemporaryFile(mode, dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
    except OSError as error:
        raise disk_error(path, error) from error
    temporary = Path(handle.name)
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Like `atomic_write` for libraries that want a path: yields a temporary one with the same suffix."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    except OSError as error:
        raise disk_error(path, error) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as handle:  # Windows flushes what is open for writing only
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic_write(path) as handle:
        handle.write(text.encode())


def csv_text(header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV under ``header``; what a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_json(path: Path, schema: str, data: Any, inputs: Mapping[str, str]) -> None:
    """Write ``data`` in the envelope of ``schema``, made from ``inputs`` (name to digest). NaN and infinity are
    refused."""
    body = {
        "schema": schema,
        "version": VERSIONS[schema],
        "created_by": f"mpqsearch {__version__}",
        "inputs": dict(inputs),
        "data": data,
    }
    try:
        text = json.dumps(body, indent=1, allow_nan=False)
    except ValueError as error:
        raise ArtifactError(f"{path.name} would hold a NaN or an infinity, which no artifact may: {error}") from error
    write_text(path, text + "\n")


def read_json(path: Path, schema: str) -> Artifact:
    """Read an envelope; `ArtifactError` when it is missing, damaged, of another kind or newer than this version
    knows."""
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist; it should be an artifact of the kind {schema!r}. Run the stage that writes it "
            "first."
        )
    try:
        body = json.loads(path.read_bytes())
        found, version = body["schema"], int(body["version"])
        artifact = Artifact(schema=found, version=version, inputs=dict(body["inputs"]), data=body["data"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged or no artifact of mpqsearch ({type(error).__name__}: {error}). Delete it and run the "
            "stage again."
        ) from error
    if found != schema:
        raise ArtifactError(f"{path} holds {found!r}, but {schema!r} is needed")
    newest = VERSIONS[schema]
    if version > newest:
        raise ArtifactError(
            f"{path} has version {version} of {schema!r}; this mpqsearch ({__version__}) reads up to {newest}. "
            "Upgrade it."
        )
    if version < newest - 1:
        raise ArtifactError(
            f"{path} has version {version} of {schema!r}; this mpqsearch reads {newest - 1} and {newest}. Make it "
            "again."
        )
    return artifact


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


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an npz (no pickle) atomically.

    `numpy.savez` takes the names as keywords, so that some cannot be used, and cannot refuse pickles before numpy 2.2.
    """
    with atomic_write(path) as handle, zipfile.ZipFile(handle, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array(part, np.asanyarray(array), allow_pickle=False)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read an npz (no pickle); `ArtifactError` when it is missing or damaged."""
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist, although the JSON beside it does. Delete both and run the stage again."
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Delete it and run the stage again.") from error
    except Exception as error:  # zipfile.BadZipFile and zlib.error have no common base
        raise ArtifactError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it and run the stage again."
        ) from error


def save_layers(path: Path, table: LayerTable, inputs: Mapping[str, str]) -> None:
    """Write ``layers.json``."""
    write_json(path, "mpqsearch/layers", table.to_data(), inputs)


def load_layers(path: Path) -> LayerTable:
    """Read ``layers.json``."""
    data = read_json(path, "mpqsearch/layers").data
    with _whole(path):
        return LayerTable.from_data(data)


def save_profile(path: Path, profile: SensitivityProfile, inputs: Mapping[str, str]) -> None:
    """Write ``profile.json`` and ``profile.npz`` beside it; the JSON last, since it says that both are whole."""
    arrays = {f"arrays:{k}": v for k, v in profile.arrays.items()}
    arrays |= {f"means:{k}": v for k, v in profile.means.items()}
    arrays |= {f"input_max:{k}": v for k, v in profile.input_max.items()}
    side = path.with_suffix(".npz")
    write_arrays(side, arrays)
    write_json(path, "mpqsearch/profile", {**profile.header(), "arrays_sha256": digest_file(side)}, inputs)


def load_profile(path: Path) -> SensitivityProfile:
    """Read ``profile.json`` and ``profile.npz``; the digest of the arrays is checked."""
    data = read_json(path, "mpqsearch/profile").data
    side = path.with_suffix(".npz")
    with _whole(path):
        expected = data["arrays_sha256"]
    arrays = read_arrays(side)
    if digest_file(side) != expected:
        raise ArtifactError(f"{side} is not the file that {path.name} was written with. Delete both and profile again.")
    parts: dict[str, dict[str, NDArray[Any]]] = {"arrays": {}, "means": {}, "input_max": {}}
    for key, array in arrays.items():
        part, name = key.split(":", 1)
        parts[part][name] = array
    with _whole(path):
        return SensitivityProfile(
            model_digest=data["model_digest"],
            names=tuple(data["names"]),
            channels=tuple(data["channels"]),
            widths=tuple(data["widths"]),
            calibration=data["calibration"],
            **parts,
        )


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
    with _whole(path):
        vectors = _sidecar(path, data["sidecar"]) if "sidecar" in data else None
        return BitMap.from_data(data, vectors)


def _sidecar(path: Path, entry: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The channel vectors beside a bit map."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    name = entry["file"]
    side = path.parent / name
    if Path(name).name != name:
        raise ArtifactError(f"{path}: the sidecar {name!r} must lie in the same folder")
    if not side.is_file() or digest_file(side) != entry["sha256"]:
        raise ArtifactError(f"{side} is missing or is not the file that {path.name} was written with")
    try:
        return dict(load_file(side))
    except SafetensorError as error:
        raise ArtifactError(f"{side} is damaged: {error}") from error


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Anything that goes wrong while the content of a file is taken apart is said of the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ArtifactError(
            f"{path} is damaged or was changed by hand ({type(error).__name__}: {error}). Make it again."
        ) from error


def environment(
    libraries: tuple[str, ...] = ("torch", "diffusers", "optuna", "pulp", "highspy", "numpy"),
) -> dict[str, Any]:
    """Versions and machine, for the record that every run keeps."""
    import platform
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
