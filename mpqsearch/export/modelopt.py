"""NVIDIA ModelOpt: simulated integers of 2 to 8 bits for linear layers and convolutions, from a configuration.

Limits, from running nvidia-modelopt 0.47.0: the widths are simulated (its packed formats are INT8, FP8, NVFP4 and 4-bit
blocks); one bit does nothing there, so 2 is the narrowest. Scales are the largest magnitude of each row. Give the list
under ``quant_cfg`` to ``modelopt.torch.quantization.quantize``; later entries win.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.reading import Reading, Rule
from mpqsearch.export.recipes import RecipeTarget
from mpqsearch.export.target import int_choices

if TYPE_CHECKING:
    from torch import nn


class ModelOptExporter(RecipeTarget):
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
        entries += [
            {
                "quantizer_name": f"{e.layer}.weight_quantizer",
                "cfg": {"num_bits": e.will_get, "axis": 0},
                "enable": True,
            }
            for e in plan
            if e.choice
        ]
        return {"quant_cfg": entries, "algorithm": "max"}

    def reading(self, recipe: Any) -> Reading | None:
        """Exact names and wildcards of weight quantizers, later ones first; both the list and the older mapping."""
        entries = recipe.get("quant_cfg")
        if isinstance(entries, Mapping):
            entries = [
                {"quantizer_name": n, "cfg": c, "enable": c.get("enable", True)}
                for n, c in entries.items()
                if isinstance(c, Mapping)
            ]
        if not isinstance(entries, list):
            return None
        said = [(str(e["quantizer_name"]), _bits(e)) for e in reversed(entries)]
        exact = [
            n.removesuffix(".weight_quantizer") for n, _ in said if n.endswith(".weight_quantizer") and "*" not in n
        ]
        layers = {stem: next(w for n, w in said if fnmatch.fnmatch(f"{stem}.weight_quantizer", n)) for stem in exact}
        globs = [
            (re.sub(r"\.?weight_quantizer$", "", n) or "*", w)
            for n, w in said
            if "*" in n and n.endswith(("weight_quantizer", "*"))
        ]
        rules = [Rule(width=w, pattern=fnmatch.translate(n)) for n, w in globs]
        return Reading(layers=layers, rules=tuple(rules))

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


def _bits(entry: Mapping[str, Any]) -> int:
    """Width of one entry: a number, or exponent and mantissa of a float; 16 when it switches a quantizer off."""
    bits = (entry.get("cfg") or {}).get("num_bits", FULL_PRECISION)
    if not entry.get("enable", True):
        return FULL_PRECISION
    return sum(bits) + 1 if isinstance(bits, list | tuple) else int(bits)
