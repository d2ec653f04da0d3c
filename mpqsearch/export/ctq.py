"""convert_to_quant, which makes checkpoints for ComfyUI: a format for each layer, for ``ctq --layer-config``.

By its source and from running it (convert-to-quant 1.3.4): the keys of the file are expressions, looked for in the name
of a layer in the checkpoint that is converted; the most specific one counts. They are anchored here, so that it finds
them with and without ``--fullmatch``. It stores two formats of 8 bits as they are called; an entry ``nvfp4`` or
``mxfp8`` is stored as codes of FP8 under that name, which nothing can load, so they are not offered. Its own rounding
(learned, or ``--simple``) makes the codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqsearch.artifacts import write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.mapfile import FILE as MAP
from mpqsearch.export.mapfile import load_neutral
from mpqsearch.export.names import layer_places, tied
from mpqsearch.export.reading import Reading, float_note, json_at, pattern_of
from mpqsearch.export.target import Target

FILE = "ctq_layers.json"
FORMATS: dict[str, dict[str, str]] = {
    "int8_tensorwise": {"format": "int8_tensorwise", "scaling_mode": "row"},
    "float8_e4m3fn": {"format": "float8_e4m3fn"},
}
"""Formats to what an entry says: integers have a scale a row, which costs nothing beside it."""

MARK_BITS = 8 * 60
"""About what the description of a layer takes in the checkpoint."""


class CtqTarget(Target):
    """``ctq_layers.json``: for ``ctq -i model.safetensors --comfy_quant --layer-config``."""

    name = "ctq"
    requires = "convert-to-quant"
    imports = ("convert_to_quant",)
    tested = "1.3.4"
    limits = "more weights than a description has bits"
    payload = False
    needs_config = False
    full_bits = 16
    kept_bits = 16

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Two formats of 8 bits, for linear layers that they make smaller."""
        made = [Choice(name=n, width=8) for n in FORMATS] if layer.kind in self.kinds else []
        return tuple(c for c in made if self.coded(layer, c).total < FULL_PRECISION * layer.n_weights)

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """A byte a weight, a float32 scale a row or one in all."""
        scales = layer.n_channels if choice.name == "int8_tensorwise" else 1
        return coded_bits(layer, 8, scales=scales, scale_bits=32, other=MARK_BITS)

    def tied(self, table: LayerTable) -> list[tuple[str, ...]]:
        """Layers that are one layer in the model's own code."""
        return tied(table)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """One entry a layer, under its name in the model's own code; all others are left alone."""
        found = layer_places(job.table)
        entries = {
            f"^{re.escape(found[e.layer].name)}$": FORMATS[e.choice] if e.choice else {"skip": True} for e in plan
        }
        write_text(folder / FILE, json.dumps(entries | {"_default": {"skip": True}}, indent=1) + "\n")
        return [folder / FILE]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Ask its own rules for the format of every layer."""
        from convert_to_quant.config.layer_config import get_layer_settings, load_layer_config

        table = LayerTable(digest="", layers=load_neutral(folder / MAP).layers)
        config = load_layer_config(str(folder / FILE))
        asked = {n: get_layer_settings(f"{p.name}.weight", config) for n, p in layer_places(table).items()}
        formats = {n: str(s["format"]) for n, s in asked.items() if s and not s.get("skip")}
        return {"widths": dict.fromkeys(formats, 8), "choices": formats}


def read(path: Path, table: LayerTable) -> Reading | None:
    """A layer configuration as the program applies it: to linear layers, by their names in the model's own code, or in
    diffusers where none of its entries fits those. All of its formats are stored at 8 bits."""
    data = json_at(path, FILE)
    entries = {k: v for k, v in data.items() if not k.startswith("_")} if isinstance(data, Mapping) else {}
    if not entries or not all(isinstance(v, Mapping) and ("format" in v or v.get("skip")) for v in entries.values()):
        return None
    patterns = [(pattern_of(key, str(path)), v) for key, v in sorted(entries.items(), key=lambda e: _order(e[0]))]
    linear = [la.name for la in table if la.kind == "Linear"]
    published = layer_places(table)
    for names in ({n: published[n].name for n in linear}, {n: n for n in linear}):
        fits = {n: next((v for p, v in patterns if p.search(name)), None) for n, name in names.items()}
        if any(settings is not None for settings in fits.values()):
            break
    default = data.get("_default")
    settings = {n: default if found is None else found for n, found in fits.items()}
    formats = {n: str(s["format"]) for n, s in settings.items() if s and not s.get("skip")}
    return Reading(widths=dict.fromkeys(formats, 8), notes=float_note(formats))


def _order(key: str) -> tuple[bool, int]:
    """Most specific first: expressions with a ``\\d`` and eight or more plain characters, then by their number."""
    plain = len(re.sub(r"\\.|[.*+?^${}|\\]", "", key))
    return not (r"\d" in key and plain >= 8), -plain
