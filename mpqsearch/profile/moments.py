"""Exact output errors of every row within a memory limit: full second moments, blocks of them, or direct products.

The error of a row is ``e' H e`` with ``H`` the second moment of the layer's input. ``H`` takes ``D * D`` numbers for a
fan-in of ``D``: 4.2 GB for the largest layer of Stable Diffusion 1.5. Under a limit a layer is measured in one of three
ways, all with the same numbers up to float32 rounding:

``full``
    ``H`` is held, and prices any number of candidates: ``n D**2`` multiplications for n positions, then ``K C D**2``
    for K candidates.
``blocked``
    Some rows of ``H`` at a time, a pass over the inputs for each block; ``e' H e`` is the sum of what the blocks give.
``direct``
    The errors of the candidates are multiplied with the inputs themselves and squared: ``n K C D`` multiplications, ``K
    C D`` numbers. Cheaper than ``full`` whenever ``K C < D``, or when there are few positions.

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
from mpqsearch.profile.inputs import columns_of, parts_of
from mpqsearch.quant import RowStatistics
from mpqsearch.quant.tables import row_blocks, row_bytes

How = Literal["full", "blocked", "direct"]

Errors = Callable[[LayerSpec, RowStatistics], Iterable[tuple[slice, Mapping[str, Tensor]]]]
"""Weight errors of a layer, in slices of rows (of whole groups, or inside one): each with ``[W, c, D]`` under each
quantizer variant. The statistics that it gets have no second moment."""

Tables = dict[str, dict[str, Tensor]]
"""Layer -> ``output_error/<variant>`` and ``output_error_corrected/<variant>``, ``[C, W]`` float32."""

SCRATCH = 4
"""The part of the limit that unfolded inputs and products may take: one in so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one pass does of one layer: input columns ``start:stop`` of ``H`` (full: all), or candidates ``start:stop``
    (direct)."""

    layer: str
    how: How
    start: int
    stop: int
    n_bytes: int


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
            "which comes in one piece, takes "
            f"{whole(largest) / 1e6:.3g} MB, and the errors of one row {row / 1e6:.3g} MB. Raise the limit to "
            f"{math.ceil(least / 1e3) / 1e3} MB, "
            "or profile with --weights-only, which takes no gradient."
        )
    return {la.name: row_blocks(la, n_candidates, (limit - whole(la)) // SCRATCH) for la in table}


def plan_moments(table: LayerTable, n_candidates: int, limit: int | None, *, positions: int = 0) -> list[list[Piece]]:
    """The passes over the calibration inputs that measure all layers, each a list of pieces that fit ``limit`` bytes
    together.

    n_candidates
        Weight errors to price for each row: widths times quantizer variants.
    positions
        Positions of all inputs, where known: then ``direct`` is also taken where it saves more than half of the
        multiplications.

    Without a limit all second moments are held at once. Raises `ConfigError` naming the layer for which the limit is
    too small.
    """
    if limit is None:
        return [[_piece(la, "full", 0, la.weights_per_channel, _full_bytes(la)) for la in table]]
    room = limit - limit // SCRATCH
    passes: list[list[Piece]] = []
    free: list[int] = []
    for layer in table:
        for piece in _pieces(layer, n_candidates, room, positions):
            # First fit, in forward order: a pass runs the whole model, so few passes count more than full ones.
            at = next((i for i, space in enumerate(free) if space >= piece.n_bytes), None)
            if at is None:
                passes.append([])
                free.append(room)
                at = len(free) - 1
            passes[at].append(piece)
            free[at] -= piece.n_bytes
    return passes


@torch.no_grad()
def output_errors(
    module: nn.Module,
    table: LayerTable,
    stats: Mapping[str, RowStatistics],
    errors_of: Errors,
    passes: list[list[Piece]],
    run: Callable[[], None],
    *,
    limit: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Tables:
    """Exact output errors of every row of every layer, in the given passes.

    stats
        Mean and largest inputs of each layer (the second moments in them are not used): centring and smoothing need
        them first.
    run
        Runs the model on all calibration inputs, the same at each call.
    report
        Called with the number of finished passes and their total.

    A layer that did not run has errors of 0.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    scratch = (limit or 1 << 31) // SCRATCH
    for done, pieces in enumerate(passes, start=1):
        workers: dict[Piece, _Moment | _Direct] = {}
        for piece in pieces:
            layer = table[piece.layer]
            workers[piece] = (
                _Direct(layer, piece, errors_of(layer, stats[piece.layer]))
                if piece.how == "direct"
                else _Moment(layer, piece)
            )
        with _watched(module, table, workers, scratch):
            run()
        for piece, worker in workers.items():
            layer = table[piece.layer]
            found = worker.finish(errors_of(layer, stats[piece.layer]) if isinstance(worker, _Moment) else ())
            total = sums.setdefault(piece.layer, {})
            for key, value in found.items():
                total[key] = total[key] + value if key in total else value
        if report is not None:
            report(done, len(passes))
    return {name: _tables(table[name], found, stats[name], errors_of) for name, found in sums.items()}


