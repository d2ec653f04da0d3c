"""Everything that a profile measures, as steps: each is timed, kept for a run that continues, and merged."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeVar

import torch

from mpqsearch.core import LayerSpec, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.profile.activations import activation_arrays
from mpqsearch.profile.calibrate import Calibration, calibrate, no_input
from mpqsearch.profile.contexts import context_sensitivity
from mpqsearch.profile.final_probes import sampler_totals
from mpqsearch.profile.gptq import following
from mpqsearch.profile.layer_scores import layer_scores
from mpqsearch.profile.one_layer import final_errors
from mpqsearch.profile.partial import Arrays, Partial, resumed
from mpqsearch.profile.probing import Probing
from mpqsearch.profile.recomputed import SCRATCH, SUMMED, blocks_within
from mpqsearch.profile.second_moments import SecondMoments
from mpqsearch.profile.slopes import slope_arrays
from mpqsearch.profile.tables import WeightErrors, formats_of, tables_of
from mpqsearch.profile.weighing import Weighing, weighing_of
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import RowStatistics
from mpqsearch.sampling import can_sample, n_calls
from mpqsearch.specs import CalibrationSpec

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measurement: ``run`` gets what the steps before it measured."""

    name: str
    run: Callable[[Arrays], Arrays]


@dataclass(kw_only=True)
class Measurement:
    """What all steps of one profile read, and what they have found."""

    denoiser: Denoiser
    table: LayerTable
    policy: Policy
    spec: CalibrationSpec
    base: QuantFormat
    formats: Mapping[str, QuantFormat]
    memory_limit: int | None = None
    partial: Partial | None = None
    known: SensitivityProfile | None = None
    progress: Progress = silent
    arrays: Arrays = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def seeds(self) -> range:
        """Seeds of the calibration samples."""
        return range(self.spec.first_seed, self.spec.first_seed + self.spec.samples)

    @property
    def widths(self) -> tuple[int, ...]:
        """The searched widths, narrowest first."""
        return tuple(sorted(self.policy.widths))

    def take(self, steps: Sequence[Step]) -> None:
        """Run the steps in order; what an earlier run finished is read from ``partial``."""
        for step in steps:
            run = functools.partial(step.run, self.arrays)
            self.arrays |= self.timed(step.name, functools.partial(resumed, self.partial, step.name, run))

    def timed(self, name: str, run: Callable[[], T]) -> T:
        """The result of ``run``; its time is noted."""
        began = time.perf_counter()
        result = run()
        self.seconds[name] = round(time.perf_counter() - began, 3)
        return result


def profile_model(
    denoiser: Denoiser,
    table: LayerTable,
    policy: Policy,
    spec: CalibrationSpec,
    fmt: QuantFormat,
    *,
    memory_limit: int | None = None,
    partial: Partial | None = None,
    known: SensitivityProfile | None = None,
    progress: Progress = silent,
) -> SensitivityProfile:
    """Measure a model: see `SensitivityProfile` for what comes out, in which units; only what `CalibrationSpec` says
    with ``granularity = "layer"``.

    ``memory_limit`` bounds, in bytes, what second moments of inputs and weight errors take, and the gradient of the
    largest layer with them. With it the calibration runs once for each group of layers whose second moments fit, errors
    are made again at every projection, some rows at a time, and the numbers are the same up to rounding (1e-4 of the
    largest). Slopes at contexts need a second copy of the model. ``partial`` keeps the tables of each finished layer
    and each finished step: a run that continues from it samples the calibration inputs again and measures what is left.
    ``known`` is the profile of another model of the same structure, such as the one that this was fine-tuned from: its
    sensitivities are taken and no backward pass runs. Inputs and errors are this model's own, and layer totals change
    as the errors do (`following`); slopes at contexts are left out. Raises `ConfigError`, with the smallest limit that
    works, when a layer does not fit, and for a known profile of another structure, other widths or fewer formats.
    """
    _check(denoiser, policy, spec)
    m = Measurement(
        denoiser=denoiser,
        table=table,
        policy=policy,
        spec=spec,
        base=fmt,
        formats=formats_of(spec, fmt),
        memory_limit=memory_limit,
        partial=partial,
        known=known,
        progress=progress,
    )
    if known is not None:
        _check_known(m, known)
    calibration = _by_layer(m) if spec.granularity == "layer" else _by_channel(m)
    return SensitivityProfile(
        model_digest=table.digest,
        names=tuple(la.name for la in table),
        channels=tuple(la.n_channels for la in table),
        widths=m.widths,
        arrays=m.arrays,
        means={n: mean.cpu().numpy() for n, mean in calibration.means.items()},
        input_max={n: s.input_max.float().cpu().numpy() for n, s in calibration.statistics.items()},
        calibration={
            "spec": spec.to_data(),
            "runner": denoiser.runner.identity,
            "timesteps": calibration.timesteps,
            "format": fmt.to_data(),
            "constant_inputs": list(calibration.constant),
            "spent": {"seconds": m.seconds, **_memory()},
            **({} if can_sample(denoiser) else {"recorded_calls": n_calls(denoiser, 0)}),
            **({} if known is None else {"sensitivities_of": known.model_digest}),
        },
    )


