"""The neutral bit map as an export target: the file that every export has beside its own, alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpqsearch.artifacts import load_bit_map
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, QuantFormat, StoredBits
from mpqsearch.core.formats import WIDTHS
from mpqsearch.core.stored import layer_bits
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.mapfile import FILE, load_neutral
from mpqsearch.export.plan import plan_channels
from mpqsearch.export.reading import Reading, json_at
from mpqsearch.export.target import Target, int_choices


class NeutralTarget(Target):
    """The neutral bit map as an export target: it holds every map as it is, without weights."""

    name = "neutral"
    kinds = ()
    granularity = "channel"
    holds_any_map = True
    payload = False
    inputs = True
    encoders = True
    needs_config = False

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Every width, for every layer."""
        return int_choices(WIDTHS, "uint{}")

    def cost(self, layer: LayerSpec, choice: Choice | None) -> StoredBits:
        """The ideal cost: what the bit map's own accounting gives a layer at one width, in the asymmetric format."""
        width = np.array(FULL_PRECISION if choice is None else choice.width, dtype=np.uint8)
        return layer_bits(layer, width, QuantFormat())

    def plan(self, job: ExportJob) -> list[PlanEntry]:
        """Every layer as asked."""
        return plan_channels(job, self)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Nothing beside the map, which every target writes."""
        return []

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Read the file again with every check of `load_neutral`."""
        neutral = load_neutral(folder / FILE)
        table = LayerTable(digest=neutral.bit_map.model_digest, layers=neutral.layers)
        plan = self.plan(ExportJob(table=table, bit_map=neutral.bit_map))
        return {"widths": {e.layer: e.will_get for e in plan}}


def read(path: Path, _table: LayerTable) -> Reading | None:
    """Our own map, whole."""
    path = path / FILE if path.is_dir() else path
    data = json_at(path)
    if not isinstance(data, Mapping) or data.get("schema") != "mpqsearch/bitmap":
        return None
    return Reading(bit_map=load_neutral(path).bit_map if "map_digest" in data["data"] else load_bit_map(path))
