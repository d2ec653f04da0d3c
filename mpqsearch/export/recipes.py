"""What targets without weights share: a configuration, applied by the library to a new model of the same class, and
read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import write_text
from mpqsearch.core import FULL_PRECISION, LayerTable
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, json_at, resolve
from mpqsearch.export.target import ConsumerTarget, write_config

if TYPE_CHECKING:
    from torch import nn


class RecipeTarget(ConsumerTarget):
    """Base of a target that writes a configuration only: the library derives scales from the weights by itself.

    ``file`` is the name of the configuration. A subclass gives `recipe`, `applied` and `reading`.
    """

    file = ""
    payload = False
    notes: tuple[str, ...] = ("a configuration: the library derives scales from the weights",)

    def recipe(self, plan: Sequence[PlanEntry]) -> Any:
        """The configuration as plain JSON data."""
        raise NotImplementedError

    def applied(self, module: nn.Module, recipe: Any) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        """Let the library quantize ``module``: width of every layer as it says, and the decoded weight of each where it
        can be had."""
        raise NotImplementedError

    def reading(self, recipe: Any) -> Reading | None:
        """The widths that a configuration says; None when it is none of this target's."""
        raise NotImplementedError

    def read(self, path: Path) -> Reading | None:
        """The widths that a file or folder says; None when it holds no configuration of this target."""
        recipe = json_at(path, self.file)
        return self.reading(recipe) if isinstance(recipe, Mapping) else None

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The configuration, and ``config.json`` of the model for the check."""
        assert job.denoiser is not None
        write_text(folder / self.file, json.dumps(self.recipe(plan), indent=1) + "\n")
        return [folder / self.file, *write_config(folder, job.denoiser.module)]

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Apply the configuration and read widths and the levels that each layer really holds."""
        from mpqsearch.export.check import build_model, libraries, most_levels, planned_layers

        made = module or build_model(folder)
        found, weights = self.applied(made, json.loads((folder / self.file).read_text()))
        problems = []
        for name, weight in weights.items():
            levels = most_levels(weight)
            if levels > 2 ** found[name] or (levels < 2 and weight.numel() > 2):
                problems.append(f"{name} holds {levels} levels in a row; {found[name]} bits have {2 ** found[name]}")
        return {
            "widths": {**dict.fromkeys(planned_layers(folder), FULL_PRECISION), **found},
            "problems": problems,
            "versions": libraries(self.requires),
        }


class WrittenTarget(RecipeTarget):
    """Base of a configuration whose consumer was never run here: written by its documentation and source, checked by
    reading it again.

    A subclass gives ``written`` in place of a recipe, and ``read``.
    """

    by_consumer = False
    needs_config = False

    def written(self, plan: Sequence[PlanEntry]) -> str:
        """The text of the file."""
        raise NotImplementedError

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The one file."""
        write_text(folder / self.file, self.written(plan))
        return [folder / self.file]

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """What our own reader finds in the file; the consumer has no part in it."""
        from mpqsearch.export.neutral import FILE, load_neutral

        reading = self.read(folder / self.file)
        if reading is None:
            raise ConfigError(f"{folder / self.file} is no file of the target {self.name!r}")
        table = LayerTable(digest="", layers=load_neutral(folder / FILE).layers)
        widths = dict.fromkeys(table.by_name, FULL_PRECISION)
        if reading.layers or reading.rules:
            widths = resolve(reading, table, str(folder / self.file))
        return {"widths": widths, "versions": {}}
