"""Every verb of one study on one device, in this process, with its time and its peak of memory."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from mpqsearch.cli import app
from tests.support.roads import ARGUMENTS, Road


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a verb took. ``peak_mb``: of tensors on a CUDA device; elsewhere of the process since it began."""

    model: str
    device: str
    verb: str
    seconds: float
    peak_mb: float


def walk(road: Road, model: str, device: str, verbs: Iterable[str] = tuple(ARGUMENTS)) -> list[Row]:
    """Run ``verbs`` in turn in the run folder of ``road``. Raises what a verb raises, and `AssertionError` when one
    ends with another exit code than 0."""
    return [_measured(road.command(verb, device=device), model, device, verb) for verb in verbs]


def _measured(command: Sequence[str], model: str, device: str, verb: str) -> Row:
    gc.collect()
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = app(list(command), prog_name="mpqsearch", standalone_mode=False)
    if on_cuda:
        torch.cuda.synchronize(device)
    assert not code, f"{' '.join(command)} ended with {code}"
    return Row(
        model=model,
        device=device,
        verb=verb,
        seconds=round(time.perf_counter() - began, 3),
        peak_mb=round((torch.cuda.max_memory_allocated(device) if on_cuda else _peak_of_process()) / 1e6, 1),
    )


def _peak_of_process() -> int:
    """Bytes; Linux counts in kilobytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """``verbs.csv`` and ``verbs.md``, the same table twice."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(Row)]
    with (folder / "verbs.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [names, ["---"] * len(names), *([str(v) for v in asdict(row).values()] for row in rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (folder / "verbs.md").write_text(text)
