"""Exact output errors of every output channel within a memory limit: full second moments, or direct products.

The error of a channel is ``e' H e`` with ``H`` the second moment of the layer's input. ``H`` takes ``D * D`` numbers
for a fan-in of ``D``: 4.2 GB for the largest layer of Stable Diffusion 1.5. Under a limit a layer is measured in one of
two ways, both with the same numbers up to float32 rounding:

``full``
    ``H`` is held, and prices any number of candidates: ``n D**2`` multiplications for n positions, then ``K C D**2``
    for K candidates.
``direct``
    The errors of some candidates are multiplied with the inputs themselves and squared, a pass over the inputs for each
    portion of them: ``n K C D`` multiplications, ``C D`` numbers a candidate.

Layers are packed into passes over the calibration inputs so that what one pass holds fits the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.errors import ConfigError
from mpqsearch.models.hooks import layer_input
from mpqsearch.profile.inputs import columns_of, parts_of
from mpqsearch.profile.recomputed import row_blocks, row_bytes
from mpqsearch.profile.tables import shift_of
from mpqsearch.quant import RowStatistics

How = Literal["full", "direct"]

Errors = Callable[[LayerSpec, RowStatistics], Iterable[tuple[slice, Mapping[str, Tensor]]]]
"""Weight errors of a layer, in slices of rows (of whole groups, or inside one): each with ``[W, c, D]`` under each
format. The statistics that it gets have no second moment."""

Tables = dict[str, dict[str, Tensor]]
"""Layer -> ``output_error/<format>`` and ``output_error_corrected/<format>``, ``[C, W]`` float32."""

SCRATCH = 4
"""The part of the limit that unfolded inputs and products may take: one in so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one pass does of one layer: all of ``H`` (full), or candidates ``start:stop`` (direct)."""

    layer: str
    how: How
    n_bytes: int
    start: int = 0
    stop: int = 0


def blocks_within(module: nn.Module, table: LayerTable, n_candidates: int, limit: int | None) -> dict[str, list[slice]]:
    """For each layer the slices of its rows whose errors under ``n_candidates`` quantizers fit a memory limit, beside
    the layer's gradient.

    Raises `ConfigError` that names the layer and the smallest limit that works.
    """
    if limit is None:
        return {la.name: row_blocks(la, n_candidates, None) for la in table}
    modules: dict[str, Any] = dict(module.named_modules())

    def whole(layer: LayerSpec) -> int:
        """What no slices make smaller: autograd gives a gradient in one piece, in the type of the weights; it is used
        as rows in float32."""
        size = int(modules[layer.name].weight.element_size())
        as_rows = 4 if size != 4 or layer.kind.startswith("ConvTranspose") else 0
        return layer.n_weights * (size + as_rows)

    largest = max(table, key=lambda la: whole(la) + row_bytes(la, n_candidates))
    row = row_bytes(largest, n_candidates)
    least = whole(largest) + row
    if least > limit:
        raise ConfigError(
            f"the memory limit of {limit / 1e6:.3g} MB is too small for the layer {largest.name!r}: its gradient, "
            f"which comes in one piece, takes {whole(largest) / 1e6:.3g} MB, and the errors of one row {row / 1e6:.3g} "
            f"MB. Raise the limit to {math.ceil(least / 1e3) / 1e3} MB, or profile with --weights-only, which takes no "
            "gradient."
        )
    return {la.name: row_blocks(la, n_candidates, (limit - whole(la)) // SCRATCH) for la in table}


def plan_second_moments(table: LayerTable, n_candidates: int, limit: int) -> list[list[Piece]]:
    """The passes over the calibration inputs that measure all layers, each a list of pieces that fit ``limit`` bytes
    together (a single piece may be larger: the errors of one candidate of a layer are the least that can be held).

    ``n_candidates``: weight errors to price for each row, which is widths times formats.
    """
    room = limit - limit // SCRATCH
    passes: list[list[Piece]] = []
    free: list[int] = []
    for layer in table:
        for piece in _pieces(layer, n_candidates, room):
            # First fit, in forward order: a pass runs the whole model, so few passes count more than full ones.
            at = next((i for i, space in enumerate(free) if space >= piece.n_bytes), len(free))
            if at == len(free):
                passes.append([])
                free.append(room)
            passes[at].append(piece)
            free[at] -= piece.n_bytes
    return passes


def _pieces(layer: LayerSpec, n_candidates: int, room: int) -> list[Piece]:
    # A second moment in float64, and the product in float32 that is added to it.
    full = layer.groups * layer.weights_per_channel**2 * 12
    if full <= room:
        return [Piece(layer=layer.name, how="full", n_bytes=full)]
    each = 2 * layer.n_weights * 4  # the errors of one candidate are made, then laid out for the product
    step = max(1, room // each)
    cuts = [(a, min(a + step, n_candidates)) for a in range(0, n_candidates, step)]
    return [Piece(layer=layer.name, how="direct", n_bytes=each * (b - a), start=a, stop=b) for a, b in cuts]


@torch.no_grad()
def output_errors(
    module: nn.Module,
    table: LayerTable,
    statistics: Mapping[str, RowStatistics],
    errors_of: Errors,
    passes: list[list[Piece]],
    run: Callable[[], None],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tables:
    """Exact output errors of every output channel of every layer, in the given passes.

    statistics
        Mean and largest inputs of each layer (the second moments in them are not used).
    run
        Runs the model on all calibration inputs, the same at each call.
    progress
        Called with the number of finished passes and their total.

    A layer that did not run has errors of 0.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    scratch = (limit or 1 << 31) // SCRATCH
    for done, pieces in enumerate(passes, start=1):
        workers: dict[str, list[_Full | _Direct]] = {}
        for piece in pieces:
            layer = table[piece.layer]
            errors = errors_of(layer, statistics[piece.layer])
            worker = _Direct(layer, piece, errors) if piece.how == "direct" else _Full(layer)
            workers.setdefault(piece.layer, []).append(worker)
        with _watched(module, table, workers, scratch):
            run()
        for name, some in workers.items():
            total = sums.setdefault(name, {})
            for worker in some:
                for key, value in worker.finish(errors_of(table[name], statistics[name])).items():
                    total[key] = total[key] + value if key in total else value
        if progress is not None:
            progress(done, len(passes))
    return {name: _tables(table[name], by_format, statistics[name], errors_of) for name, by_format in sums.items()}


