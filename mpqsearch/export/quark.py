"""AMD Quark: simulated integers of 2, 3, 4 or 8 bits for linear layers and 2-d convolutions, from a configuration by
layer.

Limits, from running amd-quark 0.13: scales are derived from the weights, symmetric, a scale a row from its largest
magnitude. The layers are simulated; Quark's own exports pack 4 and 8 bits. Give ``QConfig.from_dict`` of the file to
``ModelQuantizer``. Names are exact; layers at full precision are left out and in ``exclude``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.reading import Reading, bits_of, float_note
from mpqsearch.export.recipes import RecipeTarget
from mpqsearch.export.target import int_choices

if TYPE_CHECKING:
    from torch import nn

_TENSORS = ("input_tensors", "output_tensors", "weight", "bias")


class QuarkExporter(RecipeTarget):
    """``quark_config.json``: what ``QConfig.to_dict`` gives."""

    name = "quark"
    requires = "amd-quark"
    imports = ("quark", "onnxslim", "transformers")
    kinds = ("Linear", "Conv2d")
    file = "quark_config.json"
    tested = "0.13"
    get = "pip install amd-quark onnxslim transformers"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """int2, int3, int4 and int8 for linear layers and 2-d convolutions."""
        return int_choices((2, 3, 4, 8)) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """The width itself and a float32 scale a row: what a packed form would take."""
        return coded_bits(layer, choice.width, scales=layer.n_channels, scale_bits=32)

    def recipe(self, plan: Sequence[PlanEntry]) -> Any:
        """Nothing everywhere, one entry a layer."""
        nothing = {**dict.fromkeys(_TENSORS), "target_device": None}
        return {
            "quant_method": "quark",
            "version": self.tested,
            "global_quant_config": nothing,
            "layer_type_quant_config": {},
            "layer_quant_config": {e.layer: {**nothing, "weight": _tensor(e.choice)} for e in plan if e.choice},
            "exclude": [e.layer for e in plan if not e.choice],
            "algo_config": None,
            "softmax_quant_spec": None,
            "kv_cache_quant_config": {},
            "kv_cache_post_rope": False,
            "quant_mode": "eager_mode",
        }

    def reading(self, recipe: Any) -> Reading | None:
        """The weight's type by exact name."""
        if recipe.get("quant_method") != "quark" or "layer_quant_config" not in recipe:
            return None
        types = {n: (v.get("weight") or {}).get("dtype", "none") for n, v in recipe["layer_quant_config"].items()}
        rest = (recipe.get("global_quant_config") or {}).get("weight")
        notes: tuple[str, ...] = (
            ("its settings for all other layers are not read; they keep full precision here",) if rest else ()
        )
        exact = {n: t for n, t in types.items() if "*" not in n}
        notes += ("wildcards are not read",) if len(exact) < len(types) else ()
        return Reading(layers={n: bits_of(t) for n, t in exact.items()}, notes=notes + float_note(exact))

    def applied(self, module: nn.Module, recipe: Any) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        """Quantize and ask every weight quantizer."""
        from quark.torch import ModelQuantizer
        from quark.torch.quantization.config.config import QConfig

        if not recipe["layer_quant_config"]:
            return {}, {}  # Quark refuses a configuration of nothing
        made = ModelQuantizer(QConfig.from_dict(recipe)).quantize_model(module, None)
        widths, weights = {}, {}
        for name, layer in made.named_modules():
            quantizer: Any = getattr(layer, "_weight_quantizer", None)
            if quantizer is not None:
                widths[name] = bits_of(quantizer.quant_spec.dtype.name)
                weights[name] = layer.get_quant_weight(layer.weight)
        return {n: w for n, w in widths.items() if w < FULL_PRECISION}, weights


def _tensor(dtype: str) -> dict[str, Any]:
    """Settings of one weight: symmetric, a scale a row from its minimum and maximum."""
    return {
        "dtype": dtype,
        "is_dynamic": False,
        "qscheme": "per_channel",
        "ch_axis": 0,
        "group_size": None,
        "block_size": None,
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": "float",
        "zero_point_type": "int32",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerChannelMinMaxObserver",
        "is_scale_quant": False,
        "enable_buffer_reuse": False,
        "max_input_numel": 4194304,
    }
