"""What a report is made of: plain data, so that it can be made and tested without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpqsearch.core import BitMap, LayerTable, Policy, SensitivityProfile, StorageModel, StudyRecord
from mpqsearch.core.budget import DEFAULT_STORAGE
from mpqsearch.report.grids import SampleGrid


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that a report shows, as plain data.

    ``maps`` are chosen bit maps under the label that names them, ``point_maps`` the maps of any records under their
    digest (hovering a point of the front shows its map), ``grids`` samples of several methods at one budget,
    ``correlations`` rows of a table of rank correlations (any columns, the same in every row), ``exports`` rows of
    ideal and stored sizes, one a target, ``environment`` what `mpqsearch.artifacts.environment` returns, ``config`` the
    text of the resolved configuration, ``digests`` names to SHA-256 of the inputs, ``seconds`` stages to wall time,
    ``notes`` sentences for the first screen, ``chosen`` the record that is exported (one of ``records``), ``search``
    what ``search.json`` holds.
    """

    title: str
    records: Sequence[StudyRecord]
    table: LayerTable | None = None
    policy: Policy | None = None
    maps: Mapping[str, BitMap] = field(default_factory=dict)
    point_maps: Mapping[str, BitMap] = field(default_factory=dict)
    profile: SensitivityProfile | None = None
    variant: str = ""
    grids: Sequence[SampleGrid] = ()
    correlations: Sequence[Mapping[str, Any]] = ()
    exports: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    command: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    chosen: StudyRecord | None = None
    storage: StorageModel = DEFAULT_STORAGE
    search: Mapping[str, Any] | None = None
