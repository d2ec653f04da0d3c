"""The layers of a model with what the chosen maps give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.core.stored import mapped_bits
from mpqsearch.methods import best_loss, losses_of_map
from mpqsearch.report.sensitivity import layer_losses, sensitivity_over_time
from mpqsearch.report.table import Cell, Table, table_of


def layers_table(
    table: LayerTable, maps: Mapping[str, BitMap], profile: SensitivityProfile | None, taken: str = ""
) -> Table:
    """A row for each layer: name, role, weights, and the mean width in each map with its range.

    Of the map ``taken`` (default: the first) also the kB stored and, where the profile prices its format, the predicted
    loss by which widths are chosen.
    """
    columns: dict[tuple[str, str], list[Cell]] = {
        ("Layer", "text"): [Cell(la.name, la.name) for la in table],
        ("Role", "text"): [Cell(la.role, la.role) for la in table],
        ("Weights", "number"): [Cell(f"{la.n_weights:,}", la.n_weights) for la in table],
    }
    for label, bit_map in maps.items():
        widths = [bit_map.code_widths(la.name) for la in table]
        heading = f"Bits, {label.rpartition(' at ')[2]}"
        columns[heading, "number"] = [_width(float(w.mean()), float(w.min()), float(w.max())) for w in widths]
    taken = taken if taken in maps else next(iter(maps))
    bit_map, name = maps[taken], taken.rpartition(" at ")[2]
    sizes = [mapped_bits(la, bit_map).total / 8000 for la in table]
    columns[f"kB, {name}", "number"] = [Cell(f"{kb:,.2f}", kb) for kb in sizes]
    if profile is not None and {bit_map.format_of(la.name).name for la in table} <= set(profile.formats):
        loss = best_loss(profile)
        rows = losses_of_map(profile, table, bit_map, loss, bias_correction=loss != "weight")
        lost = dict(zip(profile.names, profile.layer_sum(rows), strict=True))
        columns[f"Loss, {name}", "number"] = [Cell(f"{lost[la.name]:.2e}", lost[la.name]) for la in table]
    return table_of(columns)


def _width(mean: float, low: float, high: float) -> Cell:
    return Cell(f"{mean:.2f}" + ("" if low == high else f" ({low:g} – {high:g})"), round(mean, 4))


def heat_maps(
    table: LayerTable, maps: Mapping[str, BitMap], profile: SensitivityProfile | None, format_name: str = ""
) -> Iterator[dict[str, Any]]:
    """What the heat map of the page shows over the layers: ``title``, names of ``rows``, ``values`` ``[R, L]`` with
    None where nothing was measured, and whether colours are by the logarithm (``log``)."""
    if maps:
        bits = [[m.code_widths(la.name).mean() for la in table] for m in maps.values()]
        yield _heat("Mean bits of each layer", list(maps), np.array(bits), log=False)
    if profile is None:
        return
    place = [profile.index[la.name] for la in table]
    losses = layer_losses(profile, table, format_name)
    title = f"{losses.label[0].upper()}{losses.label[1:]}, of one layer at a time"
    yield _heat(title, [f"{w} bits" for w in losses.widths], losses.loss.T[:, place], log=True)
    if "step_sensitivity" in profile.arrays:
        info = sensitivity_over_time(profile)
        parts = [f"{a} to {b} % of the run" for a, b in zip(info.edges[:-1], info.edges[1:], strict=True)]
        title = "Sensitivity: cost at the end of a unit of output error, by the part of the run it is made in"
        yield _heat(title, parts, info.sensitivity.T[:, place], log=True)


def _heat(title: str, rows: list[str], values: NDArray[np.float64], *, log: bool) -> dict[str, Any]:
    known = np.isfinite(values) & ((values > 0) | (not log))
    cells = [
        [float(f"{v:.4g}") if k else None for v, k in zip(*pair, strict=True)]
        for pair in zip(values, known, strict=True)
    ]
    return {"title": title, "rows": rows, "values": cells, "log": log}
