"""Checkpoints: tensors in safetensors, the rest in JSON, a folder each, written whole or not at all. Nothing is
pickled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mpqsearch import artifacts
from mpqsearch.errors import ArtifactError
from mpqsearch.untrusted import file_name

SCHEMA = "mpqsearch/checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """State after ``step`` optimiser steps: named ``tensors`` and plain ``data``."""

    step: int
    tensors: Mapping[str, Tensor]
    data: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, inputs: Mapping[str, str]) -> Path:
    """Write ``ckpt-<step>/`` and point ``latest.json`` at it, then delete all but this and the one before it.

    The folder is written under another name, flushed to disk and renamed, so that a kill at any moment leaves the last
    good one in place.
    """
    from safetensors.torch import save

    target = folder / f"ckpt-{checkpoint.step:06d}"
    temporary = folder / f"{target.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    with artifacts.atomic_write(temporary / "state.safetensors") as handle:
        handle.write(save(tensors))
    sha256 = artifacts.digest_file(temporary / "state.safetensors")
    artifacts.write_json(
        temporary / "state.json", SCHEMA, {"step": checkpoint.step, "tensors_sha256": sha256, **checkpoint.data}, inputs
    )
    shutil.rmtree(target, ignore_errors=True)  # the same step again, after a resume from an earlier one
    temporary.rename(target)
    _flush(folder)
    artifacts.write_json(folder / "latest.json", SCHEMA, {"folder": target.name, "step": checkpoint.step}, inputs)
    older = [p for p in _checkpoints(folder) if _step(p) < checkpoint.step]
    later = [p for p in _checkpoints(folder) if _step(p) > checkpoint.step]  # from before a resume at an earlier one
    for path in (*older[:-1], *later):
        shutil.rmtree(path, ignore_errors=True)
    for left in folder.glob("ckpt-*.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    return target


def load_checkpoint(folder: Path, inputs: Mapping[str, str], *, overwrite: bool = False) -> Checkpoint | None:
    """The checkpoint that ``latest.json`` points at, or None when there is none.

    Raises `StaleArtifactError`, naming every setting that differs with both values, when it belongs to another
    training; with ``overwrite`` the checkpoints are deleted instead. Raises `ArtifactError` when it is damaged.
    """
    latest = folder / "latest.json"
    if not latest.is_file():
        return None
    if not artifacts.is_current(latest, SCHEMA, inputs, overwrite=overwrite):
        for old in _checkpoints(folder):
            shutil.rmtree(old, ignore_errors=True)
        latest.unlink()
        return None
    name = str(artifacts.read_json(latest, SCHEMA).data["folder"])
    path = folder / file_name(name, f"{latest}: the checkpoint, which lies in the same folder,", ArtifactError)
    data = dict(artifacts.read_json(path / "state.json", SCHEMA).data)
    side = path / "state.safetensors"
    if not side.is_file() or artifacts.digest_file(side) != data.pop("tensors_sha256"):
        others = [p.name for p in _checkpoints(folder) if p != path]
        raise ArtifactError(
            f"{side} is missing or is not the file that was saved. Delete {path}"
            + (f" and put {others[-1]!r} in {latest.name} to continue from there." if others else " and train again.")
        )
    return Checkpoint(step=int(data.pop("step")), tensors=artifacts.read_tensors(side), data=data)


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, by their step."""
    return sorted((p for p in folder.glob("ckpt-*") if p.is_dir() and ".tmp-" not in p.name), key=_step)


def _step(path: Path) -> int:
    digits = path.name.removeprefix("ckpt-")
    return int(digits) if digits.isdecimal() else -1


def _flush(folder: Path) -> None:
    if os.name == "nt":  # which opens no folders, and keeps their entries by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
