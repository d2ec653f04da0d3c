"""The slow reference: final samples with one layer quantized at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.profile.calibrate import Progress, silent
from mpqsearch.profile.partial import Arrays
from mpqsearch.profile.probing import std_error_of
from mpqsearch.profile.tables import final_format, formats_of
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import sample
from mpqsearch.specs import CalibrationSpec, SamplerSpec

Case = tuple[str, int, bool]
"""A layer, its width, and whether its bias is corrected."""

FinalErrors = dict[Case, tuple[float, ...]]
"""Squared error (mean over pixels) of each final sample: seeds from ``first_seed`` on."""


def final_errors(
    denoiser: Denoiser,
    table: LayerTable,
    profile: SensitivityProfile,
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    base: QuantFormat,
    *,
    known: FinalErrors | None = None,
    keep: Callable[[FinalErrors], Any] | None = None,
    progress: Progress = silent,
) -> FinalErrors:
    """Error of the final samples with one layer quantized at a time, at ``spec.final_widths``: the slow reference.

    One run of the sampler for each layer and width, in the format that `final_format` names; two for a layer with a
    bias, without and with its correction. ``known`` holds what an earlier run finished; ``keep`` is called with all
    results after each layer. Raises `ConfigError` for a width that the profile does not have.
    """
    for bits in spec.final_widths:
        if bits not in profile.widths:
            raise ConfigError(
                f"calibration.final_widths asks for {bits} bits, which the policy does not search ({profile.widths})"
            )
    results = dict(known or {})
    todo = [la for la in table if any(case not in results for case in _cases(la.name, table, spec))]
    if not todo:
        return results
    seeds = range(spec.first_seed, spec.first_seed + spec.final_seeds)
    reference = sample(denoiser, seeds, sampler)
    means = {n: torch.from_numpy(np.array(m)) for n, m in profile.means.items()}
    fmt = formats_of(spec, base)[final_format(spec)]
    for done, layer in enumerate(todo, start=1):
        for case in _cases(layer.name, table, spec):
            if case not in results:
                student = _quantized(denoiser, table, case, fmt, means)
                errors = (sample(student, seeds, sampler) - reference).square().flatten(1).mean(1)
                results[case] = tuple(float(e) for e in errors)
        if keep is not None:
            keep(results)
        progress("one layer at a time", done, len(todo))
    return results


def _cases(name: str, table: LayerTable, spec: CalibrationSpec) -> Iterator[Case]:
    for bits in spec.final_widths:
        yield name, bits, False
        if table[name].has_bias:
            yield name, bits, True


def _quantized(
    denoiser: Denoiser, table: LayerTable, case: Case, fmt: QuantFormat, means: Mapping[str, Tensor]
) -> Denoiser:
    name, bits, corrected = case
    weights = {la.name: np.array(bits if la.name == name else FULL_PRECISION, dtype=np.uint8) for la in table}
    bit_map = BitMap(model_digest=table.digest, weights=weights, format=fmt)
    module = quantize_model(denoiser.module, table, bit_map, means=means if corrected else None).module
    return denoiser.with_module(module)


def with_final_errors(profile: SensitivityProfile, results: FinalErrors) -> SensitivityProfile:
    """The profile with ``layer_final_error`` and ``layer_final_error_corrected``; unchanged when nothing was measured.

    A layer without a bias has the same value in both. NaN: not measured.
    """
    if not results:
        return profile
    fmt = profile.calibration["spec"]["schemes"][-1]
    shape = len(profile.names), len(profile.widths)
    arrays: Arrays = {}
    for corrected, suffix in ((False, ""), (True, "_corrected")):
        error, spread = np.full(shape, np.nan, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32)
        for name, bits, is_corrected in results:
            if is_corrected and not corrected:
                continue
            values = np.array(results.get((name, bits, corrected), results[name, bits, False]))
            at = profile.index[name], profile.widths.index(bits)
            error[at], spread[at] = values.mean(), std_error_of(values[:, None])[0]
        arrays |= {f"layer_final_error{suffix}/{fmt}": error, f"layer_final_std_error{suffix}/{fmt}": spread}
    return replace(profile, arrays={**profile.arrays, **arrays})
