"""A model made of numbers, for tests of the outer search: errors of samples follow a hidden truth that the profile only
approximates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch.artifacts import digest_of
from mpqsearch.core import LayerTable, SensitivityProfile

if TYPE_CHECKING:
    from mpqsearch.search.cache import Measured
    from mpqsearch.search.ladder import Slopes
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

    def output_error(self, candidate: Candidate) -> Measured:
        """Rung 1."""
        return self._measured("output", candidate, (self.truth(candidate) * 1.3,), 8)

    def sample_errors(self, candidate: Candidate, seeds: Sequence[int]) -> Measured:
        """Rung 2."""
        values = tuple(self.truth(candidate) * float(np.random.default_rng([s, 5]).lognormal(sigma=0.3)) for s in seeds)
        return self._measured(f"samples {list(seeds)}", candidate, values, 10 * len(seeds))

    def final_errors(self, candidate: Candidate, seeds: Sequence[int]) -> Measured:
        """Rung 3: the mean as the distance, then rung 2."""
        found = self.sample_errors(candidate, seeds)
        assert isinstance(found.values, tuple)
        return replace(found, values=(float(np.mean(found.values)), *found.values))

    def slopes(self, candidate: Candidate, seeds: Sequence[int], batch: int) -> Slopes:
        """Half the derivative of the truth for every channel at every width, with noise of a tenth."""
        from mpqsearch.search.ladder import Slopes

        error = self.profile.arrays[f"output_error/{self.variant}"].astype(np.float64)
        column = {b: j for j, b in enumerate(self.profile.widths)}
        truth = self.truth(candidate)
        names = self.profile.names
        now = np.concatenate([candidate.bit_map.channel_widths(n, self.table[n].n_channels) for n in names])
        present = error[np.arange(len(error)), [column[int(b)] for b in now]]
        weight = np.repeat(self.bias, self.profile.channels) * self.profile.arrays["sensitivity"].astype(np.float64)
        half = 0.6 * truth ** (1 - 1 / 1.2) * weight[:, None] * (error - present[:, None])
        rng = np.random.default_rng([*seeds, 6])
        batches = -(-len(seeds) // batch)
        rows = half * (1 + 0.1 * rng.standard_normal((batches, *half.shape)))
        return Slopes(rows=rows, error=truth, forwards=40 * len(seeds))

    def report(self, candidate: Candidate) -> Measured:
        """Rungs 3 and 4."""
        error = self.truth(candidate)
        values = {
            "error": error,
            "fd_fp": error,
            "fd_fp_low": 0.9 * error,
            "fd_fp_high": 1.1 * error,
            "fd_data": 1 + error,
            "paired_psnr": -float(np.log(error)),
        }
        return self._measured("report", candidate, values, 1000)

    def _measured(self, rung: str, candidate: Candidate, values: Any, forwards: int) -> Measured:
        from mpqsearch.search.cache import Measured

        self.measured.append(f"{rung} {candidate.digest}")
        if self.pause_s:
            time.sleep(self.pause_s)
        return Measured(values=values, forwards=forwards)
