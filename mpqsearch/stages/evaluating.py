"""Sample from the maps and measure them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable, StudyRecord
from mpqsearch.progress import bar_of
from mpqsearch.stages.allocating import allocations
from mpqsearch.stages.base import Run, same_model, slug
from mpqsearch.stages.preflight import check_sampling
from mpqsearch.stages.references import (
    SHOWN,
    evaluation_key,
    key_frames,
    metrics_file,
    quantized_module,
    record_of,
    reference,
)
from mpqsearch.stages.reuse import METRICS, reuse_or_make

if TYPE_CHECKING:
    from mpqsearch.metrics import Reference


def _measured(
    run: Run,
    base: Reference,
    bit_map: BitMap,
    key: str,
    *,
    bias_correction: bool,
    progress: Callable[[int], Any],
) -> dict[str, Any]:
    """Quantize, sample and measure one map; its features and first images are kept beside the metrics."""
    from mpqsearch.metrics import evaluate
    from mpqsearch.sampling import samples

    same_model(run)
    began = time.perf_counter()
    module = quantized_module(run, bit_map, bias_correction=bias_correction)
    drawn = samples(run.denoiser.with_module(module), base.seeds, progress=progress)
    result = evaluate(drawn, base, keep=SHOWN)
    kept = {"features": result.features, "images": None if result.images is None else key_frames(result.images)}
    arrays = {name: tensor.numpy() for name, tensor in kept.items() if tensor is not None}
    artifacts.write_arrays(run.path("stats", f"{key[:16]}.npz"), arrays)
    return {"seconds": time.perf_counter() - began, "metrics": {k: v.to_data() for k, v in result.metrics.items()}}


def mean_activation_bits(table: LayerTable, bit_map: BitMap) -> float:
    """Width of a layer's input, averaged over multiply-accumulates."""
    macs = sum(la.macs for la in table)
    return (
        sum(la.macs * bit_map.activations.get(la.name, FULL_PRECISION) for la in table) / macs
        if macs
        else float(FULL_PRECISION)
    )


def evaluate(run: Run) -> list[StudyRecord]:
    """Measure every map of the configuration, and the full-precision model."""
    check_sampling(run, "an evaluation of samples (evaluate)")
    maps = allocations(run)
    keys = {evaluation_key(run, m, bias_correction=s.bias_correction) for s, _, m, _ in maps}
    done = sum(metrics_file(run, k).exists() for k in keys)
    if run.dry_run or done < len(keys):
        run.say(
            f"evaluate: {len(keys)} distinct maps of {run.config.evaluate.samples} samples; {done} reused, "
            f"{len(keys) - done} to do"
        )
    if run.dry_run:
        return []
    base, full = reference(run)
    records = [full]
    with bar_of("evaluate", len(maps) * len(base.seeds)) as bar:
        for method, budget, bit_map, solved in maps:
            bar.set_postfix_str(slug(method.name, budget))
            corrected = method.bias_correction
            key = evaluation_key(run, bit_map, bias_correction=corrected)
            measure = partial(_measured, run, base, bit_map, key, bias_correction=corrected, progress=bar.update)
            with run.timed("evaluate"):
                data = reuse_or_make(run, METRICS, metrics_file(run, key), {"evaluation": key}, measure)
            records.append(
                record_of(
                    run.table,
                    bit_map,
                    base.seeds,
                    data,
                    method=method.name,
                    granularity=method.granularity,
                    act_bits=mean_activation_bits(run.table, bit_map) if method.act_choices else method.act_bits,
                    predicted_loss=solved["predicted_loss"],
                    budget=budget.label(),
                    quantity=budget.quantity,
                )
            )
            bar.update((len(records) - 1) * len(base.seeds) - bar.n)  # what was reused
    run.say(f"evaluate: {len(records) - 1} maps and full precision; metrics in {run.path('metrics')}")
    return records
