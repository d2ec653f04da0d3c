"""Core ML: palettes of 1, 2, 3, 4, 6 or 8 bits for linear layers and convolutions, from a configuration by layer.

Limits, from running coremltools 9.0: one palette a layer, found by k-means; there is no scale. The torch model is
palettized on any system; a converted model runs on Apple's only. A palette of half-precision entries takes ``16 *
2**bits`` bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqsearch.artifacts import write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, json_at, number_of_bits, pattern_of
from mpqsearch.export.target import Target, int_choices, write_config
from mpqsearch.untrusted import read_json

FILE = "coreml_config.json"
_LUT = "_COREML_/weight/lut"
PALETTIZED = ("Linear", "Conv1d", "Conv2d", "Conv3d")
"""Kinds that coremltools palettizes."""


class CoreMLTarget(Target):
    """``coreml_config.json``: for ``PostTrainingPalettizerConfig.from_dict``."""

    name = "coreml"
    requires = "coremltools"
    imports = ("coremltools",)
    kinds = ("Linear", "Conv2d")
    limits = "more weights than the palette has entries"
    payload = False
    tested = "9.0"
    full_bits = 16
    kept_bits = 16

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Palettes that are smaller than the layer."""
        if layer.kind not in self.kinds:
            return ()
        return tuple(c for c in int_choices((1, 2, 3, 4, 6, 8), "lut{}") if 2**c.width <= layer.n_weights)

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Dense indices and a palette of half-precision entries."""
        return coded_bits(layer, choice.width, other=16 * 2**choice.width)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """One palette a layer; null leaves it alone. ``config.json`` of the model is for the check."""
        names = {e.layer: {"n_bits": e.will_get, "granularity": "per_tensor"} if e.choice else None for e in plan}
        write_text(folder / FILE, json.dumps({"module_name_configs": names}, indent=1) + "\n")
        return [folder / FILE, *(write_config(folder, job.model.module) if job.denoiser else [])]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Palettize a model with random weights and measure each palette."""
        import logging

        from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

        from mpqsearch.export.check import build_model

        logging.getLogger("coremltools").setLevel(logging.ERROR)
        config = PostTrainingPalettizerConfig.from_dict(read_json(folder / FILE))
        result = PostTrainingPalettizer(build_model(folder), config).compress(num_kmeans_workers=1)
        widths, problems = {}, []
        for name, layer in result.named_modules():
            palette = dict(layer.named_buffers(recurse=False)).get(_LUT)
            if palette is None or palette.numel() >= 2**FULL_PRECISION:
                continue
            widths[name] = (palette.numel() - 1).bit_length()
            levels = len(layer.weight.unique())
            if not min(2, layer.weight.numel() - 1) <= levels <= palette.numel():
                problems.append(f"{name} holds {levels} levels; its palette has {palette.numel()}")
        return {"widths": widths, "problems": problems}


def read(path: Path, table: LayerTable) -> Reading | None:
    """The first of ``module_name_configs`` that fits a whole name (they are expressions), else
    ``module_type_configs`` by kind, else ``global_config``."""
    data = json_at(path, FILE)
    keys = {"module_name_configs", "module_type_configs", "global_config"}
    if not isinstance(data, Mapping) or not keys & set(data):
        return None
    named = data.get("module_name_configs") or {}
    patterns = {n: pattern_of(n, str(path)) for n in named}
    types, default = data.get("module_type_configs") or {}, _bits(data.get("global_config"))
    widths = {}
    for layer in table:
        if layer.kind in PALETTIZED:
            key = next((n for n, p in patterns.items() if p.fullmatch(layer.name)), None)
            of_kind = _bits(types[layer.kind]) if layer.kind in types else default
            widths[layer.name] = of_kind if key is None else _bits(named[key])
    coded = (n for n in patterns if _bits(named[n]) != FULL_PRECISION)
    unmatched = tuple(n for n in coded if not any(patterns[n].fullmatch(layer.name) for layer in table))
    return Reading(widths=widths, names=unmatched)


def _bits(config: Mapping[str, Any] | None) -> int:
    """Width of one entry: coremltools takes 4 where it says nothing; null is full precision."""
    if config is None or ("n_bits" in config and config["n_bits"] is None):
        return FULL_PRECISION
    return number_of_bits(config.get("n_bits", 4))
