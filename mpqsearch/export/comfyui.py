"""ComfyUI: 4 or 8 bits for linear layers, as the metadata of a quantized checkpoint.

Not verified by its consumer, an application that was not run here. By its guide and source (Comfy-Org/ComfyUI,
``QUANTIZATION.md`` at commit 311c014, ``comfy/quant_ops.py`` at 0271a46, ``comfy/utils.py::convert_old_quants``):

- ``_quantization_metadata`` is a JSON in the header of a safetensors checkpoint: ``{"format_version": "1.0", "layers":
  {name: {"format": ...}}}``. A layer that is not named is loaded as it is.
- It describes a checkpoint, it does not make one: the weights must be stored in these formats (``<layer>.weight`` and
  ``<layer>.weight_scale``) by a tool such as comfy-kitchen. This target writes no weights.
- Names are those of the checkpoint that ComfyUI loads, with its prefix. Here they are the model's own (diffusers);
  models whose original names differ need a renaming.
- Only 4 bits (NVFP4: floats of 4 bits, blocks of 16 with an 8-bit scale) and 8 bits (``int8_tensorwise``, a scale a
  row) exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqsearch.core import LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.errors import ArtifactError
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.reading import PREFIX, Reading, by_name, float_note, json_at
from mpqsearch.export.target import ConfigTarget

KEY = "_quantization_metadata"
FORMATS = {
    "int8_tensorwise": 8, "float8_e4m3fn": 8, "float8_e5m2": 8, "mxfp8": 8, "nvfp4": 4, "asym_w4a8_int8": 4,
    "convrot_w4a4": 4, "awq_w4a16": 4,
}  # fmt: skip
"""Formats to bits of a weight; the first of each width is the one that is written."""


class ComfyuiTarget(ConfigTarget):
    """``comfyui_metadata.json``: for the header of a checkpoint whose weights were quantized accordingly."""

    name = "comfyui"
    requires = "ComfyUI"
    by_consumer = False
    needs_config = False
    limits = "rows of a multiple of 16 weights"
    file = "comfyui_metadata.json"
    full_bits = 16
    kept_bits = 16
    tested = "commit 311c014"
    get = "clone github.com/Comfy-Org/ComfyUI"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """NVFP4 and 8-bit integers."""
        fits = layer.kind in self.kinds and layer.weights_per_channel % 16 == 0
        return (Choice(name="int8_tensorwise", width=8), Choice(name="nvfp4", width=4)) if fits else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """A byte and a float32 scale a row; or half a byte, a byte for 16 of them, and one float32."""
        if choice.width == 8:
            return coded_bits(layer, 8, scales=layer.n_channels, scale_bits=32)
        return coded_bits(layer, 4, scales=layer.n_weights // 16, scale_bits=8, other=32)

    def written(self, plan: Sequence[PlanEntry]) -> str:
        """The metadata under its key."""
        layers = {e.layer: {"format": e.choice} for e in plan if e.choice}
        return json.dumps({KEY: {"format_version": "1.0", "layers": layers}}, indent=1) + "\n"

    def read(self, path: Path, table: LayerTable) -> Reading | None:
        """The metadata as JSON, or in the header of a checkpoint."""
        in_header = path.suffix == ".safetensors" and path.is_file()
        data = _header(path) if in_header else json_at(path, self.file)
        if not isinstance(data, Mapping) or KEY not in data:
            return None
        formats = {str(n): str(v["format"]) for n, v in data[KEY]["layers"].items()}
        unknown = next((n for n, f in formats.items() if f not in FORMATS), None)
        if unknown is not None:
            raise ArtifactError(
                f"{path}: the layer {unknown!r} has the format {formats[unknown]!r}, which is not known here"
            )
        return by_name({n.removeprefix(PREFIX): FORMATS[f] for n, f in formats.items()}, float_note(formats))


def _header(path: Path) -> dict[str, Any] | None:
    """The metadata in the header of a safetensors file, under its key."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(KEY)
        return None if text is None else {KEY: json.loads(text)}
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
