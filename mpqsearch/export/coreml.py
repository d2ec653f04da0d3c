"""Core ML: palettes of 1, 2, 3, 4, 6 or 8 bits for linear layers and convolutions, from a configuration by layer.

Limits, from running coremltools 9.0: one palette a layer, found by k-means; there is no scale. The torch model is
palettized on any system; a converted model runs on Apple's only. A palette of half-precision entries takes ``16 *
2**bits`` bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.reading import Reading
from mpqsearch.export.recipes import RecipeTarget
from mpqsearch.export.target import int_choices

if TYPE_CHECKING:
    from torch import nn

_LUT = "_COREML_/weight/lut"


class CoreMLExporter(RecipeTarget):
    """``coreml_config.json``: for ``PostTrainingPalettizerConfig.from_dict``."""

    name = "coreml"
    requires = "coremltools"
    imports = ("coremltools",)
    kinds = ("Linear", "Conv2d")
    limits = "more weights than the palette has entries"
    file = "coreml_config.json"
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

    def recipe(self, plan: Sequence[PlanEntry]) -> Any:
        """One palette a layer; null leaves it alone."""
        names = {e.layer: {"n_bits": e.will_get, "granularity": "per_tensor"} if e.choice else None for e in plan}
        return {"module_name_configs": names}

    def reading(self, recipe: Any) -> Reading | None:
        """``n_bits`` by layer; null is full precision."""
        names = recipe.get("module_name_configs")
        if not isinstance(names, Mapping):
            return None
        return Reading(layers={n: FULL_PRECISION if v is None else int(v["n_bits"]) for n, v in names.items()})

    def applied(self, module: nn.Module, recipe: Any) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        """Palettize and measure each palette."""
        import logging

        from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

        logging.getLogger("coremltools").setLevel(logging.ERROR)
        config = PostTrainingPalettizerConfig.from_dict(recipe)
        made = PostTrainingPalettizer(module, config).compress(num_kmeans_workers=1)
        widths, weights = {}, {}
        for name, layer in made.named_modules():
            table = dict(layer.named_buffers(recurse=False)).get(_LUT)
            if table is None:
                continue
            widths[name] = (table.numel() - 1).bit_length()
            weights[name] = layer.weight.flatten()[None]
        return {n: w for n, w in widths.items() if w < FULL_PRECISION}, weights