class _Moment:
    """Rows ``start:stop`` of ``H``, summed over inputs."""

    def __init__(self, layer: LayerSpec, piece: Piece) -> None:
        self._piece, self._layer = piece, layer
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, columns: Tensor) -> None:
        """Take ``[G, n, D]`` inputs. Products in float32, sums over calls in float64."""
        rows = columns[:, :, self._piece.start : self._piece.stop]
        product = torch.bmm(rows.transpose(1, 2), columns).double()
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._count += columns.shape[1]

    def finish(self, errors: Iterable[tuple[slice, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        """What these rows contribute to ``e' H e``: variant -> ``[W, C]`` float64."""
        out: dict[str, list[Tensor]] = {}
        moment = None if self._sum is None else (self._sum / self._count).float()
        for rows, some in errors:
            for variant, error in some.items():
                out.setdefault(variant, []).append(self._through(error, rows, moment))
        return {variant: torch.cat(parts, 1) for variant, parts in out.items()}

    def _through(self, error: Tensor, rows: slice, moment: Tensor | None) -> Tensor:
        if moment is None:
            return torch.zeros(error.shape[:2], dtype=torch.float64)
        mine = moment[groups_of(self._layer, rows)].to(error.dtype)
        columns = slice(self._piece.start, self._piece.stop)
        parts = []
        for one in error:
            grouped = one.reshape(len(mine), len(one) // len(mine), -1)
            through = torch.bmm(grouped, mine.transpose(1, 2))  # [G, c, stop - start]
            parts.append(through.mul_(grouped[:, :, columns]).sum(2, dtype=torch.float64).flatten())
        return torch.stack(parts).cpu()


class _Direct:
    """Products of the candidates' errors with the inputs: squares summed over positions."""

    def __init__(self, layer: LayerSpec, piece: Piece, errors: Iterable[tuple[slice, Mapping[str, Tensor]]]) -> None:
        k, g = piece.stop - piece.start, layer.groups
        self._names: list[tuple[str, int]] = []
        self._widths: dict[str, int] = {}
        stacked = torch.empty(0)
        for rows, some in errors:
            if not self._names:
                self._widths = {variant: len(error) for variant, error in some.items()}
                self._names = [(variant, w) for variant, n in self._widths.items() for w in range(n)]
                first = next(iter(some.values()))
                stacked = torch.empty(k, layer.n_channels, layer.weights_per_channel, device=first.device)
            for i, (variant, w) in enumerate(self._names[piece.start : piece.stop]):
                stacked[i, rows] = some[variant][w]
        # [k, C, D] -> [G, D, k * C / G]
        self._errors = stacked.reshape(k, g, -1, layer.weights_per_channel).permute(1, 3, 0, 2).flatten(2)
        self._piece, self._layer = piece, layer
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, columns: Tensor) -> None:
        """Take ``[G, n, D]`` inputs."""
        out = torch.bmm(columns, self._errors.to(columns.device))
        squares = out.square_().sum(1, dtype=torch.float64)
        self._sum = squares if self._sum is None else self._sum.add_(squares)
        self._count += columns.shape[1]

    def finish(self, errors: Iterable[Any]) -> dict[str, Tensor]:  # noqa: ARG002  (they are held since the start)
        """Variant -> ``[W, C]`` float64, zero for candidates of other pieces."""
        k = self._piece.stop - self._piece.start
        found = torch.zeros(k, self._layer.n_channels, dtype=torch.float64)
        if self._sum is not None:
            found = (self._sum / self._count).reshape(self._layer.groups, k, -1).transpose(0, 1).flatten(1).cpu()
        out = {v: torch.zeros(n, self._layer.n_channels, dtype=torch.float64) for v, n in self._widths.items()}
        for (variant, w), value in zip(self._names[self._piece.start : self._piece.stop], found, strict=True):
            out[variant][w] = value
        return out


def groups_of(layer: LayerSpec, rows: slice) -> slice:
    """The groups to which a slice of rows belongs."""
    each = layer.n_channels // layer.groups
    return slice(rows.start // each, -(-rows.stop // each))


def _tables(
    layer: LayerSpec, found: Mapping[str, Tensor], stats: RowStatistics, errors_of: Errors
) -> dict[str, Tensor]:
    """Errors and what is left of them without the mean shift, as `error_tables` names them."""
    shifts: dict[str, list[Tensor]] = {}
    for rows, some in errors_of(layer, stats):
        mean = stats.mean[groups_of(layer, rows)]
        for variant, error in some.items():
            grouped = error.reshape(len(error), len(mean), -1, error.shape[2])
            shift = torch.einsum("wgcd,gd->wgc", grouped, mean.to(grouped)).flatten(1)
            shifts.setdefault(variant, []).append(shift.double().cpu())
    out = {}
    for variant, full in found.items():
        full = full.clamp_min(0)  # noqa: PLW2901
        out[f"output_error/{variant}"] = full.T.float()
        out[f"output_error_corrected/{variant}"] = (
            (full - torch.cat(shifts[variant], 1).square()).clamp_min(0).T.float()
        )
    return out


@contextmanager
def _watched(module: nn.Module, table: LayerTable, workers: Mapping[Piece, Any], scratch: int) -> Iterator[None]:
    """Feed the inputs of every layer to its workers, in parts whose unfolded columns and products fit ``scratch``
    bytes."""
    modules = dict(module.named_modules())
    by_layer: dict[str, list[Any]] = {}
    for piece, worker in workers.items():
        by_layer.setdefault(piece.layer, []).append(worker)

    def hook(name: str) -> Any:
        layer = table[name]

        def collect(layer_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach().float()
            if not x.numel():
                return
            samples = x.numel() // x.shape[-1] if isinstance(layer_module, nn.Linear) else x.shape[0]
            once = x.numel() // samples * (layer.weights_per_channel * layer.groups // layer.n_inputs) * 8
            for part in parts_of(x, layer_module, max(1, scratch // once)):
                columns = columns_of(part, layer_module, layer)
                for worker in by_layer[name]:
                    worker.add(columns)

        return collect

    handles = [modules[n].register_forward_pre_hook(hook(n), with_kwargs=True) for n in by_layer]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pieces(layer: LayerSpec, n_candidates: int, room: int, positions: int) -> list[Piece]:
    d, full = layer.weights_per_channel, _full_bytes(layer)
    each = layer.n_channels * d * 4  # the errors of one candidate
    at_once = room // (2 * each)  # they are made, then laid out for the product
    rows = room // (full // d)
    if max(at_once, rows) < 1:
        least = min(full // d, 2 * each) * SCRATCH / (SCRATCH - 1)
        raise ConfigError(
            f"the memory limit is too small for the layer {layer.name!r}: one row of its second moment takes "
            f"{full // d / 1e6:.2f} MB, the "
            f"weight errors of one candidate {2 * each / 1e6:.2f} MB. Raise the limit to {least / 1e6:.2f} MB."
        )
    if full <= room and not _direct_pays(layer, n_candidates, positions):
        return [_piece(layer, "full", 0, d, full)]
    blocked = [
        _piece(layer, "blocked", a, min(a + rows, d), (min(a + rows, d) - a) * (full // d))
        for a in range(0, d, max(rows, 1))
    ]
    direct = [
        _piece(layer, "direct", a, min(a + at_once, n_candidates), 2 * each * (min(a + at_once, n_candidates) - a))
        for a in range(0, n_candidates, max(at_once, 1))
    ]
    if rows < 1 or (at_once >= 1 and len(direct) <= len(blocked)):
        return direct
    return blocked


def _direct_pays(layer: LayerSpec, n_candidates: int, positions: int) -> bool:
    """Whether direct products take less than half of the multiplications."""
    d, rows = layer.weights_per_channel, n_candidates * layer.n_channels // layer.groups
    return bool(positions) and 2 * positions * rows * d < positions * d * d + rows * d * d


def _full_bytes(layer: LayerSpec) -> int:
    """A second moment in float64, and the product in float32 that is added to it."""
    return layer.groups * layer.weights_per_channel**2 * 12


def _piece(layer: LayerSpec, how: How, start: int, stop: int, n_bytes: int) -> Piece:
    return Piece(layer=layer.name, how=how, start=start, stop=stop, n_bytes=n_bytes)
