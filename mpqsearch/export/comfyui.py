"""Maps of ComfyUI: the metadata of a quantized checkpoint, which names a format for each linear layer.

By its guide and source (Comfy-Org/ComfyUI, ``QUANTIZATION.md`` at commit 311c014, ``comfy/quant_ops.py`` at 0271a46,
``comfy/utils.py::convert_old_quants``): ``_quantization_metadata`` is a JSON in the header of a safetensors
checkpoint, ``{"format_version": "1.0", "layers": {name: {"format": ...}}}``. A layer that is not named is loaded as it
is. Names are those of the checkpoint, with its prefix; models whose original names differ from diffusers' need a
renaming. Nothing is written here: metadata without weights in these formats cannot be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqsearch.core import LayerTable
from mpqsearch.errors import ArtifactError
from mpqsearch.export.reading import PREFIX, Reading, by_name, float_note, json_at
from mpqsearch.untrusted import parse_json

KEY = "_quantization_metadata"
FORMATS = {
    "int8_tensorwise": 8, "float8_e4m3fn": 8, "float8_e5m2": 8, "mxfp8": 8, "nvfp4": 4, "asym_w4a8_int8": 4,
    "convrot_w4a4": 4, "awq_w4a16": 4,
}  # fmt: skip
"""Formats to bits of a weight."""


def read(path: Path, _table: LayerTable) -> Reading | None:
    """The metadata as JSON, or in the header of a checkpoint."""
    in_header = path.suffix == ".safetensors" and path.is_file()
    data = _header(path) if in_header else json_at(path, "comfyui_metadata.json")
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
        return None if text is None else {KEY: parse_json(text, str(path))}
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
