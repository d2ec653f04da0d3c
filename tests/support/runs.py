"""Run folders with a profile that was never measured, for what starts from a saved profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpqsearch import artifacts
from mpqsearch.config import load_config
from mpqsearch.core import LayerTable, SensitivityProfile


def saved_profile(
    folder: Path, study: Path | None, table: LayerTable, profile: SensitivityProfile, overrides: Sequence[str] = ()
) -> None:
    """Write ``layers.json`` and ``profile.json`` into a run folder, as if ``study`` had measured them; needs no
    torch."""
    from mpqsearch.stages import Run
    from mpqsearch.stages.profiling import profile_inputs

    run = Run(config=load_config(study, list(overrides)), folder=folder)
    run.table = table
    artifacts.save_layers(run.path("layers.json"), table, run.source_inputs)
    artifacts.save_profile(run.path("profile.json"), profile, profile_inputs(run))
