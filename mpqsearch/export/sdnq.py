"""SDNQ: unsigned integers of 1 to 8 bits for linear layers and convolutions, through diffusers (``quant_method:
sdnq``).

SDNQ is GPL-3.0-only software. Nothing here imports it: diffusers does, when it is installed, from the configuration
that is written here as data. Limits, from running sdnq 0.2.8 through diffusers 0.42.1:

- It derives scales anew (minimum and maximum of a row, and of each tap of a convolution kernel), so searched ranges and
  schemes of a map are not used.
- 2 to 8 bits are packed densely; one bit takes a whole byte a weight in 0.2.8.
- Its own skip lists and size limits would change a map: the configuration switches them off, and names every layer as
  ``<layer>.weight``, since a bare name would match path segments anywhere. Groups stay off: they multiply the scales.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import atomic_path, write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits, scale_count
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, Rule, bits_of, float_note, quantization_config
from mpqsearch.export.target import CHECK, CONFIG, WEIGHTS, ConsumerTarget, int_choices, planned_widths

if TYPE_CHECKING:
    from torch import nn


class SdnqExporter(ConsumerTarget):
    """A diffusers folder: ``Model.from_pretrained(folder)`` loads it, with sdnq installed."""

    name = "sdnq"
    requires = "sdnq"
    imports = ("sdnq", "accelerate")
    kinds = ("Linear", "Conv2d")
    limits = "a multiple of 8 weights"
    tested = "0.2.8"
    tolerance = 1e-5
    notes = (
        "scales are derived anew; a scale and a zero point for each tap of a convolution",
        "one bit is stored as a byte",
    )

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """uint1 to uint8 for linear layers and 2-d convolutions."""
        fits = layer.kind in self.kinds and layer.n_weights % 8 == 0
        return int_choices(range(1, 9), "uint{}") if fits else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Dense codes (a byte at one bit), a float32 scale and zero point a row and tap."""
        code_bits = 8 if choice.width == 1 else choice.width
        return coded_bits(layer, code_bits, scales=scale_count(layer, by_tap=True), scale_bits=32, zero_bits=32)

    def read(self, path: Path) -> Reading | None:
        """``modules_dtype_dict`` of a ``quantization_config``, by the names of parameters; the rest has
        ``weights_dtype``."""
        config = quantization_config(path, "sdnq")
        if config is None:
            return None
        types = {n: t for t, names in (config.get("modules_dtype_dict") or {}).items() for n in names}
        types |= dict.fromkeys(config.get("modules_to_not_convert") or (), "none")
        kinds = self.kinds if config.get("quant_conv") else ("Linear",)
        exact = {n.removesuffix(".weight"): t for n, t in types.items() if n.endswith(".weight") and "*" not in n}
        rest = tuple(n for n in types if n.removesuffix(".weight") not in exact)
        notes = (f"patterns are not read, such as {rest[0]!r}",) if rest else ()
        return Reading(
            layers={n: bits_of(t) for n, t in exact.items()},
            rules=(Rule(width=bits_of(config.get("weights_dtype", "int8")), kinds=kinds),),
            notes=notes + float_note(exact),
        )

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Let diffusers quantize the model with the configuration, and keep what it saves."""
        import diffusers
        import torch

        from mpqsearch.export.check import write_check

        assert job.denoiser is not None
        module: Any = job.denoiser.module
        if not isinstance(module, diffusers.ModelMixin):
            raise ConfigError(
                f"the target 'sdnq' goes through diffusers; {type(module).__name__} is no diffusers model"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".sdnq.") as scratch:
            plain, packed = Path(scratch, "plain"), Path(scratch, "packed")
            module.save_pretrained(plain, safe_serialization=True)
            config = diffusers.SDNQConfig(**sdnq_config(plan)) if planned_widths(plan) else None
            quantized = (
                type(module).from_pretrained(plain, quantization_config=config, torch_dtype=torch.float32).eval()
            )
            quantized.save_pretrained(packed, safe_serialization=True, max_shard_size="1TB")
            with atomic_path(folder / WEIGHTS) as temporary:
                (packed / WEIGHTS).replace(temporary)
            write_text(
                folder / CONFIG, json.dumps(json.loads((packed / CONFIG).read_text()), indent=1, sort_keys=True) + "\n"
            )
        check = write_check(folder / CHECK, job.denoiser.with_module(quantized), job.cond)
        return [folder / WEIGHTS, folder / CONFIG, *check]

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Load the folder with diffusers and read the dtype that each layer's dequantizer has."""
        import torch

        from mpqsearch.export.check import forward_error, libraries, model_class, planned_layers, stored_size

        if module is not None:
            raise ConfigError("the target 'sdnq' is loaded by diffusers, which builds the model itself: give no module")
        module = (
            model_class(folder).from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True).eval()
        )
        planned = planned_layers(folder)
        choices = {
            name: str(layer.sdnq_dequantizer.weights_dtype)
            for name, layer in module.named_modules()
            if getattr(layer, "sdnq_dequantizer", None) is not None
        }
        widths = {n: int(choices[n].lstrip("uint")) if n in choices else FULL_PRECISION for n in {*planned, *choices}}
        return {
            "widths": widths,
            "choices": choices,
            "forward_error": forward_error(folder, module),
            "versions": libraries("sdnq", "accelerate"),
            **stored_size(folder / WEIGHTS),
        }


def sdnq_config(plan: Sequence[PlanEntry]) -> dict[str, Any]:
    """The arguments of ``diffusers.SDNQConfig``: every layer by the name of its parameter, no rules of SDNQ's own."""
    groups: dict[str, list[str]] = {}
    for entry in plan:
        if entry.choice:
            groups.setdefault(entry.choice, []).append(f"{entry.layer}.weight")
    return {
        "weights_dtype": "uint8",
        "group_size": -1,
        "quant_conv": True,
        "add_skip_keys": False,
        "minimum_allowed_numel": 0,
        "minimum_allowed_channel_size": 0,
        "modules_dtype_dict": groups,
        "modules_to_not_convert": [f"{e.layer}.weight" for e in plan if not e.choice],
    }
