"""Measure the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpqsearch import artifacts
from mpqsearch.core import SensitivityProfile
from mpqsearch.progress import bars_of
from mpqsearch.stages.base import Run, same_model
from mpqsearch.stages.discovering import layers
from mpqsearch.stages.preflight import preflight
from mpqsearch.stages.reuse import PROFILE, reuse_or_make

Inputs = Mapping[str, str]
"""Digests by name."""


def prepare(run: Run, sampling: str = "", targets: Sequence[str] = ()) -> bool:
    """What every later stage begins with: ``run.table`` and ``run.profile``; False in a dry run that would have to
    measure.

    ``sampling`` names what the later stages do with samples, ``targets`` what they export to. What they would raise is
    raised before anything is measured: see `preflight`.
    """
    layers(run)
    preflight(run, "" if run.reads_only else sampling, targets)
    return profile(run) is not None


def profile_inputs(run: Run) -> dict[str, str]:
    """Digests of all that a profile depends on."""
    calibration = run.config.to_data()["calibration"]
    inputs = {"model": run.table.digest, "widths": artifacts.digest_of(sorted(run.config.policy.widths))}
    inputs |= run.digests("quantizer")
    if run.config.calibration.weights_only:  # nothing runs, so nothing else counts
        asked = ["weights only", calibration["schemes"], *([calibration["groups"]] if calibration["groups"] else [])]
        return inputs | {"calibration": artifacts.digest_of(asked)}
    del calibration["captured"]  # counts by its content
    if reuse := calibration.pop("reuse"):
        inputs |= {"reuse": run.files.of(Path(reuse) / "profile.npz")}
    inputs |= {"calibration": artifacts.digest_of(calibration)} | run.digests("sampler")
    return inputs | run.source_inputs


def profile(run: Run) -> SensitivityProfile | None:
    """``run.profile``: measure the model, or reuse ``profile.json``; None in a dry run that would have to measure."""
    path, inputs = run.path("profile.json"), profile_inputs(run)
    reused = artifacts.is_current(path, PROFILE.schema, inputs, overwrite=run.overwrite)
    if run.dry_run and not reused:
        run.say(f"profile: would measure {len(run.table)} layers at {len(run.config.policy.widths)} widths")
        return None
    measure = _measure_weights if run.config.calibration.weights_only else _measure
    run.profile = reuse_or_make(run, PROFILE, path, inputs, lambda: measure(run, inputs), stage="profile")
    if not reused:
        _finish(run)
    return run.profile


def _finish(run: Run) -> None:
    """Say what is to be known of a profile that was just measured."""
    shutil.rmtree(run.path("partial"), ignore_errors=True)
    path, seconds = run.path("profile.json"), run.seconds["profile"]
    run.say(f"profile: written to {path} in {seconds:.0f} s")
    names = run.profile.calibration.get("constant_inputs", [])
    if names:
        run.say(
            f"profile: the input of {len(names)} layers never changed during calibration, so their errors are known "
            f"for that one input only: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        )


def _measure_weights(run: Run, inputs: Inputs) -> SensitivityProfile:
    """Profile the weights on disk; each layer is kept as it is finished."""
    from mpqsearch.models import resolve_device
    from mpqsearch.profile import Partial, profile_weights

    c = run.config
    partial = Partial(folder=run.path("partial", "weights"), inputs=inputs)
    if partial.finished():
        run.say(f"profile: continuing after {partial.finished()} of {len(run.table)} layers")
    with run.timed("profile"), bars_of(unit="B") as progress:
        return profile_weights(
            run.streamed,
            run.table,
            c.policy,
            c.calibration.schemes,
            c.quantizer.format(),
            groups=c.calibration.groups,
            device=str(resolve_device(c.model.device)),
            memory_limit=c.model.limit_bytes,
            partial=partial,
            progress=progress,
        )


def _measure(run: Run, inputs: Inputs) -> SensitivityProfile:
    """Profile in parts, each kept in ``partial/`` as it is finished, so that an interrupted run continues."""
    from mpqsearch.profile import Partial, profile_model

    c = run.config
    if c.calibration.captured and c.calibration.sampler_seeds and c.calibration.granularity == "channel":
        run.say(
            "profile: recorded calls bring no sampler: sensitivities of the final sample are left out, the loss "
            "'probe' is measured"
        )
    same_model(run)
    known = artifacts.load_profile(Path(c.calibration.reuse) / "profile.json") if c.calibration.reuse else None
    if known is not None:
        run.say(
            f"profile: sensitivities are those of {c.calibration.reuse} (weights {known.model_digest[:10]}). Inputs "
            f"and output errors of {len(run.table)} layers are measured, without backward passes; slopes at contexts "
            "are left out."
        )
    partial = Partial(folder=run.path("partial", "base"), inputs=inputs)
    if partial.finished():
        run.say(f"profile: continuing after the tables of {partial.finished()} of {len(run.table)} layers")
    with run.timed("profile"), bars_of() as progress:
        return profile_model(
            run.denoiser,
            run.table,
            c.policy,
            c.calibration,
            c.quantizer.format(),
            memory_limit=c.model.limit_bytes,
            partial=partial,
            known=known,
            progress=progress,
        )
