"""What samples are asked to show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpqsearch.errors import ConfigError, UnknownNameError

PRESETS = ("mjhq", "sdci", "coco")
"""Prompt sets of the field. All three follow one rule, that of deepcompressor (SVDQuant): the names of the images are
shuffled with seed 0, the first n are the report's, and the noise of an image is seeded by a hash of its name."""

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "caption", "text"),
    "negative": ("negative", "negative_prompt"),
    "label": ("label", "class"),
    "name": ("name", "filename", "file_name", "id"),
}
"""What a column holds: the names by which it is found when the configuration gives none, in any case of letters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsSpec:
    """What samples are asked to show. Nothing is downloaded.

    file
        Prompts: ``.txt`` (one a line), ``.csv`` or ``.tsv`` (with a header), ``.jsonl``, ``.json`` or ``.yaml``: rows,
        a table by image name (MJHQ-30K's ``meta_data.json``, ``sDCI.yaml``), or COCO's captions (``captions_*.json``,
        ``dataset_coco.json``). Empty: no prompts. Example: ``"prompts.txt"``.
    calibration_file
        Prompts for everything that is fitted or chosen (calibration, training, development, search); ``file`` is
        then the report's alone. The field takes 128 captions of COCO. Empty: ``file`` is divided.
        Example: ``"calibration.txt"``.
    preset
        ``mjhq``, ``sdci`` or ``coco``: the report follows the field's rule, see `PRESETS`. Empty: noise is seeded by
        the seed. Example: ``"mjhq"``.
    report [prompts]
        Prompts of ``file`` that are kept for the report. 0: all with a ``calibration_file``; else 5,000 with a preset,
        and half of the file without.
    columns
        Column names where they are not the usual ones (`COLUMNS`). An empty name: the file has no such column. Example:
        ``{prompt = "Caption"}``.
    classes
        Of class-conditional models: the classes that samples show in turn. Empty: all. Example: ``[1, 7]``.
    """

    file: str = ""
    calibration_file: str = ""
    preset: str = ""
    report: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.preset and self.preset not in PRESETS:
            raise UnknownNameError("preset of prompts", self.preset, PRESETS, "(prompts.preset)")
        for column in self.columns:
            if column not in COLUMNS:
                raise UnknownNameError("column of prompts", column, COLUMNS, "(prompts.columns)")
        needs_file = [k for k in ("preset", "calibration_file", "report", "columns") if getattr(self, k)]
        if needs_file and not self.file:
            raise ConfigError(f"prompts.{needs_file[0]} needs prompts.file, a local file: nothing is downloaded")
        if self.report < 0 or min(self.classes, default=0) < 0:
            raise ConfigError("prompts.report and prompts.classes must be at least 0")
        if self.classes and self.file:
            raise ConfigError(
                "prompts.classes and prompts.file exclude each other: a file gives classes in a column 'label'"
            )
