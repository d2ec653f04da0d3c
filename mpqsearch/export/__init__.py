"""Bit maps for other tools. A seam: one file per target, all behind `get_exporter`; planning needs no torch.

    job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, inputs=..., provenance=...)
    target = get_exporter("quanto")         # `TARGETS` has the names of all
    target.plan(job) -> list[PlanEntry]     # layer, asked, will_get, reason; `plan_table` makes rows of it
    target.write(folder, job) -> list[Path] # all or nothing
    target.verify(folder) -> Verification   # the consumer itself says what it got; .ok, .verified, .summary()
    import_map(path, table) -> BitMap       # the other way: the widths that a file of another tool gives a model

The bit map of every run is in the neutral format already, when it is written with

    artifacts.save_bit_map(path, bit_map, inputs, neutral_extra(table, bit_map, provenance=...))
    load_neutral(path, table) -> NeutralMap # schema and digests checked
"""

from mpqsearch._verbs import make_callable
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry, Verification, VerifyEntry, plan_table
from mpqsearch.export.mapfile import (
    bit_map_schema,
    load_neutral,
    neutral_extra,
    write_neutral,
)
from mpqsearch.export.reading import Imported, import_map, read_map
from mpqsearch.export.target import Target, get_exporter
from mpqsearch.specs.targets import SOURCES, TARGETS, register

__all__ = [
    "SOURCES",
    "TARGETS",
    "Choice",
    "ExportJob",
    "Imported",
    "PlanEntry",
    "Target",
    "Verification",
    "VerifyEntry",
    "bit_map_schema",
    "get_exporter",
    "import_map",
    "load_neutral",
    "neutral_extra",
    "plan_table",
    "read_map",
    "register",
    "write_neutral",
]

make_callable(__name__)
