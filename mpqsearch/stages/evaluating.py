"""Sample from the maps and measure them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import (
    FULL_PRECISION,
    BitMap,
    Budget,
    LayerTable,
    MetricValue,
    SensitivityProfile,
    StudyRecord,
    average_bits,
    size_bytes,
)
from mpqsearch.methods import MethodSpec
from mpqsearch.progress import bar_of
from mpqsearch.stages.allocating import allocations
from mpqsearch.stages.base import Run, same_model, slug
from mpqsearch.stages.references import evaluation_key, quantized_module, reference

if TYPE_CHECKING:
    from mpqsearch.metrics import FeatureExtractor, Reference


def evaluate_map(
    run: Run,
    table: LayerTable,
    measured: SensitivityProfile,
    base: Reference,
    extractor: FeatureExtractor,
    method: MethodSpec,
    budget: Budget,
    bit_map: BitMap,
    solved: Mapping[str, Any],
    bar: Any,
) -> StudyRecord:
    """Quantize, sample and measure one map, or reuse its metrics."""
    key = evaluation_key(run, table, bit_map, bias_correction=method.bias_correction)
    path = run.path("metrics", f"{key[:16]}.json")

    def measure() -> dict[str, Any]:
        from mpqsearch.metrics import evaluate
        from mpqsearch.sampling import sample, to_uint8

        same_model(run, table)
        began = time.perf_counter()
        module = quantized_module(run, table, measured, bit_map, bias_correction=method.bias_correction)
        samples = sample(run.denoiser.with_module(module), base.seeds, run.config.sampler, progress=bar.update)
        result = evaluate(samples, base, extractor)
        artifacts.write_arrays(
            run.path("stats", f"{key[:16]}.npz"),
            {"features": result.features.numpy(), "images": to_uint8(samples[:64]).numpy()},
        )
        return {"seconds": time.perf_counter() - began, "metrics": {k: v.to_data() for k, v in result.metrics.items()}}

    with run.timed("evaluate"):
        data, reused = artifacts.resumable(path, "mpqsearch/metrics", {"evaluation": key}, measure, overwrite=False)
    if reused:
        bar.update(len(base.seeds))
    return StudyRecord(
        model=table.model,
        method=method.name,
        granularity=method.granularity,
        budget=budget.label(),
        quantity=budget.quantity,
        average_bits=average_bits(table, bit_map),
        size_bytes=size_bytes(table, bit_map),
        act_bits=method.act_bits if not method.act_choices else mean_activation_bits(table, bit_map),
        bit_map_digest=bit_map.digest,
        n_samples=len(base.seeds),
        seeds=f"{base.seeds[0]}..{base.seeds[-1]}",
        seconds=data["seconds"],
        predicted_loss=solved["predicted_loss"],
        metrics={k: MetricValue(**m) for k, m in data["metrics"].items()},
    )


def mean_activation_bits(table: LayerTable, bit_map: BitMap) -> float:
    """Width of a layer's input, averaged over multiply-accumulates."""
    macs = sum(la.macs for la in table)
    return (
        sum(la.macs * bit_map.activations.get(la.name, FULL_PRECISION) for la in table) / macs
        if macs
        else float(FULL_PRECISION)
    )


def evaluate(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[StudyRecord]:
    """Measure every map of the configuration, and the full-precision model."""
    run.require_sampler("an evaluation of samples (evaluate)")
    maps = allocations(run, table, measured)
    if run.dry_run:
        keys = {evaluation_key(run, table, m, bias_correction=s.bias_correction): s for s, _, m, _ in maps}
        done = sum(run.path("metrics", f"{k[:16]}.json").exists() for k in keys)
        run.say(
            f"evaluate: {len(keys)} distinct maps of {run.config.evaluate.samples} samples; {done} reused, "
            f"{len(keys) - done} to do"
        )
        return []
    c, extractor = run.config.evaluate, run.extractor
    base, full = reference(run, table)
    records = [full]
    with bar_of("evaluate", len(maps) * c.samples) as bar:
        for method, budget, bit_map, solved in maps:
            bar.set_postfix_str(slug(method.name, budget))
            records.append(evaluate_map(run, table, measured, base, extractor, method, budget, bit_map, solved, bar))
    run.say(f"evaluate: {len(records) - 1} maps and full precision; metrics in {run.path('metrics')}")
    return records
