"""What rounding, bias correction, smoothing and activation scales need to know of the layers' inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mpqsearch import artifacts
from mpqsearch.core import BitMap, SensitivityProfile
from mpqsearch.errors import ModelError
from mpqsearch.methods import MethodSpec, require_formats
from mpqsearch.progress import bars_of
from mpqsearch.stages.base import Run
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.reuse import GRADIENTS, PROFILE, reuse_or_make

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from mpqsearch.profile import SecondMoments
    from mpqsearch.quant import ActivationTable, RangeCollector, Statistics

NOT_PRICED = ("weight", "slope", "final")
"""Losses that are measured with the errors of nearest rounding themselves, and stay those of nearest rounding."""


def statistics_for(run: Run, bit_map: BitMap) -> Statistics:
    """What quantizing by a map needs to know of the layers: what the profile says and, where the map rounds by GPTQ,
    second moments of their inputs, measured when they are read, by KFAC those of gradients."""
    from mpqsearch.profile import WithGradients, statistics_of

    if bit_map.rounds_to_nearest:
        return statistics_of(run.profile)
    return WithGradients(_second_moments(run), _gradients(run)) if bit_map.rounds_by("kfac") else _second_moments(run)


def _second_moments(run: Run) -> SecondMoments:
    return run.once("input moments", lambda: _new_second_moments(run))


def _new_second_moments(run: Run) -> SecondMoments:
    from mpqsearch.profile import SecondMoments, statistics_of

    first = run.config.calibration.first_seed
    moments = SecondMoments(
        denoiser=run.denoiser,
        table=run.table,
        seeds=range(first, first + run.config.quantizer.moment_samples),
        limit=run.config.model.limit_bytes,
        known=statistics_of(run.profile),
    )
    if names := moments.left_out:
        run.say(
            f"GPTQ rounding: {len(names)} layers are rounded to nearest, since their second moments do not fit the "
            f"memory limit: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        )
    return moments


def _gradients(run: Run) -> Mapping[str, Tensor]:
    return run.once("gradients", lambda: _saved_gradients(run))


def _saved_gradients(run: Run) -> Mapping[str, Tensor]:
    """Second moments of the gradients of final samples, measured or from ``profiles/gradients.json``; none where the
    model cannot be differentiated, and KFAC is then GPTQ."""
    from mpqsearch.profile import gradient_bytes
    from mpqsearch.sampling import can_sample

    if run.dry_run:
        return {}
    if run.profile.weights_only or not can_sample(run.denoiser):
        run.say("KFAC rounding: codes are those of GPTQ, since nothing samples here and there are no gradients")
        return {}
    if _beyond_gradients(run):
        needed = gradient_bytes(run.table)
        run.say(f"KFAC rounding: codes are those of GPTQ; gradients take {needed} bytes, more than the memory limit")
        return {}
    inputs = profile_inputs(run) | moment_inputs(run)
    return reuse_or_make(run, GRADIENTS, run.path("profiles", "gradients.json"), inputs, lambda: _new_gradients(run))


def _beyond_gradients(run: Run) -> bool:
    """Whether the memory limit does not hold the gradients that KFAC goes by."""
    from mpqsearch.profile import gradient_bytes

    limit = run.config.model.limit_bytes
    return limit is not None and gradient_bytes(run.table) > limit


def _new_gradients(run: Run) -> Mapping[str, Tensor]:
    from mpqsearch.profile import gradient_moments, statistics_of

    c = run.config.calibration
    with run.timed("gradients"), bars_of() as progress:
        try:
            return gradient_moments(
                run.denoiser,
                run.table,
                range(c.first_seed, c.first_seed + run.config.quantizer.gradient_samples),
                statistics_of(run.profile),
                seed=c.seed,
                checkpoint=c.checkpoint,
                progress=progress,
            )
        except ModelError as error:
            run.say(f"KFAC rounding: codes are those of GPTQ, since {error}")
            return {}


def moment_inputs(run: Run) -> dict[str, str]:
    """What GPTQ and KFAC rounding depend on beside the profile's inputs: the layers that a memory limit leaves to
    nearest rounding, and whether it leaves out gradients."""
    from mpqsearch.profile import beyond_limit

    left_out = beyond_limit(run.table, run.config.model.limit_bytes)
    inputs = {"left_out": artifacts.digest_of(list(left_out))} if left_out else {}
    return inputs | ({"gradients": "left out"} if _beyond_gradients(run) else {})


def priced_file(method: MethodSpec, measured: SensitivityProfile) -> str:
    """The file in the run folder that holds the profile which prices a method, see `priced`."""
    plain = method.rounding == "nearest" or method.loss in NOT_PRICED or measured.weights_only
    return "profile.json" if plain else f"profiles/gptq-{','.join(method.format_names)}.json"


def priced(run: Run, method: MethodSpec) -> SensitivityProfile:
    """The profile with the errors that the method's rounding leaves, measured or from ``profiles/gptq-<format>.json``
    (of several formats, with commas between them).

    It is ``measured`` itself for nearest rounding, for losses that know no other, and where nothing may run (weights
    only, a dry run that would have to measure).
    """
    require_formats(method, run.profile)
    file = priced_file(method, run.profile)
    if file == "profile.json":
        return run.profile
    inputs = profile_inputs(run) | moment_inputs(run)
    return run.once(
        file,
        lambda: reuse_or_make(run, PROFILE, run.path(*file.split("/")), inputs, lambda: _price(run, method)),
    )


def _price(run: Run, method: MethodSpec) -> SensitivityProfile:
    from mpqsearch.profile import gptq_profile, in_formats

    if run.dry_run:
        return run.profile
    if method.formats:
        return in_formats(run.profile, {name: priced(run, method.in_format(name)) for name in method.formats})
    fmt = replace(run.config.quantizer.format(), scheme=method.scheme, smooth=method.smooth, group=method.group)
    run.say(f"profile: pricing GPTQ rounding ({method.format_name})")
    with run.timed("price"):
        return gptq_profile(run.denoiser, run.table, run.profile, _second_moments(run), fmt)


def activation_table(run: Run, bit_map: BitMap, statistics: Statistics) -> ActivationTable | None:
    """Scales of the activation widths of a map, from the run's own sampler; None when it stores none.

    Histograms are collected once for all maps that smooth alike and have as many scales: only the search depends on the
    widths.
    """
    from mpqsearch.profile import scales_of

    static = bit_map.static_inputs(run.table)
    if not static:
        return None
    key = ("ranges", bit_map.activation_steps > 1, bit_map.scaled_inputs, tuple(sorted(static)))
    ranges = run.once(key, lambda: _ranges(run, bit_map, statistics))
    return scales_of(ranges, run.table, bit_map, zero_points=run.config.activations.zero_points)


def _ranges(run: Run, bit_map: BitMap, statistics: Statistics) -> RangeCollector:
    from mpqsearch.profile import collect_ranges
    from mpqsearch.quant import smooth_inputs

    c = run.config.activations
    with run.timed("calibrate activations"), bars_of() as progress:
        return collect_ranges(
            run.denoiser,
            run.table,
            seeds=range(c.first_seed, c.first_seed + c.samples),
            per_timestep=bit_map.activation_steps > 1,
            layers=bit_map.static_inputs(run.table),
            factors=smooth_inputs(run.denoiser.module, run.table, bit_map, statistics),
            progress=progress,
        )
