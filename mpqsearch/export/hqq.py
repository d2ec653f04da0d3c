"""HQQ: linear layers of 1, 2, 3, 4, 5, 6 or 8 bits, each built as an ``HQQLinear``, from a configuration by layer.

Limits, from running hqq 0.2.8: it finds its own scales and zero points (half-quadratic optimisation). 5 and 6 bits are
stored as bytes, 3 bits ten to a 32-bit word. transformers keys its HQQ settings by kind of layer; by name, build the
layers as `applied` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mpqsearch.core import LayerSpec, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.reading import Reading
from mpqsearch.export.recipes import RecipeTarget
from mpqsearch.export.target import int_choices

if TYPE_CHECKING:
    from torch import nn

_CODE_BITS: dict[int, Fraction | int] = {1: 1, 2: 2, 3: Fraction(32, 10), 4: 4, 5: 8, 6: 8, 8: 8}


class HqqExporter(RecipeTarget):
    """``hqq_config.json``: layer to ``{"nbits", "group_size", "axis"}``, the arguments of ``BaseQuantizeConfig``."""

    name = "hqq"
    requires = "hqq"
    imports = ("hqq",)
    kinds = ("Linear",)
    limits = "a multiple of 8 outputs"
    file = "hqq_config.json"
    tested = "0.2.8.post1"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """1 to 6 and 8 bits for linear layers whose rows fill whole words."""
        fits = layer.kind in self.kinds and layer.n_channels % 8 == 0
        return int_choices((1, 2, 3, 4, 5, 6, 8)) if fits else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Codes as HQQ packs them, a float32 scale and zero point a row."""
        return coded_bits(layer, _CODE_BITS[choice.width], scales=layer.n_channels, scale_bits=32, zero_bits=32)

    def recipe(self, plan: Sequence[PlanEntry]) -> Any:
        """One group a row, along the inputs."""
        return {e.layer: {"nbits": e.will_get, "group_size": None, "axis": 1} for e in plan if e.choice}

    def reading(self, recipe: Any) -> Reading | None:
        """``nbits`` by layer."""
        if not recipe or not all(isinstance(v, Mapping) and "nbits" in v for v in recipe.values()):
            return None
        return Reading(layers={n: int(v["nbits"]) for n, v in recipe.items()})

    def applied(self, module: nn.Module, recipe: Any) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        """Build each layer and ask it what it holds."""
        import torch
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        widths, weights = {}, {}
        for name, settings in recipe.items():
            plain = module.get_submodule(name)
            layer = HQQLinear(
                plain, BaseQuantizeConfig(**settings), compute_dtype=torch.float32, device="cpu", del_orig=False
            )
            widths[name] = int(layer.meta["nbits"])
            weights[name] = layer.dequantize().reshape(plain.weight.shape)
        return widths, weights
