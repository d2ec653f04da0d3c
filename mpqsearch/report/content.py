"""What a report is made of: plain data, so that it can be made and tested without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpqsearch.core import BitMap, LayerTable, Policy, SensitivityProfile, StudyRecord
from mpqsearch.report.grids import SampleGrid


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that a report shows, as plain data.

    Attributes:
        title: Heading of the page.
        records: The evaluated points.
        table: Layers of the model.
        policy: What fixed the widths of layers.
        maps: Chosen bit maps under the label that names them.
        point_maps: Maps of any records under their digest: a point of the front shows its map.
        profile: What was measured on the model.
        format_name: Format whose sensitivity is drawn (default: `mpqsearch.report.layer_losses`).
        grids: Samples of several methods at one budget.
        correlations: Rows of a table of rank correlations, all with the same columns.
        selections: Rows of what measured selections tried, all with the same columns.
        exports: Rows of ideal and stored sizes, one a target.
        environment: What `mpqsearch.artifacts.environment` returns.
        config: Text of the resolved configuration.
        command: What made the report.
        digests: Names to SHA-256 of the inputs.
        seconds: Stages to wall time.
        notes: Sentences for the first screen.
        chosen: The record that is exported, one of ``records``.
        chosen_file: Its map, relative to the page.
        export_command: What exports it.
        search: What ``search.json`` holds.
    """

    title: str
    records: Sequence[StudyRecord]
    table: LayerTable | None = None
    policy: Policy | None = None
    maps: Mapping[str, BitMap] = field(default_factory=dict)
    point_maps: Mapping[str, BitMap] = field(default_factory=dict)
    profile: SensitivityProfile | None = None
    format_name: str = ""
    grids: Sequence[SampleGrid] = ()
    correlations: Sequence[Mapping[str, Any]] = ()
    selections: Sequence[Mapping[str, Any]] = ()
    exports: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    command: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    chosen: StudyRecord | None = None
    chosen_file: str = ""
    export_command: str = ""
    search: Mapping[str, Any] | None = None
