"""What the student learns from: trajectories of the full-precision model, run as they are needed or kept in files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mpqsearch.artifacts import atomic_write, digest_of
from mpqsearch.distill.trd import FeatureTap
from mpqsearch.errors import ArtifactError, ConfigError, StaleArtifactError
from mpqsearch.models import Condition, Denoiser
from mpqsearch.sampling import (
    SamplerSpec,
    condition_to,
    labels_of,
    noise_of,
    prediction_sensitivities,
    timesteps_of,
    trajectory,
)

FIRST_SEED = 2_000_000
"""Seeds of training noise start here: neither those of evaluation (from 0) nor those of calibration (from
1,000,000)."""

SENSITIVITY_SAMPLES = 8
"""Samples, or a batch if that is more, from which the sensitivities of timesteps are estimated."""

SEEDS_APART = 1_000_000
"""Training runs of different ``seed`` draw noise from ranges of this length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStep:
    """One timestep of one batch: the noisy batch ``x`` ``[N, ...]``, the teacher's guided prediction of it, and its
    positions ``[N', P, C]``."""

    timestep: int
    x: Tensor
    cond: Condition
    prediction: Tensor
    features: Tensor | None


class TeacherSource(Protocol):
    """Trajectories by number. ``timesteps`` are those of every trajectory, in order; ``identity`` says what they were
    made from."""

    guidance: float

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of every trajectory, noise first."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """What a trajectory depends on, as name and value."""
        ...

    def steps(self, index: int) -> Iterator[TeacherStep]:
        """The steps of trajectory ``index``, always the same for the same index."""
        ...

    def sensitivities(self) -> tuple[float, ...]:
        """What the prediction at each of the timesteps does to the sample: see
        `mpqsearch.sampling.prediction_sensitivities`."""
        ...


class Trajectories:
    """Trajectories run online: no data set, noise and classes from seeds, one batch in memory at a time.

    ``feature``: the module whose pooled output is kept, or empty for none. Class of a sample: its seed modulo the
    number of classes, so that classes are balanced over consecutive batches; ``conditions`` replaces that rule.
    ``rank`` of ``world`` processes get batches of their own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: SamplerSpec,
        *,
        batch: int = 8,
        seed: int = 0,
        feature: str = "",
        pooled_size: int = 16,
        rank: int = 0,
        world: int = 1,
        conditions: Callable[[Denoiser, Sequence[int]], Condition] = labels_of,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"distill: batch must be at least 1, got {batch}")
        if not 0 <= seed < 1000:
            raise ConfigError(f"distill: seed must lie in 0..999, got {seed}")
        self.denoiser, self.sampler, self.batch, self.seed = denoiser, sampler, batch, seed
        self.feature, self.pooled_size = feature, pooled_size
        self.rank, self.world, self.conditions = rank, world, conditions
        self.guidance = sampler.guidance

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the sampler, noise first."""
        return timesteps_of(self.denoiser, self.sampler)

    @property
    def identity(self) -> dict[str, str]:
        """Digest of the teacher's weights, and every setting of its trajectories."""
        settings = {k: v for k, v in self.sampler.to_data().items() if k != "batch"}
        return {
            "teacher": self.denoiser.digest,
            "teacher.scheduler": digest_of(dict(self.denoiser.scheduler)),
            **{f"teacher.{k}": str(v) for k, v in settings.items()},
            "teacher.batch": str(self.batch),
            "teacher.seed": str(self.seed),
            "teacher.feature": f"{self.feature}@{self.pooled_size}" if self.feature else "none",
            "teacher.processes": str(self.world),
        }

    def seeds(self, index: int) -> range:
        """Seeds of trajectory ``index``."""
        start = FIRST_SEED + self.seed * SEEDS_APART + (index * self.world + self.rank) * self.batch
        return range(start, start + self.batch)

    def sensitivities(self) -> tuple[float, ...]:
        """`prediction_sensitivities` of the noise before that of all trajectories and seeds, which no trajectory uses:
        the same on all processes."""
        seeds = range(FIRST_SEED - max(self.batch, SENSITIVITY_SAMPLES), FIRST_SEED)
        return prediction_sensitivities(self.denoiser, seeds, self.sampler, conditions=self.conditions)

    def steps(self, index: int) -> Iterator[TeacherStep]:
        """Run trajectory ``index``; nothing is computed before it is asked for."""
        seeds = self.seeds(index)
        device = next(self.denoiser.module.parameters()).device
        cond = condition_to(self.conditions(self.denoiser, seeds), device)
        x = noise_of(seeds, self.denoiser.sample_shape).to(device)
        run = trajectory(self.denoiser, x, cond, self.sampler)
        tap = FeatureTap(self.denoiser.module, self.feature, self.pooled_size) if self.feature else None
        while True:
            # The generator stands still between steps, so the hook is set and the gradient off only while it moves.
            with torch.no_grad(), tap or contextlib.nullcontext():
                step = next(run, None)
                features = tap.take() if tap is not None and step is not None else None
            if step is None:
                return
            yield TeacherStep(
                timestep=step.timestep, x=step.x, cond=cond, prediction=step.prediction, features=features
            )


