"""Weight errors under a memory limit: made again at every look, some rows of a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.quant import RowQuantizer

COPIES = 8
"""Copies of a row that are in memory while its error is made: as it is scaled, its codes, what they decode to, and
temporaries."""


class RecomputedErrors(Mapping[str, Tensor]):
    """Layer -> weight errors ``[W, C, D]`` that are made again at every look, so that no more than those of some rows
    are in memory.

    ``make`` is called with the name of a layer and a slice of its rows, ``blocks`` says in which slices `error_blocks`
    goes through a layer. The numbers are those of the errors that it stands for; `width_quantizers` keeps what the
    range search found, so that it is not done again.
    """

    def __init__(
        self, names: Sequence[str], make: Callable[[str, slice], Tensor], blocks: Callable[[str], Sequence[slice]]
    ) -> None:
        self._names, self._make, self.blocks = tuple(names), make, blocks

    def __getitem__(self, name: str) -> Tensor:
        """The errors of one layer, all rows at once; `KeyError` for a layer that is not among them."""
        return torch.cat([self.part(name, rows) for rows in self.blocks(name)], 1)

    def part(self, name: str, rows: slice) -> Tensor:
        """The errors ``[W, c, D]`` of some rows of a layer; `KeyError` for a layer that is not among them."""
        if name not in self._names:
            raise KeyError(name)
        return self._make(name, rows)

    def __contains__(self, name: object) -> bool:
        """Whether the layer is among them; nothing is made."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def error_part(errors: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
    """Errors ``[W, c, D]`` of some rows of a layer, held or made again."""
    return errors.part(name, rows) if isinstance(errors, RecomputedErrors) else errors[name][:, rows]


def error_rows(errors: Mapping[str, Tensor], layer: LayerSpec) -> Sequence[slice]:
    """The slices of rows in which the errors of a layer are to be looked at: one, when they are held."""
    return errors.blocks(layer.name) if isinstance(errors, RecomputedErrors) else [slice(0, layer.n_channels)]


def row_blocks(layer: LayerSpec, n_candidates: int, room: int | None) -> list[slice]:
    """Slices of a layer's rows whose errors under ``n_candidates`` quantizers, with what making them takes, fit
    ``room`` bytes; or single rows.

    A slice is of whole groups, or lies inside one. One slice without a limit.
    """
    if room is None:
        return [slice(0, layer.n_channels)]
    return slices_of(layer, room // row_bytes(layer, n_candidates))


def slices_of(layer: LayerSpec, size: int) -> list[slice]:
    """All rows of a layer in slices of at most ``size`` of them (at least one), each of whole groups or inside one."""
    size, group = max(1, size), layer.n_channels // layer.groups
    if size >= group:
        step = size // group * group
        return [slice(i, min(i + step, layer.n_channels)) for i in range(0, layer.n_channels, step)]
    return [
        slice(g + i, g + min(i + size, group)) for g in range(0, layer.n_channels, group) for i in range(0, group, size)
    ]


def row_bytes(layer: LayerSpec, n_candidates: int) -> int:
    """What the errors of one row take: those of all candidates, and a handful of copies of the row while they are
    made."""
    return 4 * layer.weights_per_channel * (n_candidates + COPIES)


def joined_quantizers(parts: Sequence[tuple[RowQuantizer, ...]]) -> tuple[RowQuantizer, ...]:
    """The quantizers of all rows, one a width, from those of consecutive slices."""
    return tuple(
        RowQuantizer(
            scale=torch.cat([q.scale for q in same]),
            zero=torch.cat([q.zero for q in same]),
            bits=torch.cat([q.bits for q in same]),
        )
        for same in zip(*parts, strict=True)
    )


def held_bytes(table: LayerTable, n_candidates: int) -> int:
    """What the weight errors of ``n_candidates`` quantizers take in float32 when those of all layers are held."""
    return 4 * n_candidates * table.n_weights
