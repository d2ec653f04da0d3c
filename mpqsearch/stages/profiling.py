"""Measure the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.errors import LayerMismatchError
from mpqsearch.progress import bars_of
from mpqsearch.stages.base import Run, same_model


def profile_inputs(run: Run, table: LayerTable, loss: str = "") -> dict[str, str]:
    """Digests of all that a profile depends on; with the loss ``operating`` also of the bit map at which that was
    measured."""
    c = run.config.to_data()
    if loss == "operating" and run.config.calibration.at:
        return profile_inputs(run, table) | {"at": _map_at(run, table).digest}
    if run.config.calibration.weights_only:  # nothing runs, so nothing else counts
        return {
            "model": table.digest,
            "calibration": artifacts.digest_of(["weights only", c["calibration"]["schemes"]]),
            "quantizer": artifacts.digest_of(c["quantizer"]),
            "widths": artifacts.digest_of(sorted(run.config.policy.widths)),
        }
    return {
        "model": table.digest,
        "calibration": artifacts.digest_of(_counted(c["calibration"])),
        "sampler": artifacts.digest_of(c["sampler"]),
        "quantizer": artifacts.digest_of(c["quantizer"]),
        "widths": artifacts.digest_of(sorted(run.config.policy.widths)),
        **run.source_inputs,
    }


def _counted(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that count for what is measured; those that came later count only where they are used, so that older
    profiles stay good."""
    return {k: v for k, v in calibration.items() if k not in ("captured", "at") and (v or k != "prediction_only")}


def profile(run: Run, table: LayerTable) -> SensitivityProfile | None:
    """Measure the model, or reuse ``profile.json``; None in a dry run that would have to measure.

    With ``calibration.at`` the profile with the gains at that bit map, from ``profile-at-<digest>.json``.
    """
    at = (
        _map_at(run, table) if run.config.calibration.at else None
    )  # a map that does not fit is found before anything long begins
    measured = _plain_profile(run, table)
    return measured if measured is None or at is None else _profile_at(run, table, measured, at)


def _map_at(run: Run, table: LayerTable) -> BitMap:
    """The bit map of ``calibration.at``. Raises `LayerMismatchError` when it belongs to another model."""
    file = Path(run.config.calibration.at)
    bit_map = artifacts.load_bit_map(file)
    if bit_map.model_digest != table.digest:
        raise LayerMismatchError(
            f"gains were asked for at the bit map {file}, which was made for the model {bit_map.model_digest[:12]}; "
            "the model of this run, "
            f"{table.model}, is {table.digest[:12]}. Name a bit map of this model (mpqsearch allocate makes one, "
            "mpqsearch import reads one), or "
            "the --model and --run-dir that it was made for."
        )
    bit_map.validate(table)
    return bit_map


def _profile_at(run: Run, table: LayerTable, measured: SensitivityProfile, at: BitMap) -> SensitivityProfile | None:
    """The profile with gains measured again at a bit map, or what an earlier run wrote."""
    path = run.path(f"profile-at-{at.digest[:12]}.json")
    c = run.config.calibration
    variant = f"{at.format.scheme}+smooth" if at.format.smooth else at.format.scheme
    corrected = any(m.bias_correction for m in run.config.methods if m.variant == variant)
    inputs = profile_inputs(run, table, "operating") | {"bias_correction": str(corrected)}
    if artifacts.is_current(path, "mpqsearch/profile", inputs, overwrite=run.overwrite):
        run.say(f"profile: reused {path}")
        return artifacts.load_profile(path)
    if run.dry_run:
        run.say(f"profile: would measure gains at the bit map {at.digest[:12]} with {c.samples} trajectories")
        return None
    from mpqsearch.profile import remeasure

    same_model(run, table)
    with run.timed("profile"), bars_of() as progress:
        found = remeasure(
            run.denoiser,
            table,
            measured,
            replace(at, activations={}, activation_steps=1),
            run.config.sampler,
            range(c.first_seed, c.first_seed + c.samples),
            bias_correction=corrected,
            checkpoint=c.checkpoint,
            memory_limit=run.config.model.limit_bytes,
            progress=progress,
        )
    artifacts.save_profile(path, found, inputs)
    run.say(
        f"profile: gains at the bit map {at.digest[:12]} ({'with' if corrected else 'without'} bias correction; its "
        "samples differ from full "
        f"precision by {found.calibration['operating_mse']:.4g} in mean square) written to {path}"
    )
    return found


