"""A profile under a memory limit: weight errors are made again at every look, some rows of a layer at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.errors import ConfigError
from mpqsearch.quant import RowQuantizer

COPIES = 8
"""Copies of a row that are in memory while its error is made: as it is scaled, its codes, what they decode to, and
temporaries."""

SCRATCH = 4
"""The part of a memory limit that weight errors may take: one in so many. Second moments may take the rest."""

SUMMED = 20
"""Bytes for each number of a second moment while it is summed up: a product in float32, the same and the sum in
float64."""


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
            ternary=same[0].ternary,
        )
        for same in zip(*parts, strict=True)
    )


def blocks_within(
    module: nn.Module, table: LayerTable, n_candidates: int, limit: int | None, *, second_moments: bool = True
) -> dict[str, list[slice]]:
    """For each layer the slices of its rows whose errors under ``n_candidates`` quantizers fit a memory limit, beside
    the layer's gradient; one slice without a limit.

    Raises `ConfigError` that names the layer and the smallest limit that works, for its gradient and, with
    ``second_moments``, its second moment.
    """
    if limit is None:
        return {la.name: slices_of(la, la.n_channels) for la in table}
    modules: dict[str, Any] = dict(module.named_modules())

    def gradient(layer: LayerSpec) -> int:
        """Autograd gives it in one piece, in the type of the weights; it is used as rows in float32."""
        size = int(modules[layer.name].weight.element_size())
        as_rows = 4 if size != 4 or layer.kind.startswith("ConvTranspose") else 0
        return layer.n_weights * (size + as_rows)

    def least(layer: LayerSpec) -> int:
        squares = layer.groups * layer.weights_per_channel**2 if second_moments else 0
        return max(
            gradient(layer) + row_bytes(layer, n_candidates), squares * SUMMED * SCRATCH // (SCRATCH - 1) + SCRATCH
        )

    largest = max(table, key=least)
    if least(largest) > limit:
        raise ConfigError(
            f"the memory limit of {limit / 1e6:.3g} MB is too small for the layer {largest.name!r}: its gradient, and "
            "the second moment of its input, come in one piece each. Raise the limit to "
            f"{math.ceil(least(largest) / 1e3) / 1e3} MB, or profile with --weights-only, which takes neither."
        )
    room = {la.name: (limit - gradient(la)) // SCRATCH for la in table}
    return {la.name: slices_of(la, room[la.name] // row_bytes(la, n_candidates)) for la in table}
