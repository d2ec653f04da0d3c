"""The stages of a run: load inputs, call the pure function, save outputs. The same command again continues.

Files of a run folder are described in the README. A stage whose output was made from the present inputs is reused, and
one line says so. Torch is imported only by the stages that need a model.
"""

from mpqsearch.stages.allocating import allocated, allocation, allocations, offers
from mpqsearch.stages.base import Run, start
from mpqsearch.stages.card import cards
from mpqsearch.stages.checking import check_allocation
from mpqsearch.stages.delivering import delivered_records
from mpqsearch.stages.discovering import layers
from mpqsearch.stages.distilling import distill
from mpqsearch.stages.evaluating import evaluate
from mpqsearch.stages.explaining import explanations, paths, program_methods
from mpqsearch.stages.exporting import Exported, export, require_good
from mpqsearch.stages.importing import import_map
from mpqsearch.stages.profiling import prepare, profile
from mpqsearch.stages.quantizing import quantize
from mpqsearch.stages.reporting import export_budget, report
from mpqsearch.stages.searched import searched_map
from mpqsearch.stages.searching import check_search, search
from mpqsearch.stages.targeting import target_allocations
from mpqsearch.stages.until import Quality, Tried, require_reachable, smallest
from mpqsearch.stages.whole import everything, trained

__all__ = [
    "Exported",
    "Quality",
    "Run",
    "Tried",
    "allocated",
    "allocation",
    "allocations",
    "cards",
    "check_allocation",
    "check_search",
    "delivered_records",
    "distill",
    "evaluate",
    "everything",
    "explanations",
    "export",
    "export_budget",
    "import_map",
    "layers",
    "offers",
    "paths",
    "prepare",
    "profile",
    "program_methods",
    "quantize",
    "report",
    "require_good",
    "require_reachable",
    "search",
    "searched_map",
    "smallest",
    "start",
    "target_allocations",
    "trained",
]
