"""A model made of numbers, for tests of the outer search: errors of samples follow a hidden truth that the profile only
approximates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch.artifacts import digest_of
from mpqsearch.core import LayerTable, SensitivityProfile

if TYPE_CHECKING:
    from mpqsearch.search.surrogate import Candidate


@dataclass(kw_only=True)
class SyntheticEvaluator:
    """An evaluator for the search without a model.

    The true error of a map is the sum over channels of output error times gain, with layers scaled by ``bias`` (a
    hidden factor for each layer that no profile shows), raised to 1.2 (errors interact), times a factor of the seed.
    ``pause_s`` is slept at each measurement.
    """

    table: LayerTable
    profile: SensitivityProfile
    seed: int = 0
    pause_s: float = 0.0
    variant: str = "auto"
    measured: list[str] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """Digest of the truth."""
        return digest_of([self.table.digest, self.seed, self.variant])

    @property
    def error_name(self) -> str:
        """What the errors are."""
        return "synthetic error"

    @cached_property
    def bias(self) -> Any:
        """Hidden factor ``[L]`` of each layer."""
        return np.random.default_rng(self.seed).lognormal(sigma=1.5, size=len(self.profile.names))

    def truth(self, candidate: Candidate) -> float:
        """The error that all measured values scatter around."""
        error = self.profile.arrays[f"output_error/{self.variant}"].astype(np.float64)
        column = {b: j for j, b in enumerate(self.profile.widths)}
        total = 0.0
        for i, name in enumerate(self.profile.names):
            widths = candidate.bit_map.channel_widths(name, self.table[name].n_channels)
            rows = self.profile.rows(name)
            gain = self.profile.arrays["sensitivity"][rows].astype(np.float64)
            picked = error[rows][np.arange(len(widths)), [column[int(b)] for b in widths]]
            total += float(self.bias[i] * (gain * picked).sum())
        return float(total**1.2)

    @property
    def forwards_per_sample(self) -> int:
        """As of a sampler of ten steps."""
        return 10

    def errors(self, candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        """The truth times a factor of each seed."""
        self.measured.append(f"errors {list(seeds)} {candidate.digest}")
        if self.pause_s:
            time.sleep(self.pause_s)
        truth = self.truth(candidate)
        return [truth * float(np.random.default_rng([s, 5]).lognormal(sigma=0.3)) for s in seeds]

    def distance(self, candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        """The mean error as the distance, then each."""
        errors = self.errors(candidate, seeds)
        return [float(np.mean(errors)), *errors]

    def report(self, candidate: Candidate) -> dict[str, float]:
        """Values that follow the truth."""
        truth = self.truth(candidate)
        return {
            "error": truth,
            "fd_fp": truth,
            "fd_fp_low": 0.9 * truth,
            "fd_fp_high": 1.1 * truth,
            "fd_data": 1 + truth,
            "paired_psnr": -float(np.log(truth)),
        }
