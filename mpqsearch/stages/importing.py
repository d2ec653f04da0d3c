"""Maps from elsewhere: read one into the run folder, and hand those that the study names to the other stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, LayerTable, average_bits, bops, size_bits
from mpqsearch.methods import Allocation, MethodSpec, Total, predicted_loss
from mpqsearch.stages.base import Run

if TYPE_CHECKING:
    from mpqsearch.export import Imported

FOLDER = "imports"


def import_map(run: Run, path: Path, *, source: str | None, name: str, scheme: str) -> tuple[Path, Imported]:
    """Read a file or folder of another quantizer and write ``imports/<name>/bitmap.json``, a map as any other.

    ``source``: the format (None: found out); ``scheme``: what the widths mean here. Raises what
    `mpqsearch.export.read_map` raises, and `StaleArtifactError` when another map has this name.
    """
    from mpqsearch.export import neutral_extra, read_map

    imported = read_map(path, run.table, source, replace(run.config.quantizer.format(), scheme=scheme))
    file = run.path(FOLDER, name, "bitmap.json")
    inputs = {"model": run.table.digest, "map": imported.bit_map.digest}
    if artifacts.is_current(file, "mpqsearch/bitmap", inputs, overwrite=run.overwrite):
        run.say(f"import: reused {file}")
    elif run.dry_run:
        run.say(f"import: would write {file}")
    else:
        provenance = {"imported": path.name, "source": imported.source, "notes": list(imported.notes)}
        artifacts.save_bit_map(
            file, imported.bit_map, inputs, neutral_extra(run.table, imported.bit_map, provenance=provenance)
        )
        run.say(f"import: {file}")
    return file, imported


def given_map(run: Run, method: MethodSpec) -> tuple[BitMap, dict[str, Any]]:
    """The map that ``[allocate.maps]`` names for a method, with what ``allocation.json`` would hold; its budget is its
    own size."""
    from mpqsearch.export import read_map

    imported = read_map(Path(run.config.allocate.maps[method.name]), run.table, fmt=run.config.quantizer.format())
    bit_map = imported.bit_map
    stored = size_bits(run.table, bit_map)
    allocation = Allocation(
        method=method,
        bit_map=bit_map,
        totals=(Total(budget=own_budget(run.table, bit_map), limit=stored, cost=stored),),
        size_bits=stored,
        bops=bops(run.table, bit_map),
        predicted_loss=predicted_loss(run.table, run.profile, bit_map, bias_correction=method.bias_correction),
        notes=imported.notes,
    )
    return bit_map, allocation.to_data()


def own_budget(table: LayerTable, bit_map: BitMap) -> Budget:
    """The size that a map has."""
    return Budget(quantity="average_bits", limit=average_bits(table, bit_map))
