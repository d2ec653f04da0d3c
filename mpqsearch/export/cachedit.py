"""cache-dit: a quantization type for each kind of layer in the blocks of a transformer, its ``precision_plan``.

Not verified by its consumer, which quantizes on CUDA devices alone. By its source (cache-dit 1.5.3,
``quantization/torchao/quantize_ao.py``):

- Only linear layers inside the repeated blocks of a model are quantized. A name of the plan is looked for anywhere in
  the name of a layer *inside its block*, so that ``attn.to_q`` has one type in all blocks: such layers are `tied`.
- ``exclude_layers``, found in the same way, stay as they are. What is left gets ``quant_type``: here nothing is left.
- The blocks are those that the model's class names, else ``repeated_blocks``.
- ``int4_weight_only`` has a scale and a zero point for each group of 32 weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqsearch.artifacts import write_text
from mpqsearch.core import LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.mapfile import FILE as MAP
from mpqsearch.export.mapfile import load_neutral
from mpqsearch.export.reading import Reading, bits_of, float_note, json_at
from mpqsearch.export.target import Target

FILE = "cache_dit_quant.json"
TYPES = {"int8_weight_only": 8, "int4_weight_only": 4}
"""Types that quantize weights alone, to bits of a weight."""

GROUP = 32
_IN_BLOCK = re.compile(r"(?:.*\.)?\w*(?:blocks|layers)\.\d+\.(.+)")


class CacheDitTarget(Target):
    """``cache_dit_quant.json``: ``cache_dit.quantize(transformer, QuantizeConfig(**values))``."""

    name = "cachedit"
    requires = "cache-dit"
    by_consumer = False
    tested = "1.5.3"
    limits = "a place in a block of the transformer, and rows of a multiple of 32 weights for 4 bits"
    payload = False
    needs_config = False
    full_bits = 16
    kept_bits = 16

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Integers of 8 and 4 bits, for linear layers inside blocks."""
        if layer.kind not in self.kinds or not part_of(layer.name):
            return ()
        grouped = layer.weights_per_channel % GROUP == 0
        return tuple(Choice(name=n, width=b) for n, b in TYPES.items() if b == 8 or grouped)

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Codes with a half-precision scale a row, or a scale and a zero point a group."""
        if choice.width == 8:
            return coded_bits(layer, 8, scales=layer.n_channels, scale_bits=16)
        return coded_bits(layer, 4, scales=layer.n_weights // GROUP, scale_bits=16, zero_bits=16)

    def tied(self, table: LayerTable) -> list[tuple[str, ...]]:
        """Layers of one name in all blocks, and those whose names hold such a name."""
        parts = {la.name: part_of(la.name) for la in table if la.kind in self.kinds and part_of(la.name)}
        groups: dict[str, list[str]] = {}
        for name, part in parts.items():
            groups.setdefault(min((p for p in set(parts.values()) if p in part), key=len), []).append(name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The types of all kinds of layers that are quantized; the others are excluded."""
        kinds = {part_of(e.layer): e.choice for e in plan if part_of(e.layer) and job.table[e.layer].kind in self.kinds}
        taken = {part: choice for part, choice in kinds.items() if choice}
        values: dict[str, Any] = {
            "quant_type": next(iter(TYPES)),
            "precision_plan": taken,
            "exclude_layers": [part for part, choice in kinds.items() if not choice],
        }
        if job.denoiser is not None:
            values["repeated_blocks"] = block_classes(job.denoiser.module, (e.layer for e in plan))
        write_text(folder / FILE, json.dumps(values, indent=1) + "\n")
        return [folder / FILE]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """What our own reader finds in the file."""
        reading = read(folder / FILE, LayerTable(digest="", layers=load_neutral(folder / MAP).layers))
        return {"widths": reading.widths if reading else None}


def part_of(layer: str) -> str:
    """The name of a layer inside its innermost block; empty outside of blocks."""
    found = _IN_BLOCK.fullmatch(layer)
    return found[1] if found else ""


def block_classes(module: Any, layers: Iterable[str]) -> list[str]:
    """Names of the classes of the blocks that hold layers, in their order."""
    blocks = (n.removesuffix(f".{part_of(n)}") for n in layers if part_of(n))
    return list(dict.fromkeys(type(module.get_submodule(n)).__name__ for n in dict.fromkeys(blocks)))


def read(path: Path, table: LayerTable) -> Reading | None:
    """``precision_plan`` in the order in which it is applied, ``exclude_layers``, and ``quant_type`` for the rest of
    the linear layers in blocks."""
    data = json_at(path, FILE)
    if not isinstance(data, Mapping) or not isinstance(data.get("precision_plan"), Mapping):
        return None
    order = sorted(data["precision_plan"].items(), key=lambda entry: _order(str(entry[1])))
    left, rest = data.get("exclude_layers") or (), str(data.get("quant_type", "float8_per_row"))
    parts = {la.name: part_of(la.name) for la in table if la.kind == "Linear" and part_of(la.name)}
    kept = {n: p for n, p in parts.items() if not any(e in p for e in left)}
    types = {n: next((str(t) for key, t in order if key in p), rest) for n, p in kept.items()}
    return Reading(widths={n: bits_of(t) for n, t in types.items()}, notes=float_note(types))


def _order(kind: str) -> tuple[bool, bool, str]:
    """Floats come before integers, wide integers before narrow ones."""
    return not kind.startswith("float8"), not kind.startswith("nvfp4"), kind.replace("int4", "int9")