def _check(denoiser: Denoiser, policy: Policy, spec: CalibrationSpec) -> None:
    """Raise `ConfigError` for what cannot be measured, before anything has run."""
    if spec.final_widths and not can_sample(denoiser):
        raise ConfigError(
            f"calibration.final_widths compares final samples, but {denoiser.name} is measured with "
            f"{denoiser.runner!r}, which bring no sampler. Leave it out: the loss 'probe' is measured on the calls."
        )
    for bits in spec.final_widths:
        if bits not in policy.widths:
            raise ConfigError(
                f"calibration.final_widths asks for {bits} bits, which the policy does not search ({policy.widths})"
            )


def _check_known(m: Measurement, known: SensitivityProfile) -> None:
    """Raise `ConfigError` for a profile that is of no use for this model."""
    known.need("sensitivity", "calibration.reuse")
    here = [(la.name, la.n_channels) for la in m.table]
    pairs = zip_longest(here, zip(known.names, known.channels, strict=True), fillvalue=("no more layers", 0))
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    if differing:
        (name, channels), (other, others) = differing[0]
        raise ConfigError(
            f"calibration.reuse names the profile of another structure: {len(differing)} layers differ, the first is "
            f"{name!r} with {channels} output channels here, {other!r} with {others} there. A fine-tune has the layers "
            "of its base; profile this model by itself."
        )
    if m.widths != known.widths or not {*m.formats} <= {*known.formats}:
        raise ConfigError(
            f"calibration.reuse: the profile has widths {known.widths} and formats {', '.join(known.formats)}, this "
            f"study {m.widths} and {', '.join(m.formats)}. Set policy.widths and calibration.schemes as they were."
        )


def _reused(m: Measurement, known: SensitivityProfile) -> Arrays:
    """The sensitivities of another profile, and its layer totals with this model's errors."""
    taken = ("sensitivity", "context_sensitivity", "step_sensitivity")
    arrays = {key: known.arrays[key] for key in taken if key in known.arrays}
    for name in m.formats:
        errors = {suffix: m.arrays[f"output_error{suffix}/{name}"] for suffix in ("", "_corrected")}
        arrays |= following(known, m.table, name, errors)
    return arrays


def _by_layer(m: Measurement) -> Calibration:
    n_candidates = len(m.widths) * len(m.formats)
    blocks = blocks_within(m.denoiser.module, m.table, n_candidates, m.memory_limit, second_moments=False)
    arrays, calibration = m.timed(
        "layer scores",
        lambda: layer_scores(
            m.denoiser,
            m.table,
            m.widths,
            m.formats,
            m.spec,
            m.progress,
            blocks=None if m.memory_limit is None else blocks,
        ),
    )
    m.arrays |= arrays
    return calibration