class _Full:
    """The second moment of a layer's input, summed over calls."""

    def __init__(self, layer: LayerSpec) -> None:
        self._layer = layer
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, columns: Tensor) -> None:
        """Take ``[G, n, D]`` inputs. Products in float32, sums over calls in float64."""
        product = torch.bmm(columns.transpose(1, 2), columns).double()
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._count += columns.shape[1]

    def finish(self, errors: Iterable[tuple[slice, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        """``e' H e`` by format, ``[W, C]`` float64."""
        out: dict[str, list[Tensor]] = {}
        moment = None if self._sum is None else (self._sum / self._count).float()
        for rows, some in errors:
            for fmt, error in some.items():
                out.setdefault(fmt, []).append(self._through(error, rows, moment))
        return {fmt: torch.cat(parts, 1) for fmt, parts in out.items()}

    def _through(self, error: Tensor, rows: slice, moment: Tensor | None) -> Tensor:
        if moment is None:
            return torch.zeros(error.shape[:2], dtype=torch.float64)
        per_group = self._layer.n_channels // self._layer.groups
        by_group = moment[rows.start // per_group : -(-rows.stop // per_group)].to(error.dtype)
        parts = []
        for one in error:
            grouped = one.reshape(len(by_group), len(one) // len(by_group), -1)
            parts.append(torch.bmm(grouped, by_group).mul_(grouped).sum(2, dtype=torch.float64).flatten())
        return torch.stack(parts).cpu()


class _Direct:
    """Products of the candidates' errors with the inputs: squares summed over positions."""

    def __init__(self, layer: LayerSpec, piece: Piece, errors: Iterable[tuple[slice, Mapping[str, Tensor]]]) -> None:
        self._layer, self._start, self._n = layer, piece.start, piece.stop - piece.start
        self._widths: dict[str, int] = {}
        stacked = torch.empty(0)
        for rows, some in errors:
            if not self._widths:
                self._widths = {fmt: len(error) for fmt, error in some.items()}
                device = next(iter(some.values())).device
                stacked = torch.empty(self._n, layer.n_channels, layer.weights_per_channel, device=device)
            for i, (fmt, w) in enumerate(self._candidates()):
                stacked[i, rows] = some[fmt][w]
        # [k, C, D] -> [G, D, k * C / G]
        by_group = stacked.reshape(self._n, layer.groups, -1, layer.weights_per_channel)
        self._errors = by_group.permute(1, 3, 0, 2).flatten(2)
        self._sum: Tensor | None = None
        self._count = 0

    def _candidates(self) -> list[tuple[str, int]]:
        every = [(fmt, w) for fmt, n in self._widths.items() for w in range(n)]
        return every[self._start : self._start + self._n]

    def add(self, columns: Tensor) -> None:
        """Take ``[G, n, D]`` inputs."""
        squares = torch.bmm(columns, self._errors).square_().sum(1, dtype=torch.float64)
        self._sum = squares if self._sum is None else self._sum.add_(squares)
        self._count += columns.shape[1]

    def finish(self, errors: Iterable[Any]) -> dict[str, Tensor]:  # noqa: ARG002  (they are held since the start)
        """``e' H e`` by format ``[W, C]`` float64, zero for candidates of other pieces."""
        out = {fmt: torch.zeros(n, self._layer.n_channels, dtype=torch.float64) for fmt, n in self._widths.items()}
        if self._sum is not None:
            values = (self._sum / self._count).reshape(self._layer.groups, self._n, -1).transpose(0, 1).flatten(1).cpu()
            for (fmt, w), value in zip(self._candidates(), values, strict=True):
                out[fmt][w] = value
        return out


def _tables(
    layer: LayerSpec, sums: Mapping[str, Tensor], statistics: RowStatistics, errors_of: Errors
) -> dict[str, Tensor]:
    """Errors and what is left of them without the mean shift, as `error_tables` names them."""
    shifts: dict[str, list[Tensor]] = {}
    for rows, some in errors_of(layer, statistics):
        for fmt, error in some.items():
            shifts.setdefault(fmt, []).append(shift_of(error, layer, statistics.mean, rows).double().cpu())
    out = {}
    for fmt, total in sums.items():
        error = total.clamp_min(0)
        out[f"output_error/{fmt}"] = error.T.float()
        out[f"output_error_corrected/{fmt}"] = (error - torch.cat(shifts[fmt], 1).square()).clamp_min(0).T.float()
    return out


@contextmanager
def _watched(module: nn.Module, table: LayerTable, workers: Mapping[str, list[Any]], scratch: int) -> Iterator[None]:
    """Feed the inputs of every layer to its workers, in parts whose unfolded columns and products fit ``scratch``
    bytes."""
    modules = dict(module.named_modules())

    def hook(layer: LayerSpec) -> Any:
        def collect(layer_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = layer_input(args, kwargs).detach().float()
            if not x.numel():
                return
            samples = x.numel() // x.shape[-1] if isinstance(layer_module, nn.Linear) else x.shape[0]
            once = x.numel() // samples * (layer.weights_per_channel * layer.groups // layer.n_inputs) * 8
            for part in parts_of(x, layer_module, max(1, scratch // once)):
                columns = columns_of(part, layer_module, layer)
                for worker in workers[layer.name]:
                    worker.add(columns)

        return collect

    handles = [modules[n].register_forward_pre_hook(hook(table[n]), with_kwargs=True) for n in workers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
