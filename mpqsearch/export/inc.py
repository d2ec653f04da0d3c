"""Intel Neural Compressor: linear layers of 1 to 8 bits by round to nearest, from a configuration by layer.

Limits, from running neural-compressor-pt 3.10: scales are half precision, a row each, from minimum and maximum. Codes
lie in 32-bit words that no code straddles: 3, 5, 6 and 7 bits take 3.2, 5.33, 6.4 and 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpqsearch.core import LayerSpec, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.reading import Reading
from mpqsearch.export.recipes import RecipeTarget
from mpqsearch.export.target import int_choices

if TYPE_CHECKING:
    from torch import nn


class IncExporter(RecipeTarget):
    """``inc_config.json``: layer to arguments of ``RTNConfig``, for ``set_local``."""

    name = "inc"
    requires = "neural-compressor-pt"
    imports = ("neural_compressor",)
    kinds = ("Linear",)
    file = "inc_config.json"
    tested = "3.10"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """1 to 8 bits for linear layers."""
        return int_choices(range(1, 9)) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Whole words along the inputs of a row, half-precision scales, zero points in words along the rows."""
        per_word = 32 // choice.width
        codes = 32 * layer.n_channels * -(-layer.weights_per_channel // per_word)
        zeros = 32 * -(-layer.n_channels // per_word)
        exact = coded_bits(layer, choice.width)
        return coded_bits(
            layer,
            choice.width,
            scales=layer.n_channels,
            scale_bits=16,
            other=max(0, codes - exact.payload) + zeros + 16,
        )

    def recipe(self, plan: Sequence[PlanEntry]) -> Any:
        """Settings of each layer; full precision is a type of its own."""
        return {
            e.layer: {"bits": e.will_get, "group_size": -1, "use_sym": False} if e.choice else {"dtype": "fp32"}
            for e in plan
        }

    def reading(self, recipe: Any) -> Reading | None:
        """Bits by layer; those of a type have no integers."""
        settings = [v for v in recipe.values() if isinstance(v, Mapping)]
        said = len(settings) == len(recipe) and all("bits" in v or v.get("dtype") == "fp32" for v in settings)
        if not recipe or not said or "quantization" in recipe:  # the last is MLX's
            return None
        return Reading(layers={n: int(v.get("bits", 16)) for n, v in recipe.items()})

    def applied(self, module: nn.Module, recipe: Any) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        """Prepare, convert, and ask every layer that took the place of a linear one."""
        from neural_compressor.torch.quantization import RTNConfig, convert, prepare

        config = RTNConfig(dtype="fp32")
        for name, settings in recipe.items():
            config.set_local(name, RTNConfig(**settings))
        made = convert(prepare(module, config))
        found = {n: int(m.bits) for n, m in made.named_modules() if hasattr(m, "qweight") and hasattr(m, "bits")}
        weights = {n: made.get_submodule(n).recover() for n in found}
        return found, weights
