"""What is measured of a map: errors of final samples against full precision, from the same noise.

Three disjoint sets of seeds: the *search* seeds, of which a trial measures chunk after chunk; the *final* seeds, which
choose among the best maps of a study; the *report* seeds, which only say what the chosen map is worth.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpqsearch import artifacts
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.search.surrogate import Candidate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpqsearch.metrics import FeatureExtractor, Reference
    from mpqsearch.models import Denoiser

REPORTED = ("fd_fp", "fd_data", "paired_psnr")

FEATURE_FLOOR = 1e-6
"""Feature distances are held above this share of the features' mean squared length: 8-bit images of close samples are
equal."""


class Evaluator(Protocol):
    """Measures maps of one model."""

    @property
    def identity(self) -> str:
        """Digest of all that the values depend on besides map and seeds."""
        ...

    @property
    def error_name(self) -> str:
        """What `errors` measures, for axes and tables."""
        ...

    @property
    def forwards_per_sample(self) -> int:
        """Calls of the denoiser for one final sample."""
        ...

    def errors(self, candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        """Error of the final sample of each seed against full precision."""
        ...

    def distance(self, candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        """A distance to full precision of all samples together, then the `errors` of each."""
        ...

    def report(self, candidate: Candidate) -> dict[str, float]:
        """On the report seeds: ``error`` (the mean), ``fd_fp``, ``paired_psnr`` and, with data statistics, ``fd_data``,
        each with ``<name>_low`` and ``<name>_high``; empty without a reference."""
        ...


class ValueCache:
    """Measured values by digest: in memory, and one JSON file each in ``folder``, so that no later run of the same
    folder measures them again. Files are replaced as a whole; of two workers that measure the same, the last stays."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[str, Any] = {}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of ``key``, a digest; measured when it is not there. ``measure`` returns plain JSON data."""
        if key not in self._memory:
            path = None if self.folder is None else self.folder / f"{key}.json"
            if path is not None and artifacts.is_current(path, _MEASURED, {"key": key}, overwrite=True):
                self._memory[key] = artifacts.read_json(path, _MEASURED).data
            else:
                self._memory[key] = measure()
                if path is not None:
                    artifacts.write_json(path, _MEASURED, self._memory[key], {"key": key})
        return self._memory[key]


_MEASURED = "mpqsearch/measured"


