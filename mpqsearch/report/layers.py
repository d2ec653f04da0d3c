"""The layers of a model with what the chosen maps give them."""

from __future__ import annotations

from collections.abc import Mapping

from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.core.stored import mapped_bits
from mpqsearch.methods import best_loss, channel_losses, losses_of_map
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
        widths = [bit_map.channel_widths(la.name, la.n_channels) for la in table]
        heading = f"Bits, {label.rpartition(' at ')[2]}"
        columns[heading, "number"] = [_width(float(w.mean()), int(w.min()), int(w.max())) for w in widths]
    taken = taken if taken in maps else next(iter(maps))
    bit_map, name = maps[taken], taken.rpartition(" at ")[2]
    sizes = [mapped_bits(la, bit_map).total / 8000 for la in table]
    columns[f"kB, {name}", "number"] = [Cell(f"{kb:,.2f}", kb) for kb in sizes]
    if profile is not None and bit_map.format.name in profile.formats:
        loss = best_loss(profile)
        priced = channel_losses(profile, table, bit_map.format.name, loss, bias_correction=loss != "weight")
        lost = dict(zip(profile.names, profile.layer_sum(losses_of_map(profile, bit_map, priced)), strict=True))
        columns[f"Loss, {name}", "number"] = [Cell(f"{lost[la.name]:.2e}", lost[la.name]) for la in table]
    return table_of(columns)


def _width(mean: float, low: int, high: int) -> Cell:
    return Cell(f"{mean:.2f}" + ("" if low == high else f" ({low} – {high})"), round(mean, 4))
