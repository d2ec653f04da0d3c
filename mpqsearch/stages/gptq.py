"""What GPTQ rounding needs of a run: moments of the layers' inputs, and the profile as that rounding prices it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpqsearch import artifacts
from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.methods import MethodSpec
from mpqsearch.stages.base import Run
from mpqsearch.stages.profiling import profile_inputs

if TYPE_CHECKING:
    from mpqsearch.profile import InputMoments

NOT_PRICED = ("weight", "slope", "final")
"""Losses that are measured with the errors of nearest rounding themselves, and stay those of nearest rounding."""


def input_moments(run: Run, table: LayerTable, bit_map: BitMap) -> InputMoments | None:
    """What GPTQ rounding needs to know of the layers' inputs, measured when it is read; None for a map that rounds to
    nearest."""
    if all(f.rounding == "nearest" for f in (bit_map.format, *bit_map.formats.values())):
        return None
    return moments_of(run, table)


def moment_inputs(run: Run, table: LayerTable) -> dict[str, str]:
    """What GPTQ rounding depends on beside the profile's inputs: the layers that a memory limit leaves to nearest
    rounding, if any."""
    from mpqsearch.profile import beyond_limit

    left_out = beyond_limit(table, run.config.model.limit_bytes)
    return {"left_out": artifacts.digest_of(list(left_out))} if left_out else {}


def moments_of(run: Run, table: LayerTable) -> InputMoments:
    """The run's input moments; nothing is measured until they are read."""
    from mpqsearch.profile import InputMoments

    if run.moments is None:
        first = run.config.calibration.first_seed
        run.moments = InputMoments(
            denoiser=run.denoiser,
            table=table,
            sampler=run.config.sampler,
            seeds=range(first, first + run.config.quantizer.moment_samples),
            limit=run.config.model.limit_bytes,
        )
        if run.moments.left_out:
            run.say(
                f"GPTQ rounding: {len(run.moments.left_out)} layers are rounded to nearest, since their second "
                "moments do not fit "
                "the memory limit: "
                f"{', '.join(run.moments.left_out[:3])}{' ...' if len(run.moments.left_out) > 3 else ''}"
            )
    return run.moments


def priced_file(method: MethodSpec, measured: SensitivityProfile) -> str:
    """The file in the run folder that holds the profile which prices a method, see `priced`."""
    plain = method.rounding == "nearest" or method.loss in NOT_PRICED or measured.weights_only
    return "profile.json" if plain else f"profiles/gptq-{method.format_name}.json"


def priced(run: Run, table: LayerTable, measured: SensitivityProfile, method: MethodSpec) -> SensitivityProfile:
    """``measured`` with the errors that the method's rounding leaves, from ``profiles/gptq-<format>.json`` where that
    is there.

    The profile itself for nearest rounding, for losses that know no other, and where nothing may run (weights only, a
    dry run).
    """
    file = priced_file(method, measured)
    if file == "profile.json":
        return measured
    if method.format_name not in run.priced:
        from mpqsearch.core import QuantFormat
        from mpqsearch.profile import gptq_profile

        path, inputs = (
            run.path(*file.split("/")),
            profile_inputs(run, table) | moment_inputs(run, table),
        )
        if artifacts.is_current(path, "mpqsearch/profile", inputs, overwrite=run.overwrite):
            run.priced[method.format_name] = artifacts.load_profile(path)
        elif run.dry_run:
            return measured
        else:
            c = run.config.quantizer
            fmt = QuantFormat(
                scheme=method.scheme, criterion=c.criterion, p=c.p, n_candidates=c.n_candidates, smooth=method.smooth
            )
            run.say(f"profile: pricing GPTQ rounding ({method.format_name})")
            with run.timed("price"):
                made = gptq_profile(run.denoiser, table, measured, moments_of(run, table), fmt)
            artifacts.save_profile(path, made, inputs)
            run.priced[method.format_name] = made
    return run.priced[method.format_name]
