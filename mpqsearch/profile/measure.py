"""One calibration pass over the sampler's own trajectory, then everything that is measured from it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser
from mpqsearch.profile.activations import activation_arrays
from mpqsearch.profile.contexts import context_probes, latin_contexts
from mpqsearch.profile.final_probes import final_probes
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.profile.moments import blocks_within, output_errors, plan_moments
from mpqsearch.profile.probes import ProbeInput, Prober, ProbeResult
from mpqsearch.profile.racing import relative_spread
from mpqsearch.profile.streaming import Partial
from mpqsearch.quant import RowQuantizer, RowStatistics, error_tables, kurtosis, quantize_model, rows_of, width_errors
from mpqsearch.quant.tables import (
    RecomputedErrors,
    column_factors,
    error_part,
    errors_again,
    held_bytes,
    joined_quantizers,
    row_blocks,
    width_quantizers,
)
from mpqsearch.sampling import labels_of, noise_of, sample, trajectory
from mpqsearch.specs import CalibrationSpec, SamplerSpec
from mpqsearch.specs.calibration import MOST

HELD = 4
"""Weight errors are held when they take less than one part in so many of a memory limit."""

Progress = Callable[[str, int, int], None]
"""Called with a label, the number of finished units and their total."""


def _silent(_label: str, _done: int, _total: int) -> None:
    """Progress of callers that want none."""


def variants_of(spec: CalibrationSpec, base: QuantFormat) -> dict[str, QuantFormat]:
    """Quantizer variants by name."""
    made = {
        c: QuantFormat(scheme=c, criterion=base.criterion, p=base.p, n_candidates=base.n_candidates)
        for c in spec.schemes
    }
    if spec.smooth:
        made |= {f"{c}+smooth": replace(f, smooth=True) for c, f in made.items()}
        made["asymmetric+smooth"] = replace(base, scheme="asymmetric", smooth=True)
        made["asymmetric+smooth+minmax"] = replace(base, scheme="asymmetric", smooth=True, criterion="minmax")
    return made


def profile_model(
    denoiser: Denoiser,
    table: LayerTable,
    policy: Policy,
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    fmt: QuantFormat,
    *,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> SensitivityProfile:
    """Measure a model: see `SensitivityProfile` for what comes out, in which units.

    ``memory_limit`` bounds, in bytes, what second moments of inputs and weight errors take, and the gradient of the
    largest layer with them. With it the calibration may run several times (`mpqsearch.profile.moments`), errors may be
    made again at every probe, some rows at a time, and the numbers are the same up to rounding (1e-4 of the largest).
    The gradient of a layer comes in one piece, and slopes at contexts need a second copy of the model. Raises
    `ConfigError`, with the smallest limit that works, when a layer does not fit. `profile_base` and `final_errors` are
    its two halves, for callers that keep what is finished.
    """
    base = profile_base(denoiser, table, policy, sampler, spec, fmt, memory_limit=memory_limit, progress=progress)
    return with_final_errors(base, final_errors(denoiser, table, base, sampler, spec, fmt, progress=progress))


def profile_base(
    denoiser: Denoiser,
    table: LayerTable,
    policy: Policy,
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    fmt: QuantFormat,
    *,
    memory_limit: int | None = None,
    partial: Partial | None = None,
    progress: Progress | None = None,
) -> SensitivityProfile:
    """Everything but the slow reference of one layer at a time; with ``spec.prediction_only`` what `profile_slopes`
    measures.

    ``partial`` keeps the tables of each finished layer and each finished kind of probes. A run that continues from it
    samples the calibration inputs again and measures what is left.
    """
    if spec.prediction_only:
        return profile_slopes(
            denoiser, table, policy, sampler, spec, fmt, memory_limit=memory_limit, partial=partial, progress=progress
        )
    report = progress or _silent
    widths = tuple(sorted(policy.widths))
    variants = variants_of(spec, fmt)
    # Errors that are held take their part of the limit, when that is small; else they are made again at every probe.
    held = held_bytes(table, len(widths) * sum(not f.smooth for f in variants.values()))
    hold = memory_limit is None or held <= memory_limit // HELD
    room = None if memory_limit is None else memory_limit - held * hold
    # Planned first: a limit that is too small should say so before anything has run.
    blocks = blocks_within(denoiser.module, table, len(widths) * len(variants), memory_limit)
    passes = plan_moments(table, len(widths) * len(variants), room) if room is not None else []
    seconds: dict[str, float] = {}
    with _timed(seconds, "calibration"):
        stats, power, inputs = calibrate(denoiser, table, sampler, spec, report, moments=memory_limit is None)
    with _timed(seconds, "error tables"):
        arrays, errors = tables_of(
            denoiser, table, widths, variants, stats, report, blocks=blocks, hold=hold, partial=partial
        )
    if room is not None:
        modules: dict[str, Any] = dict(denoiser.module.named_modules())

        def errors_of(layer: LayerSpec, seen: RowStatistics) -> Iterator[tuple[slice, dict[str, Tensor]]]:
            for part in blocks[layer.name]:
                yield (
                    part,
                    {
                        v: error_part(errors[v], layer.name, part)
                        if v in errors
                        else width_errors(modules[layer.name].weight, layer, widths, f, seen, part)
                        for v, f in variants.items()
                    },
                )

        def run() -> None:
            for _ in _calibration(denoiser, sampler, spec):
                pass

        def passed(done: int, total: int) -> None:
            report("output errors", done, total)

        def in_passes() -> dict[str, NDArray[Any]]:
            found = output_errors(denoiser.module, table, stats, errors_of, passes, run, limit=room, report=passed)
            return {
                key: _concat(table, {n: tables[key] for n, tables in found.items()})
                for key in found[table.layers[0].name]
            }

        with _timed(seconds, "output errors in passes"):
            arrays |= _kept(partial, "output errors", in_passes)
    arrays["output_power"] = _concat(table, power)
    means = {n: s.mean.float() for n, s in stats.items()}

    def probed() -> dict[str, NDArray[Any]]:
        result, n_inputs = _probe(denoiser, table, errors, sampler, spec, means, inputs, report)
        return {
            "sensitivity": _concat(table, result.gain),
            "sensitivity_std_error": _concat(table, result.sensitivity_std_error),
            "step_sensitivity": _concat(table, result.step_sensitivity),
            "step_sensitivity_std_error": _concat(table, result.step_sensitivity_std),
            **{f"layer_probe_error/{v}": _stack(table, result.layer_error[v]) for v in errors},
            **{f"layer_probe_std_error/{v}": _stack(table, result.layer_error_std[v]) for v in errors},
            "probe_inputs": np.asarray(n_inputs),
        }

    def followed() -> dict[str, NDArray[Any]]:
        found, n_seeds = _probe_sampler(denoiser, table, errors, sampler, spec, means, report)
        return {**found, "sampler_seeds": np.asarray(n_seeds)}

    with _timed(seconds, "probes of the prediction"):
        arrays |= _kept(partial, "probes", probed)
    spent: dict[str, Any] = {"probe_inputs": int(arrays.pop("probe_inputs"))}
    if spec.sampler_seeds and not len(denoiser.calls):  # recorded calls bring no sampler of ours to differentiate
        with _timed(seconds, "probes of the final sample"):
            arrays |= _kept(partial, "final probes", followed)
        spent["sampler_seeds"] = int(arrays.pop("sampler_seeds"))
        with _timed(seconds, "slopes at contexts"):
            arrays |= _kept(
                partial,
                "slopes",
                lambda: _probe_contexts(denoiser, table, policy, errors, sampler, spec, means, report),
            )
    if spec.activation_bits:
        gains = torch.split(torch.from_numpy(arrays["sensitivity"]).double(), [la.n_channels for la in table])
        seeds = range(spec.first_seed, spec.first_seed + spec.samples)
        arrays |= activation_arrays(
            denoiser,
            table,
            sampler,
            seeds,
            widths,
            spec.activation_bits,
            variants.get("asymmetric+smooth"),
            stats,
            dict(zip((la.name for la in table), gains, strict=True)),
            report,
        )
    return _made(denoiser, table, widths, arrays, stats, sampler, spec, fmt, spent | {"seconds": seconds})


def profile_slopes(
    denoiser: Denoiser,
    table: LayerTable,
    policy: Policy,
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    fmt: QuantFormat,
    *,
    memory_limit: int | None = None,
    partial: Partial | None = None,
    progress: Progress | None = None,
) -> SensitivityProfile:
    """Only what predicts the loss of given maps: slopes at balanced maps (`mpqsearch.profile.contexts`), beside
    kurtosis and weight errors.

    One run of the sampler over ``spec.samples`` for the means of inputs, a range search, and ``5 T`` forward passes for
    each of ``spec.context_seeds``. No second moment is kept and no prediction is probed. Raises `ConfigError` when the
    denoiser has recorded calls instead of a sampler, when fewer than two of ``spec.context_widths`` are searched, or
    when there are fewer seeds than those.
    """
    report = progress or _silent
    widths = tuple(sorted(policy.widths))
    mixed = [b for b in spec.context_widths if b in widths]
    if len(denoiser.calls):
        raise ConfigError(
            f"{denoiser.name}: calibration.prediction_only follows the sampler to its final samples, and this model "
            "is measured with "
            f"{len(denoiser.calls)} recorded calls. Leave it out: the losses 'gain' and 'probe' need no sampler."
        )
    if len(mixed) < 2 or spec.context_seeds < len(mixed):
        raise ConfigError(
            f"calibration.prediction_only mixes those of calibration.context_widths = {list(spec.context_widths)} "
            "that are searched, of "
            f"{list(widths)} (policy.widths): {len(mixed)}, where at least 2 are needed, with a seed each of "
            "context_seeds = "
            f"{spec.context_seeds}. Change context_widths, policy.widths or context_seeds."
        )
    variants = {c: f for c, f in variants_of(spec, fmt).items() if not f.smooth}
    hold = memory_limit is None or held_bytes(table, len(widths) * len(variants)) <= memory_limit // HELD
    blocks = blocks_within(denoiser.module, table, len(widths) * len(variants), memory_limit)
    seconds: dict[str, float] = {}
    with _timed(seconds, "calibration"):
        stats, _, _ = calibrate(denoiser, table, sampler, spec, report, moments=False)
    with _timed(seconds, "error tables"):
        arrays, errors = tables_of(
            denoiser, table, widths, variants, stats, report, blocks=blocks, hold=hold, partial=partial
        )
    means = {n: s.mean.float() for n, s in stats.items()}
    with _timed(seconds, "slopes at contexts"):
        arrays |= _kept(
            partial, "slopes", lambda: _probe_contexts(denoiser, table, policy, errors, sampler, spec, means, report)
        )
    return _made(denoiser, table, widths, arrays, stats, sampler, spec, fmt, {"seconds": seconds})


def _made(
    denoiser: Denoiser,
    table: LayerTable,
    widths: tuple[int, ...],
    arrays: dict[str, NDArray[Any]],
    stats: Mapping[str, RowStatistics],
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    fmt: QuantFormat,
    spent: Mapping[str, Any],
) -> SensitivityProfile:
    """The profile with what was measured and how."""
    return SensitivityProfile(
        model_digest=table.digest,
        names=tuple(la.name for la in table),
        channels=tuple(la.n_channels for la in table),
        widths=widths,
        arrays=arrays,
        means={n: s.mean.float().numpy() for n, s in stats.items()},
        input_max={n: s.input_max.float().numpy() for n, s in stats.items()},
        calibration={
            "spec": spec.to_data(),
            "sampler": sampler.to_data(),
            "format": fmt.to_data(),
            "spent": {**spent, **_memory()},
            **({"recorded_calls": len(denoiser.calls)} if len(denoiser.calls) else {}),
        },
    )


@contextmanager
def _timed(seconds: dict[str, float], label: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[label] = round(time.perf_counter() - began, 3)


def _memory() -> dict[str, int]:
    """Peak resident memory of this process, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": peak if sys.platform == "darwin" else peak * 1024}


