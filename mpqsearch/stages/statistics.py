"""What rounding, bias correction, smoothing and activation scales need to know of the layers' inputs."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch import artifacts
from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.methods import MethodSpec
from mpqsearch.progress import bars_of
from mpqsearch.stages.base import Run
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.reuse import PROFILE, reuse_or_make

if TYPE_CHECKING:
    from torch import Tensor

    from mpqsearch.profile import InputMoments
    from mpqsearch.quant import ActivationTable, RangeCollector

NOT_PRICED = ("weight", "slope", "final")
"""Losses that are measured with the errors of nearest rounding themselves, and stay those of nearest rounding."""


def tensors(values: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Arrays of a profile as tensors of their own."""
    import torch

    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


def input_moments(run: Run, table: LayerTable, bit_map: BitMap) -> InputMoments | None:
    """What GPTQ rounding needs to know of the layers' inputs, measured when it is read; None for a map that rounds to
    nearest."""
    rounds_to_nearest = all(f.rounding == "nearest" for f in (bit_map.format, *bit_map.formats.values()))
    return None if rounds_to_nearest else _moments(run, table)


def _moments(run: Run, table: LayerTable) -> InputMoments:
    return run.once("input moments", lambda: _new_moments(run, table))


def _new_moments(run: Run, table: LayerTable) -> InputMoments:
    from mpqsearch.profile import InputMoments

    first = run.config.calibration.first_seed
    moments = InputMoments(
        denoiser=run.denoiser,
        table=table,
        seeds=range(first, first + run.config.quantizer.moment_samples),
        limit=run.config.model.limit_bytes,
    )
    if names := moments.left_out:
        run.say(
            f"GPTQ rounding: {len(names)} layers are rounded to nearest, since their second moments do not fit the "
            f"memory limit: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        )
    return moments


def moment_inputs(run: Run, table: LayerTable) -> dict[str, str]:
    """What GPTQ rounding depends on beside the profile's inputs: the layers that a memory limit leaves to nearest
    rounding, if any."""
    from mpqsearch.profile import beyond_limit

    left_out = beyond_limit(table, run.config.model.limit_bytes)
    return {"left_out": artifacts.digest_of(list(left_out))} if left_out else {}


def priced_file(method: MethodSpec, measured: SensitivityProfile) -> str:
    """The file in the run folder that holds the profile which prices a method, see `priced`."""
    plain = method.rounding == "nearest" or method.loss in NOT_PRICED or measured.weights_only
    return "profile.json" if plain else f"profiles/gptq-{method.format_name}.json"


def priced(run: Run, table: LayerTable, measured: SensitivityProfile, method: MethodSpec) -> SensitivityProfile:
    """The profile with the errors that the method's rounding leaves, measured or from ``profiles/gptq-<format>.json``.

    It is ``measured`` itself for nearest rounding, for losses that know no other, and where nothing may run (weights
    only, a dry run that would have to measure).
    """
    file = priced_file(method, measured)
    if file == "profile.json":
        return measured
    inputs = profile_inputs(run, table) | moment_inputs(run, table)
    return run.once(
        file,
        lambda: reuse_or_make(
            run, PROFILE, run.path(*file.split("/")), inputs, lambda: _price(run, table, measured, method)
        ),
    )


def _price(run: Run, table: LayerTable, measured: SensitivityProfile, method: MethodSpec) -> SensitivityProfile:
    from mpqsearch.profile import gptq_profile

    if run.dry_run:
        return measured
    fmt = replace(run.config.quantizer.format(), scheme=method.scheme, smooth=method.smooth)
    run.say(f"profile: pricing GPTQ rounding ({method.format_name})")
    with run.timed("price"):
        return gptq_profile(run.denoiser, table, measured, _moments(run, table), fmt)


def correction_of(
    run: Run, table: LayerTable, measured: SensitivityProfile, bit_map: BitMap, *, bias_correction: bool
) -> dict[str, Any]:
    """``means`` and ``moments`` for `quantize_model` and `build_student`: what bias correction and GPTQ rounding
    need."""
    means: Mapping[str, Tensor] | None = tensors(measured.means) if bias_correction else None
    moments = input_moments(run, table, bit_map)
    if moments is None:
        return {"means": means, "moments": None}
    if means is not None:  # a second moment and a mean of other samples would give a covariance that is none
        means = ChainMap(moments.means(), means)  # type: ignore[arg-type]
    return {"means": means, "moments": moments.moments()}


def activation_table(
    run: Run, table: LayerTable, bit_map: BitMap, input_max: Mapping[str, Tensor]
) -> ActivationTable | None:
    """Scales of the activation widths of a map, from the run's own sampler; None when it has none.

    Histograms are collected once for all maps that smooth alike and have as many scales: only the search depends on the
    widths.
    """
    from mpqsearch.profile import scales_of

    if not bit_map.activations:
        return None
    key = ("ranges", bit_map.activation_steps > 1, bit_map.scaled_inputs, tuple(sorted(bit_map.activations)))
    ranges = run.once(key, lambda: _ranges(run, table, bit_map, input_max))
    return scales_of(ranges, bit_map, run.config.activations)


def _ranges(run: Run, table: LayerTable, bit_map: BitMap, input_max: Mapping[str, Tensor]) -> RangeCollector:
    from mpqsearch.profile import collect_ranges
    from mpqsearch.quant import smooth_inputs

    c = run.config.activations
    with run.timed("calibrate activations"), bars_of() as progress:
        return collect_ranges(
            run.denoiser,
            table,
            seeds=range(c.first_seed, c.first_seed + c.samples),
            per_timestep=bit_map.activation_steps > 1,
            layers=bit_map.activations,
            factors=smooth_inputs(run.denoiser.module, table, bit_map, input_max),
            progress=progress,
        )
