"""Finished samples on disk: what full precision gave, for every map to be compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mpqsearch import artifacts
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.models.runner import Drawn, Label


class SampleStore:
    """Samples of some seeds in a folder, one file a batch; only one batch is in memory.

    Files are written whole or not at all, so a store that was interrupted continues at the first seed it lacks, and of
    two processes that write the same one the last stays. ``inputs`` are digests of what the samples depend on; a folder
    that was made from others raises `StaleArtifactError`, or is emptied with ``overwrite``.
    """

    def __init__(
        self, folder: Path, seeds: Sequence[int], inputs: Mapping[str, str], *, overwrite: bool = False
    ) -> None:
        self.folder, self.seeds = folder, tuple(int(s) for s in seeds)
        self._last: tuple[str, Drawn] | None = None
        inputs = {**inputs, "seeds": artifacts.digest_of(self.seeds)}
        self._belongs = artifacts.digest_of(inputs)
        about = folder / "samples.json"
        if not artifacts.is_current(about, "mpqsearch/samples", inputs, overwrite=overwrite):
            for file in folder.glob("*-*.npz"):
                file.unlink()
            artifacts.write_json(about, "mpqsearch/samples", {"samples": len(self.seeds)}, inputs)

    @property
    def missing(self) -> tuple[int, ...]:
        """The seeds that are not there yet."""
        spans = self._spans()
        return self.seeds[spans[-1][1] if spans else 0 :]

    def fill(self, batches: Iterable[Drawn]) -> None:
        """Write batches of the missing seeds, in their order."""
        for batch in batches:
            self.add(batch)

    def add(self, batch: Drawn) -> None:
        """Write the next batch; `ConfigError` when it is of other seeds than the next missing ones."""
        missing = self.missing
        if batch.seeds != missing[: len(batch.seeds)] or not batch.seeds:
            raise ConfigError(
                f"the next samples of {self.folder} are of the seeds {missing[:2]}, not {batch.seeds[:2]}"
            )
        arrays = {"latents": batch.latents.numpy()}
        if batch.images is not None:
            arrays["images"] = batch.images.numpy()
        if None not in batch.labels:
            arrays["labels"] = np.array(batch.labels)
        start = len(self.seeds) - len(missing)
        name = _name(start, start + len(batch.seeds))
        artifacts.write_arrays(self.folder / name, arrays, self._belongs + name)

    def batches(self) -> Iterator[Drawn]:
        """The samples as they were written."""
        for start, stop in self._spans():
            yield self.read(start, stop)

    def read(self, start: int, stop: int) -> Drawn:
        """Samples ``start`` to ``stop``, whatever batches they were written in; `ArtifactError` when some are not
        there."""
        stop = min(stop, len(self.seeds))
        parts = [
            _cut(self._file(a, b), max(start - a, 0), min(stop, b) - a)
            for a, b in self._spans()
            if a < stop and b > start
        ]
        if sum(len(part.seeds) for part in parts) != stop - start:
            raise ArtifactError(f"{self.folder} lacks samples {start} to {stop - 1}: run what makes them again")
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _spans(self) -> list[tuple[int, int]]:
        """First sample and end of each file, without gaps from 0 on; of files with the same start the longest."""
        ends: dict[int, int] = {}
        for file in self.folder.glob("*-*.npz"):
            first, end = (int(part) for part in file.stem.split("-"))
            ends[first] = max(end, ends.get(first, 0))
        spans, start = [], 0
        while start in ends:
            spans.append((start, ends[start]))
            start = ends[start]
        return spans

    def _file(self, start: int, stop: int) -> Drawn:
        name = _name(start, stop)
        if self._last is None or self._last[0] != name:  # batches smaller than those written read one file in turn
            arrays = artifacts.read_arrays(self.folder / name, self._belongs + name)
            labels: Sequence[Label] = arrays["labels"].tolist() if "labels" in arrays else [None] * (stop - start)
            drawn = Drawn(
                seeds=self.seeds[start:stop],
                latents=torch.from_numpy(arrays["latents"]),
                images=torch.from_numpy(arrays["images"]) if "images" in arrays else None,
                labels=tuple(labels),
            )
            self._last = (name, drawn)
        return self._last[1]


def _name(start: int, stop: int) -> str:
    return f"{start:06d}-{stop:06d}.npz"


def _cut(batch: Drawn, start: int, stop: int) -> Drawn:
    return Drawn(
        seeds=batch.seeds[start:stop],
        latents=batch.latents[start:stop],
        images=None if batch.images is None else batch.images[start:stop],
        labels=batch.labels[start:stop],
    )


def _joined(parts: Sequence[Drawn]) -> Drawn:
    images = [part.images for part in parts if part.images is not None]
    return Drawn(
        seeds=tuple(seed for part in parts for seed in part.seeds),
        latents=torch.cat([part.latents for part in parts]),
        images=torch.cat(images) if images else None,
        labels=tuple(label for part in parts for label in part.labels),
    )