@dataclass(kw_only=True)
class Measurements:
    """The measurements of one study: an evaluator, its seeds, and the values so far.

    ``seeds`` are the search seeds, measured ``chunk`` at a time; ``final`` the final seeds (none: the search seeds
    choose).
    """

    evaluator: Evaluator
    seeds: tuple[int, ...]
    chunk: int = 4
    final: tuple[int, ...] = ()
    cache: ValueCache = field(default_factory=ValueCache)

    def __post_init__(self) -> None:
        if len(self.seeds) < 2 or not 1 <= self.chunk <= len(self.seeds):
            raise ConfigError(
                f"a search needs at least 2 seeds and a chunk of 1..{len(self.seeds)}, got chunk={self.chunk}"
            )
        if set(self.seeds) & set(self.final):
            raise ConfigError("the final seeds of a search must not be among its search seeds: they would choose twice")

    @property
    def chunks(self) -> list[tuple[int, ...]]:
        """The search seeds, chunk by chunk."""
        return [self.seeds[i : i + self.chunk] for i in range(0, len(self.seeds), self.chunk)]

    def chunk_errors(self, candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        """The error of each of some search seeds."""
        errors: list[float] = self._value(candidate, "errors", seeds, lambda: self.evaluator.errors(candidate, seeds))
        return errors

    def errors(self, candidate: Candidate) -> list[float]:
        """The error of each search seed."""
        return [e for seeds in self.chunks for e in self.chunk_errors(candidate, seeds)]

    def error(self, candidate: Candidate) -> float:
        """Mean error over the search seeds."""
        return float(np.mean(self.errors(candidate)))

    def final_errors(self, candidate: Candidate) -> tuple[float, list[float]]:
        """On the final seeds: the distance of all samples together, and the error of each."""
        distance, *errors = self._value(
            candidate, "final", self.final, lambda: self.evaluator.distance(candidate, self.final)
        )
        return distance, errors

    def report(self, candidate: Candidate) -> dict[str, float]:
        """On the report seeds; see `Evaluator.report`."""
        return dict(self._value(candidate, "report", (), lambda: self.evaluator.report(candidate)))

    def _value(self, candidate: Candidate, what: str, seeds: Sequence[int], measure: Callable[[], Any]) -> Any:
        def finite() -> Any:
            value = measure()
            if not all(math.isfinite(v) for v in (value.values() if isinstance(value, Mapping) else value)):
                raise NumericsError(
                    f"the samples of the map {candidate.digest[:10]} at {candidate.budget.label()} are not finite"
                )
            return value

        key = artifacts.digest_of([self.evaluator.identity, candidate.digest, what, list(seeds)])
        return self.cache.get(key, finite)


@dataclass(kw_only=True)
class ModelEvaluator:
    """An `Evaluator` of one model.

    ``quantized`` makes the fake-quantized module of a map, with or without bias correction; the last ``keep`` of them
    stay in memory, one for each budget of a trial. ``calibration`` is a digest of what that module depends on besides
    the map. ``reference`` holds the full-precision samples of the report seeds. ``error`` is ``features``, which needs
    ``extractor``, or ``latents``, for which nothing is decoded (`mpqsearch.specs.search.ERRORS`).
    """

    denoiser: Denoiser
    quantized: Callable[[Candidate], nn.Module]
    calibration: str
    reference: Reference | None = None
    extractor: FeatureExtractor | None = None
    error: str = "latents"
    keep: int = 1
    _modules: OrderedDict[str, nn.Module] = field(default_factory=OrderedDict, init=False, repr=False)
    _full: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.error == "features" and self.extractor is None:
            raise ConfigError(
                "the error 'features' needs a feature extractor; use 'latents' without one (search.error)"
            )

    @property
    def error_name(self) -> str:
        """What `errors` measures, for axes and tables."""
        if self.error == "features" and self.extractor is not None:
            return f"squared feature distance ({self.extractor.label})"
        return "squared error of samples"

    @property
    def identity(self) -> str:
        """Digest of all that the values depend on besides map and seeds."""
        report = None
        if self.reference is not None and self.extractor is not None:
            data = self.reference.data.name if self.reference.data is not None else None
            report = [list(self.reference.seeds), self.extractor.label, data]
        return artifacts.digest_of([self.calibration, self.denoiser.runner.identity, self.error_name, report])

    @property
    def forwards_per_sample(self) -> int:
        """Calls of the denoiser for one final sample."""
        return self.denoiser.runner.calls_per_run(self.denoiser.module)

    def errors(self, candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        """The error of the final sample of each seed."""
        ours = self._compared(self._denoiser(candidate), seeds)
        return self._errors(ours, self._full_precision(seeds), len(seeds))

    def distance(self, candidate: Candidate, seeds: Sequence[int]) -> list[float]:
        """The Fréchet distance of the features to those of full precision, then the error of each sample.

        An error that all samples share changes their distribution more than errors of the same size that differ, and
        only the distance tells them apart. With the error ``latents`` the first number is the mean of the others.
        """
        from mpqsearch.metrics import FeatureStatistics, frechet_distance

        ours, theirs = self._compared(self._denoiser(candidate), seeds), self._full_precision(seeds)
        errors = self._errors(ours, theirs, len(seeds))
        if self.error == "latents":
            return [float(np.mean(errors)), *errors]
        return [frechet_distance(FeatureStatistics.of(theirs), FeatureStatistics.of(ours)), *errors]

    def report(self, candidate: Candidate) -> dict[str, float]:
        """Metrics on the report seeds, with intervals."""
        from mpqsearch.metrics import evaluate
        from mpqsearch.sampling import samples

        if self.reference is None:
            return {}
        found = evaluate(samples(self._denoiser(candidate), self.reference.seeds), self.reference)
        values = {"error": found.metrics["paired_mse"].value}
        if self.error == "features" and found.features is not None and self.reference.features is not None:
            values["error"] = float(
                np.mean(self._errors(found.features, self.reference.features, len(self.reference.seeds)))
            )
        for name in (n for n in REPORTED if n in found.metrics):
            m = found.metrics[name]
            values |= {name: m.value, f"{name}_low": m.low, f"{name}_high": m.high}
        return values

    def _compared(self, denoiser: Denoiser, seeds: Sequence[int]) -> Tensor:
        """What is compared of the samples of these seeds: features of pictures ``[N * F, d]``, or final latents
        ``[N, ...]``, which need no decoding."""
        from mpqsearch.metrics import features_of
        from mpqsearch.sampling import latents, samples

        if self.error == "latents" or self.extractor is None:
            return latents(denoiser, seeds)
        return features_of(samples(denoiser, seeds), self.extractor)

    def _errors(self, ours: Tensor, theirs: Tensor, n: int) -> list[float]:
        """The error of each of ``n`` samples; of a video the mean over its frames."""
        squared = (ours.double() - theirs.double()).square()
        if self.error == "latents":
            return squared.flatten(1).mean(1).tolist()
        floor = FEATURE_FLOOR * float(theirs.double().square().sum(1).mean())
        return squared.sum(1).view(n, -1).mean(1).clamp_min(floor).tolist()

    def _full_precision(self, seeds: Sequence[int]) -> Tensor:
        """The same of full precision, in the same batches as the quantized ones."""
        key = tuple(seeds)
        if key not in self._full:
            self._full[key] = self._compared(self.denoiser, seeds)
        return self._full[key]

    def _denoiser(self, candidate: Candidate) -> Denoiser:
        """The denoiser of a map, quantized unless it is kept."""
        key = candidate.digest
        if key not in self._modules:
            while len(self._modules) >= self.keep:
                self._modules.popitem(last=False)
            self._modules[key] = self.quantized(candidate)
        self._modules.move_to_end(key)
        return self.denoiser.with_module(self._modules[key])
