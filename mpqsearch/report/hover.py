"""What a point of the front shows when the pointer or the keyboard is on it: its numbers and its map in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from mpqsearch.core import BitMap, LayerTable, StudyRecord
from mpqsearch.pareto import ParetoFront
from mpqsearch.report.figures import places

BLOCKS = "▁▂▃▄▅▆▇█"
"""One block a bit of mean width, 1 to 8."""

COLUMNS = 40
"""Characters of a map in one line; layers beyond that are averaged, weighted by their size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """One point: ``left`` and ``top`` in percent of the figure, a title, its numbers, and its map (empty when it is not
    known)."""

    left: float
    top: float
    title: str
    lines: tuple[str, ...]
    bits: str


def spots(
    axes: Axes, records: Sequence[StudyRecord], metric: str, table: LayerTable | None, maps: Mapping[str, BitMap]
) -> list[Spot]:
    """The points of `plot_front` as it drew them on ``axes``, in order of method and bits; ``maps`` by their digest."""
    front = ParetoFront.from_records(records, metric)
    shown = sorted(front.records, key=lambda r: (front.method_name(r), r.average_bits))
    points = np.array([[r.average_bits, r.metrics[metric].value] for r in shown]).reshape(-1, 2)
    result = []
    for record, (left, top) in zip(shown, 100 * places(axes, points), strict=True):
        value, bit_map = record.metrics[metric], maps.get(record.bit_map_digest)
        size = f"{record.average_bits:.3f} bits, {record.size_bytes / 1000:,.1f} kB"
        result.append(
            Spot(
                left=round(float(left), 2),
                top=round(float(top), 2),
                title=front.method_name(record),
                lines=(size, f"{value.value:.4g} ({value.low:.3g} to {value.high:.3g})"),
                bits="" if table is None or bit_map is None else map_in_one_line(table, bit_map),
            )
        )
    return result


def map_in_one_line(table: LayerTable, bit_map: BitMap, columns: int = COLUMNS) -> str:
    """Mean width over depth, a block a layer, or a block for several where there are more layers than ``columns``."""
    mean = np.array([bit_map.channel_widths(la.name, la.n_channels).mean() for la in table])
    size = np.array([la.n_weights for la in table], dtype=np.float64)
    groups = np.array_split(np.arange(len(mean)), min(columns, len(mean)))
    widths = [float(np.average(mean[g], weights=size[g])) for g in groups]
    return "".join(BLOCKS[int(np.clip(round(b), 1, 8)) - 1] for b in widths)