def _plain_profile(run: Run, table: LayerTable) -> SensitivityProfile | None:
    path = run.path("profile.json")
    inputs = profile_inputs(run, table)
    if artifacts.is_current(path, "mpqsearch/profile", inputs, overwrite=run.overwrite):
        run.say(f"profile: reused {path}")
        return artifacts.load_profile(path)
    if run.dry_run:
        run.say(f"profile: would measure {len(table)} layers at {len(run.config.policy.widths)} widths")
        return None
    if run.config.calibration.weights_only:
        measured = _measure_weights(run, table, inputs)
    else:
        if run.config.calibration.captured and run.config.calibration.sampler_seeds:
            run.say(
                "profile: recorded calls bring no sampler: final samples are not probed, the losses 'gain' and "
                "'probe' are measured"
            )
        same_model(run, table)
        with run.timed("profile"), bars_of() as progress:
            measured = _measure(run, table, run.config.calibration, inputs, progress)
    artifacts.save_profile(path, measured, inputs)
    shutil.rmtree(run.path("partial"), ignore_errors=True)
    from mpqsearch.report.profile import write_profile_figures

    write_profile_figures(run.path("figures"), measured)
    run.say(f"profile: written to {path} in {run.seconds['profile']:.0f} s; pictures in {run.path('figures')}")
    return measured


def _measure_weights(run: Run, table: LayerTable, inputs: Mapping[str, str]) -> SensitivityProfile:
    """Profile the weights on disk; each layer is kept as it is finished."""
    from mpqsearch.models import resolve_device
    from mpqsearch.profile.streaming import Partial, profile_weights

    c = run.config
    kept = Partial(folder=run.path("partial", "weights"), inputs=inputs)
    if kept.finished():
        run.say(f"profile: continuing after {kept.finished()} of {len(table)} layers")
    with run.timed("profile"), bars_of(unit="B") as progress:
        return profile_weights(
            run.streamed,
            table,
            c.policy,
            c.calibration.schemes,
            c.quantizer.format(),
            device=str(resolve_device(c.model.device)),
            memory_limit=c.model.limit_bytes,
            partial=kept,
            progress=progress,
        )


def _measure(run: Run, table: LayerTable, spec: Any, inputs: Mapping[str, str], progress: Any) -> SensitivityProfile:
    """Profile in parts, each kept in ``partial/`` as it is finished, so that an interrupted run continues."""
    from mpqsearch.profile import final_errors, profile_base, race_final_errors, with_final_errors
    from mpqsearch.profile.streaming import Partial

    fmt, sampler = run.config.quantizer.format(), run.config.sampler
    base_path, final_path = run.path("partial", "profile.json"), run.path("partial", "final.json")
    if artifacts.is_current(base_path, "mpqsearch/profile", inputs, overwrite=True):
        base = artifacts.load_profile(base_path)
        run.say(f"profile: continuing from {base_path.parent}")
    else:
        # Under a memory limit a layer's file lacks the output errors, which a step of their own measures.
        limited = str(run.config.model.limit_bytes is not None)
        kept = Partial(folder=run.path("partial", "base"), inputs={**inputs, "limited": limited})
        if kept.finished():
            run.say(f"profile: continuing after the tables of {kept.finished()} of {len(table)} layers")
        base = profile_base(
            run.denoiser,
            table,
            run.config.policy,
            sampler,
            spec,
            fmt,
            memory_limit=run.config.model.limit_bytes,
            partial=kept,
            progress=progress,
        )
        artifacts.save_profile(base_path, base, inputs)
    known = {}
    if artifacts.is_current(final_path, "mpqsearch/final-errors", inputs, overwrite=True):
        known = {
            (name, bits): tuple(each)
            for name, bits, each in artifacts.read_json(final_path, "mpqsearch/final-errors").data
        }

    def keep(found: Mapping[tuple[str, int], tuple[float, ...]]) -> None:
        artifacts.write_json(final_path, "mpqsearch/final-errors", [[n, b, v] for (n, b), v in found.items()], inputs)

    if spec.race and spec.final_widths:
        found = race_final_errors(
            run.denoiser,
            table,
            base,
            sampler,
            spec,
            fmt,
            _undecided(run, table, spec),
            known=known,
            keep=keep,
            progress=progress,
        )
        seeds = [len(each) for each in found.values()]
        run.say(
            f"profile: one layer at a time took {sum(seeds)} samples, {spec.final_seeds * len(seeds)} without the "
            "race; "
            f"{sum(n >= spec.final_seeds for n in seeds)} of {len(seeds)} needed all seeds"
        )
    else:
        found = final_errors(run.denoiser, table, base, sampler, spec, fmt, known=known, keep=keep, progress=progress)
    return with_final_errors(base, found)


def _undecided(run: Run, table: LayerTable, spec: Any) -> Any:
    """For a race: which layers the study's own integer programs still waver on, at its own budgets."""
    from mpqsearch.methods import MethodSpec
    from mpqsearch.profile import stability

    method = MethodSpec(name="race", allocator="ilp-layer", loss="final", scheme=spec.schemes[-1], bias_correction=True)
    budgets = [b for b in run.config.allocate.parsed() if b.quantity != "bops"]

    def undecided(measured: SensitivityProfile) -> tuple[list[str], bool]:
        found = stability(measured, table, run.config.policy, method, budgets, run.config.quantizer.format())
        names = [n for n, share in zip(measured.names, found.undecided, strict=True) if share > 0]
        run.say(
            f"profile: {len(names)} layers undecided; the noise costs at most {found.regret.max():.1%} of the "
            "predicted loss"
        )
        return names, found.settled(spec.race)

    return undecided
