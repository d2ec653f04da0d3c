"""What the student learns from: runs of the full-precision model, made as they are needed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqsearch.distill.trd import FeatureTap
from mpqsearch.errors import ConfigError, ModelError
from mpqsearch.models import Call, Denoiser
from mpqsearch.models.calls import in_memory
from mpqsearch.models.runner import parts_of
from mpqsearch.prompts.splits import BANDS
from mpqsearch.sampling import batch_of, each_call, n_calls
from mpqsearch.sources import kind_of
from mpqsearch.specs import TRDSpec

FIRST_SEED, END_SEED = BANDS["training"], BANDS["development"]
"""Seeds of training noise: none of those of evaluation, calibration, checks or search."""

N_PROBES = 8
"""Seeds, the last of the band, on which the scheduler is looked at."""

SEEDS_APART = 618_034
"""Trainings begin so many seeds apart, around the band. By the golden section: the first ``n`` of them are at least
380,000 / n seeds apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCall:
    """One call of the teacher, its raw prediction with all rows, and its positions ``[N', P, C]`` of features; all in
    main memory."""

    call: Call
    prediction: Tensor
    features: Tensor | None


class Trajectories:
    """Trajectories of the model's own runner, run online: no data set, noise and prompts from seeds, one batch in
    memory at a time.

    ``batch`` samples make a trajectory, fewer where the runner makes fewer at a time. ``seed`` chooses the noise.
    ``rank`` of ``world`` processes get batches of their own.
    """

    def __init__(self, denoiser: Denoiser, *, batch: int = 8, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if batch < 1:
            raise ConfigError(f"distill: batch must be at least 1, got {batch}")
        if not 0 <= seed < 1000:
            raise ConfigError(f"distill: seed must lie in 0..999, got {seed}")
        if any(map(kind_of, parts_of(denoiser.module))):
            raise ConfigError(
                "training (distill) changes denoisers alone: leave it out, or load the model without other parts"
            )
        self.denoiser, self.seed, self.rank, self.world = denoiser, seed, rank, world
        self.batch = batch_of(denoiser, batch)

    @property
    def n_calls(self) -> int:
        """Calls of the denoiser in a trajectory."""
        return n_calls(self.denoiser, self.batch, batch=self.batch)

    @property
    def identity(self) -> dict[str, str]:
        """Digest of the teacher's weights, and every setting of its trajectories."""
        return {
            "teacher": self.denoiser.digest,
            **{f"teacher.{k}": v for k, v in self.denoiser.runner.identity.items()},
            "teacher.batch": str(self.batch),
            "teacher.seed": str(self.seed),
            "teacher.processes": str(self.world),
        }

    def seeds(self, index: int) -> tuple[int, ...]:
        """Seeds of trajectory ``index``; past the end of their band they begin again."""
        first = self.seed * SEEDS_APART + (index * self.world + self.rank) * self.batch
        return tuple(FIRST_SEED + s % (END_SEED - FIRST_SEED - N_PROBES) for s in range(first, first + self.batch))

    @property
    def probe_seeds(self) -> list[range]:
        """Batches of seeds that no trajectory has, the same for all processes and trainings."""
        return [range(s, min(s + self.batch, END_SEED)) for s in range(END_SEED - N_PROBES, END_SEED, self.batch)]

    def encode(self, first: int, last: int) -> None:
        """Encode the prompts of trajectories ``first .. last - 1`` at once, and let the text encoders go."""
        seeds = [s for index in range(first, last) for s in self.seeds(index)]
        self.denoiser.runner.encode(self.denoiser.module, seeds, batch=self.batch)

    def run(self, index: int, relation: TRDSpec | None = None) -> list[TeacherCall]:
        """The calls of trajectory ``index`` in order, with features where a relation loss has a weight.

        Tensors that several calls share, such as embedded prompts, are kept once. Raises `ModelError` when there are
        not ``n_calls`` calls.
        """
        tap = feature_tap(self.denoiser, relation)
        made: list[TeacherCall] = []
        pool: dict[str, Tensor] = {}

        def take(call: Call, prediction: Tensor) -> None:
            features = None if tap is None else in_memory(tap.take())
            made.append(TeacherCall(call=call.kept(pool), prediction=in_memory(prediction), features=features))

        with torch.no_grad(), tap or nullcontext():
            each_call(self.denoiser, self.seeds(index), take, batch=self.batch)
        if len(made) != self.n_calls:
            raise ModelError(
                f"{self.denoiser.name}: a run made {len(made)} calls of the denoiser, another {self.n_calls}. Training "
                "on trajectories needs a scheduler whose number of steps is fixed."
            )
        return made


def feature_tap(denoiser: Denoiser, relation: TRDSpec | None) -> FeatureTap | None:
    """What reads the features that a relation loss compares; None where it has no weight."""
    if relation is None or not relation.weight:
        return None
    return FeatureTap(denoiser.module, relation.feature, relation.pooled_size)
