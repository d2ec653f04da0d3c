"""Sample from the maps and measure them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mpqsearch.core import FULL_PRECISION, BitMap, Budget, LayerTable, StudyRecord
from mpqsearch.methods import MethodSpec
from mpqsearch.progress import bar_of
from mpqsearch.stages.allocating import allocations
from mpqsearch.stages.base import Run, slug
from mpqsearch.stages.references import (
    evaluation_key,
    full_record,
    measure,
    metrics_file,
    quantized_module,
    record_of,
)
from mpqsearch.stages.reuse import METRICS, reuse_or_make


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
    maps = allocations(run)
    keys = {evaluation_key(run, m, bias_correction=s.bias_correction) for s, _, m, _ in maps}
    done = sum(metrics_file(run, k).exists() for k in keys)
    if (run.dry_run or done < len(keys)) and not run.reads_only:
        run.say(
            f"evaluate: {len(keys)} distinct maps of {run.config.evaluate.samples} samples; {done} reused, "
            f"{len(keys) - done} to do"
        )
    if run.dry_run and not run.reads_only:
        return []
    records, samples = [full_record(run)], run.config.evaluate.samples
    with bar_of("evaluate", len(maps) * samples) as bar:
        for method, budget, bit_map, solved in maps:
            bar.set_postfix_str(slug(method.name, budget))
            records.append(measured_record(run, method, budget, bit_map, solved, bar.update))
            bar.update((len(records) - 1) * samples - bar.n)  # what was reused
    run.say(f"evaluate: {len(records) - 1} maps and full precision; metrics in {run.path('metrics')}")
    return records


def measured_record(
    run: Run,
    method: MethodSpec,
    budget: Budget,
    bit_map: BitMap,
    solved: Mapping[str, Any],
    progress: Callable[[int], Any],
) -> StudyRecord:
    """The record of one map, measured unless the run folder has its metrics; ``solved`` is what its
    ``allocation.json`` holds."""
    corrected = solved.get("bias_correction", method.bias_correction)
    key = evaluation_key(run, bit_map, bias_correction=corrected)
    make = partial(quantized_module, run, bit_map, bias_correction=corrected)
    with run.timed("evaluate"):
        data = reuse_or_make(
            run, METRICS, metrics_file(run, key), {"evaluation": key}, partial(measure, run, key, make, progress)
        )
    return record_of(
        run,
        bit_map,
        data,
        method=method.name,
        granularity=method.granularity,
        act_bits=mean_activation_bits(run.table, bit_map) if method.act_choices else method.act_bits,
        predicted_loss=solved["predicted_loss"],
        budget=budget.label(),
        quantity=budget.quantity,
    )
