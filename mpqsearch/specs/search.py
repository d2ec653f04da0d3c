"""The outer search around one method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpqsearch.core import Budget
from mpqsearch.core.formats import check_width
from mpqsearch.errors import ConfigError, UnknownNameError

MODES = ("front", "pareto")
SAMPLERS = ("tpe", "gp", "nsga2", "cmaes", "random", "qmc")
PRUNERS = ("wilcoxon", "median", "none")

DEFAULT_SPACE: Mapping[str, Any] = {
    "exponent": [0.5, 2.0],
    "row_exponent": [0.5, 2.0],
    "low_bits": [-1.0, 2.0],
    "kurtosis": [-1.0, 1.0],
    "depth": [-3.0, 3.0],
    "role_conv": [0.2, 5.0],
    "role_shortcut": [0.2, 5.0],
    "role_attention": [0.2, 5.0],
    "role_time": [0.2, 5.0],
    "role_resample": [0.2, 5.0],
    "granularity": ["channel", "layer"],
}
"""The space of a search that declares none."""


INPUT_SEEDS = 4
"""Trajectories from which the inputs of the search's cheap rung come; their seeds follow the search seeds, the final
seeds theirs, and the seeds of the refinement those."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """The outer search around one method; ``trials`` 0: none.

    ``method``: the method whose integer program is searched around (empty: the last one with an integer program).
    ``mode``: ``front`` (one value over the budgets) or ``pareto`` (bits and error, budgets between ``low_bits`` and
    ``high_bits``). ``sampler``: tpe, gp, nsga2, cmaes, random, qmc. ``pruner``: wilcoxon, median, none. ``budgets``:
    the grid (empty: those of ``[allocate]``). ``samples`` search seeds from ``first_seed``, ``chunk`` at a time; they
    are not those of ``[evaluate]``, on which the winners are judged. ``inputs`` denoiser inputs for the cheap rung (0:
    none). ``error``: what is minimized, ``features`` (squared distance of the extractor's features of a sample to those
    of the full-precision one) or ``pixels``. ``finalists``: maps a budget that run again on ``final_samples`` further
    seeds, which choose the one handed out (0 samples: the search seeds choose); only what beats the plain program's map
    there by more than a standard error takes its place. ``refine``: rounds of measured descent from the best finalist
    of each budget (`mpqsearch.search.refine`; 0: none), with ``refine_samples`` seeds for the slopes and as many for
    choosing steps in each round. ``top``: maps a budget that are measured on the report seeds. ``repeats``: draws of
    the random arms. ``act_bits``: activation width of searched layers. ``refit``: correct the loss table by what was
    measured, solve again and say whether it pays. ``study``: its name in the storage (empty: that of the run folder).
    ``space``: what may change, see `mpqsearch.search.space`. ``start_from``: a map from elsewhere, or its name in
    ``[allocate.maps]``; the point nearest to it is tried first, and it is measured beside the winners.
    """

    method: str = ""
    mode: str = "front"
    trials: int = 0
    sampler: str = "tpe"
    pruner: str = "wilcoxon"
    seed: int = 0
    budgets: tuple[str, ...] = ()
    low_bits: float = 2.0
    high_bits: float = 4.0
    samples: int = 16
    first_seed: int = 2_000_000
    chunk: int = 4
    inputs: int = 32
    error: str = "features"
    finalists: int = 4
    final_samples: int = 48
    refine: int = 0
    refine_samples: int = 16
    top: int = 2
    repeats: int = 3
    act_bits: int = 16
    refit: bool = False
    study: str = ""
    start_from: str = ""
    space: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_SPACE))

    @property
    def seeds(self) -> int:
        """All seeds from ``first_seed`` that something is chosen on: search seeds, those of the cheap rung, final and
        refinement seeds."""
        return self.samples + INPUT_SEEDS + self.final_samples + 2 * self.refine * self.refine_samples

    def __post_init__(self) -> None:
        least = {
            "trials": 0,
            "top": 1,
            "repeats": 1,
            "samples": 2,
            "inputs": 0,
            "finalists": 1,
            "final_samples": 0,
            "refine": 0,
            "refine_samples": 8,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"search.{name} must be at least {low}, got {getattr(self, name)}")
        if not 1 <= self.chunk <= self.samples:
            raise ConfigError(f"search.chunk must lie in 1..{self.samples} (search.samples), got {self.chunk}")
        if not 1 <= self.low_bits < self.high_bits <= 8:
            raise ConfigError(f"search needs 1 <= low_bits < high_bits <= 8, got {self.low_bits} and {self.high_bits}")
        for what, known in (("sampler", SAMPLERS), ("mode", MODES), ("pruner", PRUNERS)):
            if getattr(self, what) not in known:
                raise UnknownNameError(f"{what} of the search", getattr(self, what), known, f"(search.{what})")
        check_width(self.act_bits, "search.act_bits")
        for text in self.budgets:
            Budget.parse(text)
