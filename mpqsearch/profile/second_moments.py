"""Second moments of the inputs of all layers, or of as many layers at a time as a memory limit holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mpqsearch.core import LayerTable, SensitivityProfile
from mpqsearch.models import Denoiser
from mpqsearch.profile.calibrate import rehearse, run_sampler
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import RowStatistics, Statistics


def statistics_of(profile: SensitivityProfile) -> dict[str, RowStatistics]:
    """What a profile knows of the inputs of layers: means and largest magnitudes, no second moments."""
    return {
        name: RowStatistics(
            second_moment=torch.empty(0),
            mean=torch.from_numpy(np.array(mean)),
            input_max=torch.from_numpy(np.array(profile.input_max[name])),
        )
        for name, mean in profile.means.items()
    }


@torch.no_grad()
def input_statistics(
    denoiser: Denoiser,
    table: LayerTable,
    seeds: Sequence[int],
    *,
    progress: Progress = silent,
) -> Mapping[str, RowStatistics]:
    """Second moments, means and largest magnitudes of the inputs of all layers that run while the model samples.

    Takes ``D**2`` float64 numbers for a layer of fan-in ``D``; `SecondMoments` holds some layers at a time.
    Class-conditional models want seeds that cover all classes: layers that see nothing but the class and the timestep
    have few different inputs, and every one that is missing is one that codes are not chosen for.
    """
    rehearse(denoiser)
    with InputCollector(denoiser.module, table) as collector:
        run_sampler(denoiser, seeds, "input moments", progress)
    return collector.statistics()


WORKING = 40
"""Bytes that GPTQ rounding takes for each number of a layer's second moment: itself, damped, ordered, inverted, in
float32."""


def beyond_limit(table: LayerTable, limit: int | None, working: int = WORKING) -> tuple[str, ...]:
    """Layers of which ``limit`` bytes do not hold a second moment, at ``working`` bytes for each of its numbers."""
    sizes = {la.name: la.groups * la.weights_per_channel**2 * working for la in table}
    return () if limit is None else tuple(name for name, size in sizes.items() if size > limit)


@dataclass
class SecondMoments(Mapping[str, RowStatistics]):
    """`input_statistics` of as many layers at a time as ``limit`` bytes hold; the model runs anew for each group of
    consecutive layers.

    Read in the order of the table, each group is measured once. Of layers whose second moment alone is beyond the limit
    (``left_out``) and of those that never run there is what ``known`` says, or nothing: GPTQ rounds them to nearest.
    Without a limit all layers are one group. ``working``: bytes for each number of a second moment that is worked on.
    ``known`` are the statistics of a profile: smoothing follows the largest magnitudes that it has seen.
    """

    denoiser: Denoiser
    table: LayerTable
    seeds: Sequence[int]
    limit: int | None = None
    working: int = WORKING
    known: Statistics = field(default_factory=dict)
    progress: Progress = silent
    _held: tuple[int, Mapping[str, RowStatistics]] = field(default=(-1, {}), init=False, repr=False)

    def __post_init__(self) -> None:
        self._group: dict[str, int] = {}
        room, group, beyond = self.limit or 0, 0, set(self.left_out)
        for layer in self.table:
            if layer.name in beyond:
                continue
            size = layer.groups * layer.weights_per_channel**2
            if self.limit is not None:
                if size * self.working > room:
                    room, group = self.limit, group + 1
                room -= size * 8
            self._group[layer.name] = group

    @property
    def left_out(self) -> tuple[str, ...]:
        """Layers whose second moment is beyond the limit."""
        return beyond_limit(self.table, self.limit, self.working)

    def __getitem__(self, name: str) -> RowStatistics:
        measured = self._measured(name) if name in self._group else None
        if measured is None:
            return self.known[name]
        return replace(measured, input_max=self.known[name].input_max) if name in self.known else measured

    def _measured(self, name: str) -> RowStatistics | None:
        group = self._group[name]
        if self._held[0] != group:
            self._held = (-1, {})  # the old group goes before the new one comes
            part = replace(self.table, layers=tuple(la for la in self.table if self._group.get(la.name) == group))
            self._held = (
                group,
                input_statistics(self.denoiser, part, self.seeds, progress=self.progress),
            )
        return self._held[1].get(name)

    def __iter__(self) -> Iterator[str]:
        return (la.name for la in self.table if la.name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
