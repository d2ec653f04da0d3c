"""Maps of NVIDIA ModelOpt: its configuration ``quant_cfg``, as nvidia-modelopt 0.47.0 applies it.

Nothing is written here: integer widths by layer are simulated there, and none of them can be deployed (its packed
formats are INT8, FP8, NVFP4 and 4-bit blocks).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable
from mpqsearch.errors import ArtifactError
from mpqsearch.export.reading import Reading, json_at, number_of_bits
from mpqsearch.untrusted import fits

_END = ".weight_quantizer"


def read(path: Path, table: LayerTable) -> Reading | None:
    """``quant_cfg`` as ModelOpt applies it: entries in order, later ones win, each to the weight quantizers whose
    name its wildcard fits and whose layer is of its ``parent_class``; none of them leaves 8 bits."""
    recipe = json_at(path, "modelopt_config.json")
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("quant_cfg"), Mapping | list):
        return None
    entries = list(_entries(recipe["quant_cfg"]))
    widths = {layer.name: _width(layer, entries) for layer in table}
    exact = (e["quantizer_name"] for e in entries if not set(e["quantizer_name"]) & set("*?["))
    return Reading(widths=widths, names=tuple(n.removesuffix(_END) for n in exact if n.endswith(_END)))


def _entries(config: Any) -> Iterator[dict[str, Any]]:
    """``quant_cfg`` in its one present form: the older mapping, single-key entries and ``nn.*`` scopes spelled out."""
    if isinstance(config, Mapping):
        config = [{key: value} for key, value in config.items()]
    for entry in config:
        if "quantizer_name" in entry:
            yield {**entry, "quantizer_name": str(entry["quantizer_name"])}
            continue
        for key, value in entry.items():
            scoped = value.items() if key.startswith("nn.") else [("*" if key == "default" else key, value)]
            for name, settings in scoped:
                cfg = settings if isinstance(settings, list) else {k: v for k, v in settings.items() if k != "enable"}
                built: dict[str, Any] = {"quantizer_name": name, "cfg": cfg or None}
                built |= {"enable": settings["enable"]} if "enable" in settings else {}
                yield built | ({"parent_class": key} if key.startswith("nn.") else {})


def _width(layer: LayerSpec, entries: Sequence[Mapping[str, Any]]) -> int:
    """Width of a layer after all entries; a quantizer that none of them touches is on, at 8 bits."""
    bits, enabled = 8, True
    for entry in entries:
        scope = entry.get("parent_class")
        if scope is not None and scope != f"nn.{layer.kind}":
            continue
        if not fits(layer.name + _END, entry["quantizer_name"]):
            continue
        cfg = entry.get("cfg")
        enabled = bool(entry.get("enable", True))
        if cfg:
            bits = _bits(cfg[0] if isinstance(cfg, list) else cfg)
    return bits if enabled else FULL_PRECISION


def _bits(config: Mapping[str, Any]) -> int:
    """Width of one setting: a number, or exponent and mantissa of a float; ModelOpt takes 8 where it says nothing."""
    bits = config.get("num_bits", 8)
    if isinstance(bits, list | tuple):
        if len(bits) != 2:
            raise ArtifactError(f"num_bits {bits!r} is neither a width nor exponent and mantissa")
        return 1 + sum(number_of_bits(b) for b in bits)
    return number_of_bits(bits)
