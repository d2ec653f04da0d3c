"""What samples of a run are compared with, and the models they are drawn from: below solving and searching, which both
need it."""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch import artifacts
from mpqsearch._version import __version__
from mpqsearch.core import (
    BitMap,
    LayerTable,
    MetricValue,
    SensitivityProfile,
    StudyRecord,
    average_bits,
    size_bytes,
)
from mpqsearch.errors import ConfigError
from mpqsearch.progress import bar_of, bars_of
from mpqsearch.stages.base import Run, same_model
from mpqsearch.stages.gptq import input_moments, moment_inputs
from mpqsearch.stages.profiling import profile_inputs

if TYPE_CHECKING:
    from mpqsearch.metrics import Reference


def evaluation_key(run: Run, table: LayerTable, bit_map: BitMap | None, *, bias_correction: bool) -> str:
    """Digest of everything that the samples of a map depend on: the same point is never evaluated twice."""
    c = run.config.to_data()
    parts: list[Any] = [
        __version__,
        table.digest,
        c["sampler"],
        run.evaluation_inputs,
        run.source_inputs,
        bit_map.digest if bit_map is not None else "full precision",
    ]
    if bit_map is not None and (bias_correction or bit_map.format.smooth or bit_map.format.rounding != "nearest"):
        parts += [bias_correction, profile_inputs(run, table)]  # input statistics come from the profile or its settings
        parts += [moment_inputs(run, table)] if bit_map.format.rounding != "nearest" else []
    if bit_map is not None and bit_map.activations:
        parts += [c["activations"]]
    return artifacts.digest_of(parts)


def reference(run: Run, table: LayerTable) -> tuple[Reference, StudyRecord]:
    """Full-precision samples with their features, cached, and their record."""
    import torch

    from mpqsearch.metrics import Reference, evaluate
    from mpqsearch.sampling import labels_of, sample, to_uint8

    c, extractor = run.config.evaluate, run.extractor
    seeds = tuple(range(c.first_seed, c.first_seed + c.samples))
    key = evaluation_key(run, table, None, bias_correction=False)
    cache = run.path("stats", f"full-precision-{key[:16]}.npz")
    began = time.perf_counter()
    if cache.exists() and not run.overwrite:
        samples = torch.from_numpy(artifacts.read_arrays(cache)["samples"])
    else:
        same_model(run, table)
        with run.timed("evaluate"), bar_of("full precision", len(seeds)) as bar:
            samples = sample(run.denoiser, seeds, run.config.sampler, progress=bar.update)
        artifacts.write_arrays(cache, {"samples": samples.numpy()})
    seconds = time.perf_counter() - began
    labels = labels_of(run.denoiser, seeds)
    base = Reference(
        samples=samples,
        features=extractor(to_uint8(samples)),
        seeds=seeds,
        labels=labels if isinstance(labels, torch.Tensor) else None,
        data=run.data_reference,
    )

    def measure() -> dict[str, Any]:
        found = evaluate(samples, base, extractor, is_reference=True)
        return {"seconds": seconds, "metrics": {k: v.to_data() for k, v in found.metrics.items()}}

    data, _ = artifacts.resumable(
        run.path("metrics", f"{key[:16]}.json"),
        "mpqsearch/metrics",
        {"evaluation": key},
        measure,
        overwrite=run.overwrite,
    )
    full = uniform_full_precision(table)
    record = StudyRecord(
        model=table.model,
        method="full-precision",
        granularity="model",
        budget="",
        quantity="",
        average_bits=average_bits(table, full),
        size_bytes=size_bytes(table, full),
        act_bits=16.0,
        bit_map_digest=full.digest,
        n_samples=c.samples,
        seeds=f"{seeds[0]}..{seeds[-1]}",
        seconds=data["seconds"],
        predicted_loss=0.0,
        metrics={k: MetricValue(**m) for k, m in data["metrics"].items()},
    )
    return base, record


def quantized_module(
    run: Run, table: LayerTable, measured: SensitivityProfile, bit_map: BitMap, *, bias_correction: bool
) -> Any:
    """The fake-quantized copy of the run's model; scales of activations are calibrated where the map asks for them."""
    import torch

    from mpqsearch.quant import quantize_model

    input_max = {k: torch.from_numpy(np.array(v)) for k, v in measured.input_max.items()}
    activations = activation_table(run, table, bit_map, input_max)
    return quantize_model(
        run.denoiser.module,
        table,
        bit_map,
        input_max=input_max,
        activations=activations,
        **correction_of(run, table, measured, bit_map, bias_correction=bias_correction),
    ).module


def correction_of(
    run: Run, table: LayerTable, measured: SensitivityProfile, bit_map: BitMap, *, bias_correction: bool
) -> dict[str, Any]:
    """``means`` and ``moments`` for `quantize_model` and `build_student`: what bias correction and GPTQ rounding
    need."""
    import torch

    means: Mapping[str, torch.Tensor] | None = None
    if bias_correction:
        means = {k: torch.from_numpy(np.array(v)) for k, v in measured.means.items()}
    stats = input_moments(run, table, bit_map)
    if stats is None:
        return {"means": means, "moments": None}
    # A second moment and a mean of other samples would give a covariance that is none.
    return {"means": means if means is None else ChainMap(stats.means(), means), "moments": stats.moments()}  # type: ignore[arg-type]


def activation_table(run: Run, table: LayerTable, bit_map: BitMap, input_max: Mapping[str, Any]) -> Any:
    """Scales of the activation widths of a map, from the run's own sampler; None when it has none.

    Histograms are collected once for all maps that smooth alike and have as many scales: only the search depends on the
    widths.
    """
    if not bit_map.activations:
        return None
    from mpqsearch.profile import collect_ranges
    from mpqsearch.quant import smooth_inputs

    c, sampler = run.config.activations, run.config.sampler
    if bit_map.activation_steps not in (1, sampler.steps):
        raise ConfigError(
            f"the bit map counts {bit_map.activation_steps} activation scales a layer, the sampler takes "
            f"{sampler.steps} steps. "
            "Allocate again with this sampler."
        )
    per_timestep = bit_map.activation_steps > 1
    factors = smooth_inputs(run.denoiser.module, table, bit_map, input_max)
    key = (per_timestep, bit_map.scaled_inputs, tuple(sorted(bit_map.activations)))
    if key not in run.ranges:
        with run.timed("calibrate activations"), bars_of() as progress:
            run.ranges[key] = collect_ranges(
                run.denoiser,
                table,
                sampler,
                seeds=range(c.first_seed, c.first_seed + c.samples),
                per_timestep=per_timestep,
                layers=bit_map.activations,
                factors=factors,
                progress=progress,
            )
    return run.ranges[key].table(bit_map.activations, run.config.activations)


def uniform_full_precision(table: LayerTable) -> BitMap:
    """The map that quantizes nothing."""
    return BitMap(model_digest=table.digest, weights={la.name: np.array(16, dtype=np.uint8) for la in table})
