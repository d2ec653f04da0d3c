"""Ways to allocate bits, all to the same noun: uniform, random, OMQ, and integer programs over layers or channels.

A method turns a profile and budgets into an `Allocation`. Losses are named transforms of the raw measurements
(`LOSSES`); the integer programs see numbers only.
"""

from mpqsearch.methods.build import Program
from mpqsearch.methods.costs import CostTable
from mpqsearch.methods.losses import (
    BEST_LOSS,
    CHOOSING,
    LOSSES,
    available_losses,
    best_loss,
    channel_losses,
    losses_of_map,
    predicted_loss,
)
from mpqsearch.methods.programs import Programs, require_formats
from mpqsearch.methods.spec import ALLOCATORS, PROGRAMS, Allocation, MethodSpec, Total

__all__ = [
    "ALLOCATORS",
    "BEST_LOSS",
    "CHOOSING",
    "LOSSES",
    "PROGRAMS",
    "Allocation",
    "CostTable",
    "MethodSpec",
    "Program",
    "Programs",
    "Total",
    "available_losses",
    "best_loss",
    "channel_losses",
    "losses_of_map",
    "predicted_loss",
    "require_formats",
]