def calibrate(
    denoiser: Denoiser,
    table: LayerTable,
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    report: Progress = _silent,
    *,
    moments: bool = True,
) -> tuple[Mapping[str, RowStatistics], Mapping[str, Tensor], list[ProbeInput]]:
    """Run the sampler once, or the denoiser's recorded calls; keep input statistics of every layer and the inputs to
    probe.

    Without ``moments`` the second moments are left empty.
    """
    if len(denoiser.calls) and spec.final_widths:
        raise ConfigError(
            f"calibration.final_widths = {list(spec.final_widths)} compares final samples, but {denoiser.name} is "
            "measured with "
            f"{len(denoiser.calls)} recorded calls, which bring no sampler. Leave final_widths empty: the losses "
            "'gain' and 'probe' are measured "
            "on the calls."
        )
    kept: list[ProbeInput] = []
    total = len(denoiser.calls) or -(-spec.samples // sampler.batch) * sampler.steps
    with InputCollector(denoiser.module, table, moments=moments) as collector:
        for done, inputs in enumerate(_calibration(denoiser, sampler, spec), start=1):
            kept += inputs
            report("calibrate", done, total)
    return *_collected(table, collector, moments=moments), [kept[i] for i in _spread(len(kept), spec.probe_inputs)]


@torch.no_grad()
def _calibration(denoiser: Denoiser, sampler: SamplerSpec, spec: CalibrationSpec) -> Iterator[list[ProbeInput]]:
    """Call the denoiser on all calibration inputs, the same each time, and give out the inputs of every call, one by
    one."""
    device = next(denoiser.module.parameters()).device
    for call in denoiser.calls:
        call.replay(denoiser.module)
        yield [
            ProbeInput(
                x=call.sample.to(device), timestep=int(call.timestep) if np.isfinite(call.timestep) else 0, cond=call
            )
        ]
    if len(denoiser.calls):
        return
    seeds = range(spec.first_seed, spec.first_seed + spec.samples)
    for start in range(0, spec.samples, sampler.batch):
        part = list(seeds[start : start + sampler.batch])
        cond = labels_of(denoiser, part)
        cond = cond.to(device) if isinstance(cond, Tensor) else cond
        for step in trajectory(denoiser, noise_of(part, denoiser.sample_shape).to(device), cond, sampler):
            yield [
                ProbeInput(
                    x=step.x[i : i + 1].clone(),
                    timestep=step.timestep,
                    cond=cond[i : i + 1] if isinstance(cond, Tensor) else cond,
                )
                for i in range(len(part))
            ]


def _spread(total: int, n: int) -> list[int]:
    """``n`` of ``total`` positions (all, if there are fewer), spread evenly."""
    return sorted({int(i) for i in np.linspace(0, total - 1, min(n, total)).round()})


def _collected(
    table: LayerTable, collector: InputCollector, *, moments: bool
) -> tuple[dict[str, RowStatistics], dict[str, Tensor]]:
    """Statistics and output powers of all layers; those that never ran have zeros."""
    stats = dict(collector.statistics())
    power = dict(collector.output_power())
    for name in [
        la.name for la in table if la.name not in stats
    ]:  # never ran: no input, so no error reaches the output
        layer = table[name]
        d = layer.weights_per_channel
        stats[name] = RowStatistics(
            second_moment=torch.zeros(layer.groups, d, d) if moments else torch.empty(0),
            mean=torch.zeros(layer.groups, d),
            input_max=torch.zeros(layer.n_inputs),
            n_positions=0,
        )
        power[name] = torch.zeros(layer.n_channels)
    return stats, power


@torch.no_grad()
def tables_of(
    denoiser: Denoiser,
    table: LayerTable,
    widths: tuple[int, ...],
    variants: Mapping[str, QuantFormat],
    stats: Mapping[str, RowStatistics],
    report: Progress = _silent,
    *,
    blocks: Mapping[str, Sequence[slice]] | None = None,
    hold: bool = True,
    partial: Partial | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[str, Mapping[str, Tensor]]]:
    """Per-channel tables, and the weight errors ``[W, C, D]`` behind them (variant -> layer) for the variants that are
    probed.

    ``blocks``: the slices of rows of each layer in which its errors are made (default: all at once). Without ``hold``
    the errors are not kept: they are made again from their scales whenever they are looked at, the same bit for bit.
    ``partial`` keeps tables and scales of a layer.
    """
    slices = blocks or {la.name: row_blocks(la, 1, None) for la in table}
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    columns: list[dict[str, NDArray[Any]]] = []
    plain = [v for v, f in variants.items() if not f.smooth]
    held: dict[str, dict[str, Tensor]] = {v: {} for v in plain}
    scales: dict[str, dict[str, tuple[RowQuantizer, ...]]] = {v: {} for v in plain}
    for position, layer in enumerate(table):
        weight: Any = modules[layer.name].weight
        kept = partial.load(position) if partial is not None else None
        if kept is None:
            mine, found, errors = _layer_tables(
                weight, layer, widths, variants, stats[layer.name], slices[layer.name], hold=hold
            )
            if partial is not None:
                partial.save(position, mine | _packed(found))
        else:
            found = {v: _unpacked(kept, v, len(widths), weight.device) for v in plain}
            mine = {key: values for key, values in kept.items() if not key.startswith(_SCALES)}
            errors = {v: [errors_again(weight, layer, q, variants[v])] for v, q in found.items()} if hold else {}
        columns.append(mine)
        for variant, quantizers in found.items():
            scales[variant][layer.name] = quantizers
        for variant, parts in errors.items():
            held[variant][layer.name] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        report("error tables", position + 1, len(table))
    arrays = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    if hold:
        return arrays, dict(held)

    def again(variant: str) -> Mapping[str, Tensor]:
        return RecomputedErrors(
            list(table.by_name),
            lambda name, part: errors_again(
                modules[name].weight, table[name], scales[variant][name], variants[variant], part=part
            ),
            slices.__getitem__,
        )

    return arrays, {variant: again(variant) for variant in scales}


_SCALES = "quantizer/"
"""How the names of a layer's scales begin in the file of a `Partial`."""


def _layer_tables(
    weight: Tensor,
    layer: LayerSpec,
    widths: tuple[int, ...],
    variants: Mapping[str, QuantFormat],
    stats: RowStatistics,
    slices: Sequence[slice],
    *,
    hold: bool,
) -> tuple[dict[str, NDArray[Any]], dict[str, tuple[RowQuantizer, ...]], dict[str, list[Tensor]]]:
    """The tables of one layer, float32; the quantizers of each variant without smoothing, one a width; and to hold,
    their errors by slices."""
    rows = rows_of(weight.detach(), layer)
    known = stats if stats.second_moment.numel() else None
    columns: dict[str, list[Tensor]] = {"kurtosis": [kurtosis(rows)]}
    found: dict[str, list[tuple[RowQuantizer, ...]]] = {v: [] for v, f in variants.items() if not f.smooth}
    errors: dict[str, list[Tensor]] = {v: [] for v in found if hold}
    for part in slices:
        factor = column_factors(rows, layer, QuantFormat(smooth=True), stats, part)
        assert factor is not None
        columns.setdefault("kurtosis_smoothed", []).append(kurtosis(rows[part].float() * factor))
        for variant, fmt in variants.items():
            if fmt.smooth:
                error = width_errors(weight, layer, widths, fmt, stats, part)
            else:
                quantizers, error = width_quantizers(weight, layer, widths, fmt, part=part)
                found[variant].append(quantizers)
                if hold:
                    errors[variant].append(error)
            for name, values in error_tables(error, known).items():
                columns.setdefault(f"{name}/{variant}", []).append(values)
    arrays = {name: torch.cat(parts).float().cpu().numpy() for name, parts in columns.items()}
    return arrays, {variant: joined_quantizers(parts) for variant, parts in found.items()}, errors


def _packed(found: Mapping[str, tuple[RowQuantizer, ...]]) -> dict[str, NDArray[Any]]:
    """Quantizers as arrays ``[W, C]``."""
    return {
        f"{_SCALES}{variant}/{field}": torch.stack([getattr(q, field) for q in quantizers]).cpu().numpy()
        for variant, quantizers in found.items()
        for field in ("scale", "zero", "bits")
    }


def _unpacked(
    kept: Mapping[str, NDArray[Any]], variant: str, n_widths: int, device: torch.device
) -> tuple[RowQuantizer, ...]:
    scale, zero, bits = (
        torch.from_numpy(kept[f"{_SCALES}{variant}/{field}"]).to(device) for field in ("scale", "zero", "bits")
    )
    return tuple(RowQuantizer(scale=scale[w], zero=zero[w], bits=bits[w]) for w in range(n_widths))


def _kept(
    partial: Partial | None, step: str, measure: Callable[[], dict[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """What a step measures, from ``partial`` when an earlier run has finished it."""
    found = partial.load(step) if partial is not None else None
    if found is None:
        found = measure()
        if partial is not None:
            partial.save(step, found)
    return found


def _probe(
    denoiser: Denoiser,
    table: LayerTable,
    errors: Mapping[str, Mapping[str, Tensor]],
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    means: Mapping[str, Tensor],
    inputs: Sequence[ProbeInput],
    report: Progress,
) -> tuple[ProbeResult, int]:
    """Probe the inputs once, and again with new projections until the target is reached. Returns the number of inputs,
    too."""
    prober = Prober(
        denoiser,
        table,
        sampler.guidance,
        errors,
        means,
        probes=spec.probes,
        seed=spec.seed,
        buckets=spec.buckets,
        checkpoint=spec.checkpoint,
    )
    done, total = 0, len(inputs)

    def tick(n: int) -> None:
        nonlocal done
        done += n
        report("probe gains", done, max(total, done))

    while True:
        prober.run(inputs, tick)
        result = prober.result()
        wrong = max(
            relative_spread(_stack(table, result.layer_error[v]), _stack(table, result.layer_error_std[v]))
            for v in errors
        )
        if not spec.target_error or wrong <= spec.target_error or done >= MOST * len(inputs):
            return result, done
        total = min(MOST, max(-(-done // len(inputs)) + 1, round((wrong / spec.target_error) ** 2))) * len(inputs)


def _probe_sampler(
    denoiser: Denoiser,
    table: LayerTable,
    errors: Mapping[str, Mapping[str, Tensor]],
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    means: Mapping[str, Tensor],
    report: Progress,
) -> tuple[dict[str, NDArray[Any]], int]:
    """Layer totals from probes through the sampler, ``spec.sampler_seeds`` trajectories at a time. Returns their
    number, too."""
    squares: dict[str, list[NDArray[np.float64]]] = {v: [] for v in errors}
    done, total = 0, spec.sampler_seeds

    def tick(n: int) -> None:
        nonlocal done
        done += n
        report("probe the sampler", done, max(total, done))

    while True:
        found = final_probes(
            denoiser,
            table,
            sampler,
            range(spec.first_seed + done, spec.first_seed + done + spec.sampler_seeds),
            errors,
            means,
            probes=spec.sampler_probes,
            seed=spec.seed + done,
            checkpoint=spec.checkpoint,
            tick=tick,
        )
        arrays: dict[str, NDArray[Any]] = {}
        wrong = 0.0
        for variant, effect in found.effect.items():
            whole = np.square(effect.sum(1, dtype=np.float64))  # [K, L, W]
            squares[variant].append(whole.reshape(spec.sampler_seeds, spec.sampler_probes, *whole.shape[1:]).mean(1))
            each = np.concatenate(squares[variant])
            mean = each.mean(0)
            spread = each.std(0, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else mean
            arrays[f"layer_sampler_error/{variant}"] = mean.astype(np.float32)
            arrays[f"layer_sampler_std_error/{variant}"] = spread.astype(np.float32)
            wrong = max(wrong, relative_spread(mean, spread))
        if not spec.target_error or wrong <= spec.target_error or done >= MOST * spec.sampler_seeds:
            return arrays, done
        total = (
            min(MOST, max(done // spec.sampler_seeds + 1, round((wrong / spec.target_error) ** 2))) * spec.sampler_seeds
        )


def _probe_contexts(
    denoiser: Denoiser,
    table: LayerTable,
    policy: Policy,
    errors: Mapping[str, Mapping[str, Tensor]],
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    means: Mapping[str, Tensor],
    report: Progress,
) -> dict[str, NDArray[Any]]:
    """Slopes of layers among the errors of the others; nothing when no seed or fewer than two of the widths are asked
    for."""
    widths = tuple(sorted(policy.widths))
    mixed = [b for b in spec.context_widths if b in widths]
    if spec.context_seeds < max(len(mixed), 1) or len(mixed) < 2:
        return {}
    contexts = latin_contexts(table, policy, mixed, seed=spec.seed)
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        report("slopes at contexts", done, spec.context_seeds)

    found = context_probes(
        denoiser,
        table,
        sampler,
        contexts,
        widths,
        final_variant(spec),
        range(spec.first_seed, spec.first_seed + spec.context_seeds),
        errors,
        means,
        checkpoint=spec.checkpoint,
        tick=tick,
    )
    return {f"layer_context_slope/{v}": each.astype(np.float32) for v, each in found.slope.items()} | {
        f"layer_context_std_error/{v}": each.astype(np.float32) for v, each in found.std_error.items()
    }


def price_errors(
    denoiser: Denoiser,
    table: LayerTable,
    errors: Mapping[str, Tensor],
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    *,
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float64]]:
    """First-order effect ``[W]`` on the model's output of ``W`` given weight errors ``[W, C, D]`` of every layer, one
    layer at a time.

    For quantizers that are not ours: the errors are those that another tool makes. No bias is corrected.
    """
    report = progress or _silent
    stats, _, inputs = calibrate(denoiser, table, sampler, spec, report)
    still = {n: torch.zeros_like(s.mean).float() for n, s in stats.items()}
    result, _ = _probe(denoiser, table, {"given": errors}, sampler, spec, still, inputs, report)
    return {n: v.double().cpu().numpy() for n, v in result.layer_error["given"].items()}


FinalErrors = dict[tuple[str, int], tuple[float, ...]]
"""Squared error (mean over pixels) of each final sample by (layer, width): seeds from ``first_seed`` on."""


def final_errors(
    denoiser: Denoiser,
    table: LayerTable,
    profile: SensitivityProfile,
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    fmt: QuantFormat,
    *,
    known: FinalErrors | None = None,
    keep: Callable[[FinalErrors], Any] | None = None,
    progress: Progress | None = None,
    wanted: Mapping[str, int] | None = None,
) -> FinalErrors:
    """Error of the final samples with one layer quantized at a time, at ``spec.final_widths``: the slow reference.

    One run of the sampler for each layer and width, with the scheme that `final_variant` names and bias correction on,
    as in the errors of `probe`. ``known`` holds what an earlier run finished; ``keep`` is called with all results after
    each layer. ``wanted`` chooses layers and how many seeds each should have (default: all layers,
    ``spec.final_seeds``).
    """
    for bits in spec.final_widths:
        if bits not in profile.widths:
            raise ConfigError(
                f"calibration.final_widths asks for {bits} bits, which the policy does not search ({profile.widths})"
            )
    found = {key: tuple(value) for key, value in (known or {}).items()}
    seeds_of = {la.name: spec.final_seeds for la in table} if wanted is None else dict(wanted)
    todo = [
        la
        for la in table
        if any(len(found.get((la.name, b), ())) < seeds_of.get(la.name, 0) for b in spec.final_widths)
    ]
    if not todo:
        return found
    seeds = range(spec.first_seed, spec.first_seed + max(seeds_of.values()))
    reference = sample(denoiser, seeds, sampler)
    means = {n: torch.from_numpy(np.array(m)) for n, m in profile.means.items()}
    chosen = variants_of(spec, fmt)[final_variant(spec)]
    for done, layer in enumerate(todo, start=1):
        for bits in spec.final_widths:
            have = found.get((layer.name, bits), ())
            part = slice(len(have), seeds_of[layer.name])
            if part.start >= part.stop:
                continue
            weights = {
                la.name: np.array(bits if la.name == layer.name else FULL_PRECISION, dtype=np.uint8) for la in table
            }
            one = quantize_model(
                denoiser.module, table, BitMap(model_digest=table.digest, weights=weights, format=chosen), means=means
            )
            samples = sample(denoiser.with_module(one.module), seeds[part], sampler)
            each = (samples - reference[part]).square().flatten(1).mean(1)
            found[layer.name, bits] = (*have, *(float(e) for e in each))
        if keep is not None:
            keep(found)
        if progress is not None:
            progress("one layer at a time", done, len(todo))
    return found


def race_final_errors(
    denoiser: Denoiser,
    table: LayerTable,
    profile: SensitivityProfile,
    sampler: SamplerSpec,
    spec: CalibrationSpec,
    fmt: QuantFormat,
    undecided: Callable[[SensitivityProfile], tuple[Sequence[str], bool]],
    *,
    known: FinalErrors | None = None,
    keep: Callable[[FinalErrors], Any] | None = None,
    progress: Progress | None = None,
) -> FinalErrors:
    """`final_errors` in rounds: two seeds for every layer, then twice as many for the layers that are still undecided.

    ``undecided`` says of the profile so far which layers those are and whether the answer is settled (see `stability`).
    Ends when it is, when no layer is undecided, or when the undecided ones have ``spec.final_seeds`` seeds.
    """
    wanted = {la.name: min(2, spec.final_seeds) for la in table}
    found = dict(known or {})
    while True:
        found = final_errors(
            denoiser, table, profile, sampler, spec, fmt, known=found, keep=keep, progress=progress, wanted=wanted
        )
        names, settled = undecided(with_final_errors(profile, found))
        open_ = [n for n in names if wanted[n] < spec.final_seeds]
        if settled or not open_:
            return found
        wanted |= {n: min(2 * wanted[n], spec.final_seeds) for n in open_}


def final_variant(spec: CalibrationSpec) -> str:
    """The scheme of the one-layer-at-a-time reference: the last that is priced."""
    return spec.schemes[-1]


def with_final_errors(profile: SensitivityProfile, found: FinalErrors) -> SensitivityProfile:
    """The profile with ``layer_final_error`` added; unchanged when nothing was measured."""
    if not found:
        return profile
    out = np.full((len(profile.names), len(profile.widths)), np.nan, dtype=np.float32)
    spread = out.copy()
    for (name, bits), each in found.items():
        at = profile.index[name], profile.widths.index(bits)
        out[at] = np.mean(each)
        spread[at] = np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else out[at]
    variant = profile.calibration["spec"]["schemes"][-1]
    measured = {f"layer_final_error/{variant}": out, f"layer_final_std_error/{variant}": spread}
    return replace(profile, arrays={**profile.arrays, **measured})


def _concat(table: LayerTable, values: Mapping[str, Tensor]) -> NDArray[np.float32]:
    joined: NDArray[np.float32] = torch.cat([values[la.name].cpu() for la in table]).float().numpy()
    return joined


def _stack(table: LayerTable, values: Mapping[str, Tensor]) -> NDArray[np.float32]:
    stacked: NDArray[np.float32] = torch.stack([values[la.name].cpu() for la in table]).float().numpy()
    return stacked
