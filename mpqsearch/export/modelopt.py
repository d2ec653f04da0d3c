"""NVIDIA ModelOpt: simulated integers of 2 to 8 bits for linear layers and convolutions, from a configuration.

Limits, from running nvidia-modelopt 0.47.0: the widths are simulated (its packed formats are INT8, FP8, NVFP4 and 4-bit
blocks); one bit does nothing there, so 2 is the narrowest. Scales are the largest magnitude of each row. Give the list
under ``quant_cfg`` to ``modelopt.torch.quantization.quantize``; later entries win.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.errors import ArtifactError
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.reading import Reading, json_at, number_of_bits
from mpqsearch.export.target import AppliedTarget, int_choices

if TYPE_CHECKING:
    from torch import nn

_END = ".weight_quantizer"


class ModelOptTarget(AppliedTarget):
    """``modelopt_config.json``."""

    name = "modelopt"
    requires = "nvidia-modelopt"
    imports = ("modelopt",)
    kinds = ("Linear", "Conv2d")
    file = "modelopt_config.json"
    tested = "0.47.0"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """int2 to int8 for linear layers and 2-d convolutions."""
        return int_choices(range(2, 9)) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """The width itself and a float32 scale a row: what a packed form would take, ModelOpt has none at most
        widths."""
        return coded_bits(layer, choice.width, scales=layer.n_channels, scale_bits=32)

    def recipe(self, plan: Sequence[PlanEntry]) -> Any:
        """The list form of ``quant_cfg``: everything off, then one entry a layer."""
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for e in plan:
            if e.choice:
                cfg = {"num_bits": e.will_get, "axis": 0}
                entries.append({"quantizer_name": e.layer + _END, "cfg": cfg, "enable": True})
        return {"quant_cfg": entries, "algorithm": "max"}

    def read(self, path: Path, table: LayerTable) -> Reading | None:
        """``quant_cfg`` as ModelOpt applies it: entries in order, later ones win, each to the weight quantizers whose
        name its wildcard fits and whose layer is of its ``parent_class``; none of them leaves 8 bits."""
        recipe = json_at(path, self.file)
        if not isinstance(recipe, Mapping) or not isinstance(recipe.get("quant_cfg"), Mapping | list):
            return None
        entries = list(_entries(recipe["quant_cfg"]))
        widths = {layer.name: _width(layer, entries) for layer in table}
        exact = (e["quantizer_name"] for e in entries if not set(e["quantizer_name"]) & set("*?["))
        return Reading(widths=widths, names=tuple(n.removesuffix(_END) for n in exact if n.endswith(_END)))

    def applied(self, module: nn.Module, recipe: Any) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        """Quantize and ask every weight quantizer."""
        import modelopt.torch.quantization as mtq

        mtq.quantize(module, recipe, forward_loop=None)
        widths, weights = {}, {}
        for name, layer in module.named_modules():
            quantizer: Any = getattr(layer, "weight_quantizer", None)
            if quantizer is not None and quantizer.is_enabled:
                widths[name] = int(quantizer.num_bits)
                weights[name] = quantizer(layer.weight)
        return widths, weights


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
        if not fnmatch.fnmatch(layer.name + _END, entry["quantizer_name"]):
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