def _by_channel(m: Measurement) -> Calibration:
    # First: a limit that is too small should say so before anything has run.
    n_candidates = len(m.widths) * len(m.formats)
    blocks = blocks_within(m.denoiser.module, m.table, n_candidates, m.memory_limit)
    weighing = m.timed("gains", lambda: weighing_of(m.denoiser, m.seeds))
    calibration = m.timed(
        "calibration",
        lambda: calibrate(
            m.denoiser, m.table, m.spec, m.progress, weighing=weighing, second_moments=m.memory_limit is None
        ),
    )
    tables, errors = m.timed(
        "error tables",
        lambda: tables_of(
            m.denoiser,
            m.table,
            m.widths,
            m.formats,
            _statistics(m, calibration),
            m.progress,
            blocks=blocks,
            hold=m.memory_limit is None,
            partial=m.partial,
        ),
    )
    m.arrays |= tables
    m.take(_steps(m, calibration, errors, weighing))
    return calibration


def _statistics(m: Measurement, calibration: Calibration) -> Callable[[LayerSpec], RowStatistics]:
    """The statistics of a layer with its second moment: held, or under a limit measured for some layers at a time."""
    if m.memory_limit is None:
        return lambda layer: calibration.statistics[layer.name]
    moments = SecondMoments(
        denoiser=m.denoiser,
        table=m.table,
        seeds=m.seeds,
        limit=m.memory_limit - m.memory_limit // SCRATCH,
        working=SUMMED,
        progress=m.progress,
    )
    device = next(m.denoiser.module.parameters()).device
    return lambda layer: moments.get(layer.name) or no_input(layer, device, second_moment=True)


def _steps(m: Measurement, calibration: Calibration, errors: WeightErrors, weighing: Weighing) -> list[Step]:
    """What is measured after the tables, in order."""
    given = (m.denoiser, m.table)
    probing = Probing(
        denoiser=m.denoiser,
        table=m.table,
        errors=errors,
        n_widths=len(m.widths),
        weighing=weighing,
        probes=m.spec.probes,
        seed=m.spec.seed,
        checkpoint=m.spec.checkpoint,
    )
    power = torch.cat([calibration.output_power[la.name] for la in m.table]).float().cpu().numpy()
    m.arrays["output_power"] = power
    looked_at = calibration.steps
    steps = [
        Step(name="sensitivities", run=lambda _: probing.measure(looked_at, m.progress)),
        Step(
            name="sensitivities at contexts",
            run=lambda _: context_sensitivity(probing, m.policy, m.spec, looked_at, m.progress),
        ),
    ]
    if m.spec.sampler_seeds and can_sample(m.denoiser):  # recorded calls bring no sampler to differentiate
        totals = Step(
            name="sensitivities of the final sample",
            run=lambda _: sampler_totals(*given, m.spec, errors, m.progress),
        )
        slopes = Step(
            name="slopes at contexts", run=lambda _: slope_arrays(*given, m.policy, m.spec, errors, m.progress)
        )
        steps += [totals, slopes]
    if m.known is not None:
        known = m.known
        steps = [Step(name="reused sensitivities", run=lambda _: _reused(m, known))]
    if m.spec.activation_bits:
        smooth = m.formats.get("asymmetric+smooth")
        steps.append(
            Step(
                name="quantized inputs",
                run=lambda arrays: activation_arrays(
                    *given, m.spec, m.widths, smooth, calibration.statistics, arrays["sensitivity"], m.progress
                ),
            )
        )
    if m.spec.final_widths:
        alone = functools.partial(final_errors, partial=m.partial, progress=m.progress)
        run = functools.partial(alone, *given, m.widths, calibration.statistics, m.spec, m.base)
        steps.append(Step(name="one layer at a time", run=lambda _: run()))
    return steps


def _memory() -> dict[str, int]:
    """Peak resident memory of this process, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": peak if sys.platform == "darwin" else peak * 1024}
