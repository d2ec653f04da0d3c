"""compressed-tensors: packed integers of 2 to 8 bits for linear layers, the format that vLLM, SGLang and llm-compressor
load.

Limits, from running compressed-tensors 0.20.0:

- Our codes, scales and zero points are kept (asymmetric scheme, a scale a row). Codes are dense at every width.
- One bit makes every weight zero, so 2 is the narrowest. Convolution targets are matched and then skipped without a
  word, so they are listed as ignored and stay at full precision.
- Layers are named exactly; each width is one group of the configuration. diffusers has no loader for this format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import atomic_path
from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, Rule, float_note
from mpqsearch.export.reading import quantization_config as config_of
from mpqsearch.export.target import CHECK, CONFIG, ConsumerTarget, int_choices, write_config

if TYPE_CHECKING:
    from torch import nn

FILE = "model.safetensors"


class CompressedTensorsExporter(ConsumerTarget):
    """``model.safetensors`` and ``config.json`` with a ``quantization_config``; `load` shows how the library fills a
    module from them."""

    name = "compressed-tensors"
    requires = "compressed-tensors"
    imports = ("compressed_tensors",)
    kinds = ("Linear",)
    tested = "0.20.0"
    rerounds = False
    tolerance = 1e-5
    notes = ("our codes, densely packed", "asymmetric scheme, linear layers only; no diffusers loader")

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """int2 to int8 for linear layers."""
        return int_choices(range(2, 9)) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Rows of whole 32-bit words, a float32 scale a row, packed zero points, and the shape as two int64."""
        words = -(-layer.weights_per_channel * choice.width // 32)
        padding = layer.n_channels * (32 * words - layer.weights_per_channel * choice.width)
        zeros = 32 * -(-layer.n_channels * choice.width // 32)
        return coded_bits(layer, choice.width, scales=layer.n_channels, scale_bits=32, other=padding + zeros + 128)

    def read(self, path: Path) -> Reading | None:
        """``config_groups`` of a ``quantization_config``: ignored layers first, then exact names, expressions (``re:``)
        and classes."""
        config = config_of(path, "compressed-tensors")
        if config is None:
            return None
        said = [(t, FULL_PRECISION) for t in config.get("ignore") or ()]
        types: dict[str, str] = {}
        for group in (config.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            said += [(t, int(weights.get("num_bits", FULL_PRECISION))) for t in group["targets"]]
            types |= {t: f"{weights.get('type', 'int')}{weights.get('num_bits', '')}" for t in group["targets"]}
        exact = {t: w for t, w in reversed(said) if "." in t and not t.startswith("re:")}
        rules = [Rule(width=w, pattern=f"^(?:{t[3:]})", kinds=self.kinds) for t, w in said if t.startswith("re:")]
        names = [
            (t, w) for t, w in said if "." not in t and not t.startswith("re:")
        ]  # a class, or a layer at the top of the model
        rules += [Rule(width=w, pattern=f"^{re.escape(t)}$", kinds=self.kinds) for t, w in names]
        rules += [Rule(width=w, kinds=(t,)) for t, w in names if t in self.kinds]
        return Reading(layers=exact, rules=tuple(rules), notes=float_note(types))

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Fill the library's own parameters with our scales, let it pack, and write what it holds."""
        import torch
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from safetensors.torch import save_file

        from mpqsearch.export.check import fake_quantized, our_rows, own_tensors, write_check

        assert job.denoiser is not None
        rows = our_rows(job, plan)
        expected = fake_quantized(job, rows)
        paths = write_check(folder / CHECK, expected, job.cond)
        settings = quantization_config(plan)
        module: Any = expected.module
        if rows:
            config = QuantizationConfig.model_validate(settings)
            apply_quantization_config(module, config)
            modules: dict[str, Any] = dict(module.named_modules())
            for name, ours in rows.items():
                middle = torch.exp2(ours.quantizer.bits.float() - 1)
                modules[name].weight_scale.data.copy_(ours.quantizer.scale[:, None])
                modules[name].weight_zero_point.data.copy_((ours.quantizer.zero - middle)[:, None].to(torch.int8))
            ModelCompressor(config).compress_model(module)
        with atomic_path(folder / FILE) as temporary:
            save_file(
                own_tensors(module.state_dict()), temporary, {"format": "pt", "mpqsearch.bit_map": job.bit_map.digest}
            )
        extra = {"quantization_config": settings} if rows else {}
        return [folder / FILE, *write_config(folder, job.denoiser.module, extra), *paths]

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Fill a model with the library and read the width of each layer's scheme and codes."""
        from mpqsearch.export.check import (
            build_model,
            forward_error,
            libraries,
            most_levels,
            planned_layers,
            stored_size,
        )

        loaded = load(folder, module or build_model(folder))
        widths = dict.fromkeys(planned_layers(folder), FULL_PRECISION)
        problems = []
        for name, layer in loaded.named_modules():
            scheme = getattr(layer, "quantization_scheme", None)
            if scheme is None or scheme.weights is None or not hasattr(layer, "weight_scale"):
                continue
            widths[name] = int(scheme.weights.num_bits)
            if most_levels(layer.weight) > 2 ** widths[name]:
                problems.append(f"{name} holds more than {2 ** widths[name]} levels in a row")
        return {
            "widths": widths,
            "problems": problems,
            "forward_error": forward_error(folder, loaded),
            "versions": libraries("compressed-tensors"),
            **stored_size(folder / FILE),
        }


def load(folder: Path, module: nn.Module) -> Any:
    """Fill ``module`` (of the exported class) from the folder and decode its weights."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file

    settings = json.loads((folder / CONFIG).read_text()).get("quantization_config")
    if settings is None:
        module.load_state_dict(load_file(folder / FILE), strict=True)
        return module
    config = QuantizationConfig.model_validate(settings)
    compressor = ModelCompressor(config)
    apply_quantization_config(module, config)
    compressor.compress_model(module)
    module.load_state_dict(load_file(folder / FILE), strict=True)
    compressor.decompress_model(module)
    return module


def quantization_config(plan: Sequence[PlanEntry]) -> dict[str, Any]:
    """The ``quantization_config``: one group a width with exact names; everything else is ignored by name."""
    groups: dict[str, dict[str, Any]] = {}
    for entry in plan:
        if entry.choice:
            weights = {
                "num_bits": entry.will_get,
                "type": "int",
                "symmetric": False,
                "strategy": "channel",
                "dynamic": False,
            }
            group = groups.setdefault(f"group_{entry.will_get}b", {"targets": [], "weights": weights})
            group["targets"].append(entry.layer)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [e.layer for e in plan if not e.choice],
    }