class CachedTrajectories:
    """``count`` trajectories of another source, each computed once and kept as a safetensors file; afterwards they
    repeat.

    Several trainings of one model share a folder. Features take most of the space: ``4 N' P C`` bytes a timestep.
    Raises `StaleArtifactError` when a file was made from another source.
    """

    def __init__(self, source: Trajectories, folder: Path, count: int) -> None:
        if count < 1:
            raise ConfigError(f"distill: at least one cached trajectory is needed, got {count}")
        self.source, self.folder, self.count = source, folder, count
        self.guidance = source.guidance

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the source."""
        return self.source.timesteps

    @property
    def identity(self) -> dict[str, str]:
        """Those of the source, and after how many trajectories it repeats."""
        return self.source.identity | {"teacher.cached": str(self.count)}

    def sensitivities(self) -> tuple[float, ...]:
        """Those of the source, computed again for each training: as long as three trajectories or so."""
        return self.source.sensitivities()

    def steps(self, index: int) -> Iterator[TeacherStep]:
        """Read trajectory ``index`` modulo ``count``, or compute and write it."""
        index %= self.count
        path = self.folder / f"trajectory-{self.source.rank:03d}-{index:06d}.safetensors"
        if not path.is_file():
            self._write(path, index)
        return self._read(path)

    def _write(self, path: Path, index: int) -> None:
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for k, step in enumerate(self.source.steps(index)):
            tensors[f"{k:04d}.x"], tensors[f"{k:04d}.prediction"] = step.x, step.prediction
            if step.features is not None:
                tensors[f"{k:04d}.features"] = step.features
            if k == 0:
                tensors |= _named(step.cond)
        header = {"identity": self.source.identity, "timesteps": list(self.timesteps)}
        with atomic_write(path) as handle:
            handle.write(
                save(
                    {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                    metadata={"mpqsearch": json.dumps(header)},
                )
            )

    def _read(self, path: Path) -> Iterator[TeacherStep]:
        from safetensors import SafetensorError, safe_open

        device = next(self.source.denoiser.module.parameters()).device
        try:
            with safe_open(path, "pt", device=str(device)) as handle:
                header = json.loads(handle.metadata()["mpqsearch"])
                self._check(path, header)
                names = set(handle.keys())
                cond = _condition({n: handle.get_tensor(n) for n in names if n.startswith("cond")})
                for k, timestep in enumerate(header["timesteps"]):
                    key = f"{k:04d}"
                    features = handle.get_tensor(f"{key}.features") if f"{key}.features" in names else None
                    x, prediction = handle.get_tensor(f"{key}.x"), handle.get_tensor(f"{key}.prediction")
                    yield TeacherStep(timestep=timestep, x=x, cond=cond, prediction=prediction, features=features)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} is damaged ({type(error).__name__}: {error}). Delete it and run the same command again."
            ) from error

    def _check(self, path: Path, header: dict[str, Any]) -> None:
        now = self.source.identity
        changed = sorted(k for k in {*now, *header["identity"]} if now.get(k) != header["identity"].get(k))
        if changed:
            described = ", ".join(f"{k} ({header['identity'].get(k)} in the file, {now.get(k)} now)" for k in changed)
            raise StaleArtifactError(
                f"the cached trajectory {path} is of another teacher: {described}. Use another folder, or delete it."
            )
        if tuple(header["timesteps"]) != self.timesteps:
            raise StaleArtifactError(
                f"the cached trajectory {path} has the timesteps {header['timesteps']}, the sampler has "
                f"{list(self.timesteps)}. "
                "Use another folder, or delete it."
            )


def _named(cond: Condition) -> dict[str, Tensor]:
    if cond is None:
        return {}
    return {"cond": cond} if isinstance(cond, Tensor) else {f"cond.{k}": v for k, v in cond.items()}


def _condition(tensors: dict[str, Tensor]) -> Condition:
    if not tensors:
        return None
    return tensors["cond"] if "cond" in tensors else {k.removeprefix("cond."): v for k, v in tensors.items()}
