"""A profile of the weights alone, read from disk layer by layer: kurtosis, and the error of every row at every width.

Neither the model nor the errors ``[W, C, D]`` are ever held: a layer is mapped from its file, its rows pass through the
cache in blocks, and what stays are a few numbers a row. So the model may be larger than the memory.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.core.formats import format_name
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.models import StreamedModel
from mpqsearch.profile.partial import Arrays, Partial, resumed
from mpqsearch.profile.recomputed import slices_of
from mpqsearch.progress import Progress, silent
from mpqsearch.quant.rows import row_summary
from mpqsearch.quant.search import BLOCK, DEVICE_BLOCK
from mpqsearch.quant.tables import weight_error_tables
from mpqsearch.specs.calibration import grouped


@torch.no_grad()
def profile_weights(
    model: StreamedModel,
    table: LayerTable,
    policy: Policy,
    schemes: Sequence[str],
    fmt: QuantFormat,
    *,
    groups: Sequence[int] = (),
    device: str = "cpu",
    memory_limit: int | None = None,
    partial: Partial | None = None,
    progress: Progress = silent,
) -> SensitivityProfile:
    """Kurtosis and ``weight_error/<format>`` of every channel, from the weights on disk: every scheme, and those
    of `grouped` also with ``groups`` of inputs.

    The numbers are those of `profile_model` for the loaded model. A layer at a time goes to ``device`` and its results
    come back. With ``partial``, finished layers are kept and reused. ``memory_limit`` is in bytes and beside what
    Python and torch take themselves; a layer that does not fit it is read some rows at a time (pages of the file come
    and go). Raises `ConfigError`, with the smallest limit that works, when a single row does not fit, `NumericsError`
    naming the layer when a weight is not finite.
    """
    widths = tuple(sorted(policy.widths))
    formats = [(schemes, fmt), *((grouped(schemes), replace(fmt, group=group)) for group in groups)]
    blocks = rows_within(model, table, len(widths), sum(len(some) for some, _ in formats), device, memory_limit)
    began, total, done = time.perf_counter(), sum(_stored_bytes(model, la) for la in table), 0
    parts: list[Arrays] = []
    for position, layer in enumerate(table):
        measure = functools.partial(layer_weights, model, layer, widths, formats, device, blocks[layer.name])
        parts.append(resumed(partial, position, measure))
        done += _stored_bytes(model, layer)
        progress("weights", done, total)
    return SensitivityProfile(
        model_digest=table.digest,
        names=tuple(la.name for la in table),
        channels=tuple(la.n_channels for la in table),
        widths=widths,
        arrays={key: np.concatenate([p[key] for p in parts]) for key in parts[0]},
        calibration={
            "spec": {"weights_only": True, "schemes": list(schemes)},
            "format": fmt.to_data(),
            "bytes": total,
            "seconds": round(time.perf_counter() - began, 3),
        },
    )


def layer_weights(
    model: StreamedModel,
    layer: LayerSpec,
    widths: Sequence[int],
    formats: Sequence[tuple[Sequence[str], QuantFormat]],
    device: str,
    blocks: Sequence[slice],
) -> Arrays:
    """``kurtosis`` and ``weight_rms`` ``[C]`` and ``weight_error/<format>`` ``[C, W]`` of one layer, float32.
    ``formats``: schemes with the format that they vary.

    ``blocks``: slices of rows that are read and measured one after the other.
    """
    parts: list[dict[str, Tensor]] = []
    for block in blocks:
        rows = _rows(model, layer, block).to(device)
        try:
            summary = row_summary(rows)
        except NumericsError as error:
            where = f", counted from row {block.start}" if block.start else ""
            raise NumericsError(f"layer {layer.name!r}{where}: {error}. Repair or reload the checkpoint.") from error
        tables = {
            f"weight_error/{format_name(scheme, group=fmt.group)}": table
            for schemes, fmt in formats
            for scheme, table in weight_error_tables(rows, widths, schemes, fmt, summary).items()
        }
        parts.append({"kurtosis": summary.kurtosis, "weight_rms": summary.rms, **tables})
    return {key: torch.cat([p[key] for p in parts]).cpu().numpy() for key in parts[0]}


def _rows(model: StreamedModel, layer: LayerSpec, block: slice) -> Tensor:
    """Some rows of a layer as they are stored; the slice is of whole groups, or lies inside one."""
    key = f"{layer.name}.weight"
    if not layer.kind.startswith("ConvTranspose"):
        return model.read(key, block).flatten(1)
    each, inputs = layer.n_channels // layer.groups, layer.weight_shape[0] // layer.groups
    first, last = block.start // each, -(-block.stop // each)
    weight = model.read(key, slice(first * inputs, last * inputs)).reshape(last - first, inputs, each, -1)
    mine = slice(block.start - first * each, block.stop - first * each) if last - first == 1 else slice(None)
    return weight[:, :, mine].transpose(1, 2).reshape(block.stop - block.start, -1)


def rows_within(
    model: StreamedModel, table: LayerTable, n_widths: int, n_schemes: int, device: str, limit: int | None
) -> dict[str, list[slice]]:
    """For each layer the slices of its rows whose working set fits ``limit`` bytes; `ConfigError` when that of a single
    row does not.

    A working set: the stored weights (twice where rows must be put together, as in a transposed convolution), a block
    in float32 with its temporaries for each thread, and the numbers of every row: scale, zero, width and factor of each
    quantizer.
    """
    if limit is None:
        return {la.name: slices_of(la, la.n_channels) for la in table}
    block = BLOCK * max(1, torch.get_num_threads()) if device == "cpu" else DEVICE_BLOCK

    def each(layer: LayerSpec) -> int:
        copies = 2 if layer.kind.startswith("ConvTranspose") or device != "cpu" else 1
        return _stored_bytes(model, layer) // layer.n_channels * copies + n_widths * 2 * n_schemes * 24

    def needs(layer: LayerSpec, rows: int) -> int:
        return rows * each(layer) + max(min(block, rows * layer.weights_per_channel), layer.weights_per_channel) * 16

    worst = max(table, key=lambda la: needs(la, 1))
    if needs(worst, 1) > limit:
        raise ConfigError(
            f"the layer {worst.name!r} needs {needs(worst, 1) / 1e6:.3g} MB for one of its rows as it is measured, "
            "more than the memory limit of "
            f"{limit / 1e6:.3g} MB. Raise the limit to {math.ceil(needs(worst, 1) / 1e3) / 1e3} MB."
        )
    return {
        la.name: slices_of(la, la.n_channels if needs(la, la.n_channels) <= limit else limit // needs(la, 1))
        for la in table
    }


def _stored_bytes(model: StreamedModel, layer: LayerSpec) -> int:
    return model.stored[f"{layer.name}.weight"].n_bytes
