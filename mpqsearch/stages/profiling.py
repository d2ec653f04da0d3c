"""Measure the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from mpqsearch import artifacts
from mpqsearch.core import LayerTable, SensitivityProfile
from mpqsearch.progress import bars_of
from mpqsearch.stages.base import Run, same_model


def profile_inputs(run: Run, table: LayerTable) -> dict[str, str]:
    """Digests of all that a profile depends on."""
    c = run.config.to_data()
    inputs = {
        "model": table.digest,
        "calibration": artifacts.digest_of({k: v for k, v in c["calibration"].items() if k != "captured"}),
        "quantizer": artifacts.digest_of(c["quantizer"]),
        "widths": artifacts.digest_of(sorted(run.config.policy.widths)),
    }
    if run.config.calibration.weights_only:  # nothing runs, so nothing else counts
        return inputs | {"calibration": artifacts.digest_of(["weights only", c["calibration"]["schemes"]])}
    return inputs | {"sampler": artifacts.digest_of(c["sampler"])} | run.source_inputs


def profile(run: Run, table: LayerTable) -> SensitivityProfile | None:
    """Measure the model, or reuse ``profile.json``; None in a dry run that would have to measure."""
    path = run.path("profile.json")
    inputs = profile_inputs(run, table)
    if artifacts.is_current(path, "mpqsearch/profile", inputs, overwrite=run.overwrite):
        run.say(f"profile: reused {path}")
        return artifacts.load_profile(path)
    if run.dry_run:
        run.say(f"profile: would measure {len(table)} layers at {len(run.config.policy.widths)} widths")
        return None
    measured = (_measure_weights if run.config.calibration.weights_only else _measure)(run, table, inputs)
    artifacts.save_profile(path, measured, inputs)
    shutil.rmtree(run.path("partial"), ignore_errors=True)
    from mpqsearch.report import profile_drawings, save_drawings

    save_drawings(run.path("figures"), profile_drawings(measured, table))
    run.say(f"profile: written to {path} in {run.seconds['profile']:.0f} s; pictures in {run.path('figures')}")
    _say_constant(run, measured)
    return measured


def _say_constant(run: Run, measured: SensitivityProfile) -> None:
    names = measured.calibration.get("constant_inputs", [])
    if names:
        run.say(
            f"profile: the input of {len(names)} layers never changed during calibration, so their errors are known "
            f"for that one input only: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        )


def _measure_weights(run: Run, table: LayerTable, inputs: Mapping[str, str]) -> SensitivityProfile:
    """Profile the weights on disk; each layer is kept as it is finished."""
    from mpqsearch.models import resolve_device
    from mpqsearch.profile import Partial, profile_weights

    c = run.config
    partial = Partial(folder=run.path("partial", "weights"), inputs=inputs)
    if partial.finished():
        run.say(f"profile: continuing after {partial.finished()} of {len(table)} layers")
    with run.timed("profile"), bars_of(unit="B") as progress:
        return profile_weights(
            run.streamed,
            table,
            c.policy,
            c.calibration.schemes,
            c.quantizer.format(),
            device=str(resolve_device(c.model.device)),
            memory_limit=c.model.limit_bytes,
            partial=partial,
            progress=progress,
        )


def _measure(run: Run, table: LayerTable, inputs: Mapping[str, str]) -> SensitivityProfile:
    """Profile in parts, each kept in ``partial/`` as it is finished, so that an interrupted run continues."""
    from mpqsearch.profile import Partial, profile_model

    c = run.config
    if c.calibration.captured and c.calibration.sampler_seeds and c.calibration.granularity == "channel":
        run.say(
            "profile: recorded calls bring no sampler: sensitivities of the final sample are left out, the loss "
            "'probe' is measured"
        )
    same_model(run, table)
    partial = Partial(folder=run.path("partial", "base"), inputs=inputs)
    if partial.finished():
        run.say(f"profile: continuing after the tables of {partial.finished()} of {len(table)} layers")
    with run.timed("profile"), bars_of() as progress:
        return profile_model(
            run.denoiser,
            table,
            c.policy,
            c.sampler,
            c.calibration,
            c.quantizer.format(),
            memory_limit=c.model.limit_bytes,
            partial=partial,
            progress=progress,
        )
