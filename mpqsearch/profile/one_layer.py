"""The slow reference: final samples with one layer quantized at a time."""

from __future__ import annotations

import functools

import numpy as np

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.models import Denoiser
from mpqsearch.profile.partial import Arrays, Partial, resumed
from mpqsearch.profile.probing import std_error_of
from mpqsearch.profile.tables import final_format, formats_of
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import Statistics, quantize_model
from mpqsearch.sampling import latents
from mpqsearch.specs import CalibrationSpec


def final_errors(
    denoiser: Denoiser,
    table: LayerTable,
    widths: tuple[int, ...],
    statistics: Statistics,
    spec: CalibrationSpec,
    base: QuantFormat,
    *,
    partial: Partial | None = None,
    progress: Progress = silent,
) -> Arrays:
    """``layer_final_error`` and ``layer_final_error_corrected`` ``[L, W]`` with their standard errors over seeds: the
    squared error of the final samples (latents, where a model makes those), a mean over their values, with one layer
    quantized at a time.

    One run of the sampler for each layer and each of ``spec.final_widths``, in the format that `final_format` names;
    two for a layer with a bias, without and with its correction. NaN at the other ``widths``.
    ``partial`` keeps each finished layer.
    """
    seeds = range(spec.first_seed, spec.first_seed + spec.final_seeds)
    name = final_format(spec)
    fmt, reference = formats_of(spec, base)[name], latents(denoiser, seeds)

    def measure(layer: LayerSpec) -> Arrays:
        out = np.full((2, 2, len(widths)), np.nan, dtype=np.float32)  # mean, standard error; without, with correction
        for bits in spec.final_widths:
            for corrected in (0, 1) if layer.has_bias else (0,):
                quantized = _quantized(denoiser, table, layer, bits, fmt, statistics if corrected else None)
                errors = (latents(quantized, seeds) - reference).square().flatten(1).mean(1)
                values = np.array([float(e) for e in errors])
                out[:, corrected:, widths.index(bits)] = [[values.mean()], [std_error_of(values[:, None])[0]]]
        return {"final": out}

    layers = []
    for position, layer in enumerate(table):
        layers.append(resumed(partial, f"final {position:05d}", functools.partial(measure, layer))["final"])
        progress("one layer at a time", position + 1, len(table))
    error, spread = np.stack(layers, 2)
    return {
        f"layer_final_{kind}{suffix}/{name}": values[i]
        for i, suffix in enumerate(("", "_corrected"))
        for kind, values in (("error", error), ("std_error", spread))
    }


def _quantized(
    denoiser: Denoiser,
    table: LayerTable,
    layer: LayerSpec,
    bits: int,
    fmt: QuantFormat,
    correction: Statistics | None,
) -> Denoiser:
    weights = {la.name: np.array(bits if la == layer else FULL_PRECISION, dtype=np.uint8) for la in table}
    bit_map = BitMap(model_digest=table.digest, weights=weights, format=fmt)
    quantized = quantize_model(denoiser.module, table, bit_map, statistics=correction, bias_correction=True)
    return denoiser.with_module(quantized.module)
