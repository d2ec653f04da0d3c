"""torchao: integers of 2 to 8 bits for linear layers, as a diffusers folder (``torchao``) or as a configuration
(``torchao-config``).

Limits, from its code (0.18.0) and from running it through diffusers 0.42.1:

- Codes are stored at 8 bits whatever their width, as ``IntxUnpackedToInt8Tensor``: memory as int8, error as planned.
- diffusers loads linear layers only; ``quantize_`` with the configuration takes two-dimensional convolutions as well.
- One bit would make every weight zero, so 2 is the narrowest.
- Names that a model does not have are ignored in silence: hence `verify`.
- ``torchao`` keeps our codes, scales and zero points (asymmetric scheme). ``torchao-config`` lets torchao derive its
  own from minimum and maximum; a convolution then has a scale for each tap of its kernel.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import atomic_path, write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits, scale_count
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, Rule, bits_of, float_note, json_at, quantization_config
from mpqsearch.export.target import CHECK, WEIGHTS, ConsumerTarget, int_choices, planned_widths, write_config

if TYPE_CHECKING:
    from torch import nn

RECIPE = "torchao_config.json"


class TorchaoExporter(ConsumerTarget):
    """A diffusers folder: ``Model.from_pretrained(folder)`` loads it. Our codes, scales and zero points."""

    name = "torchao"
    requires = "torchao"
    imports = ("torchao", "accelerate")
    kinds = ("Linear",)
    rerounds = False
    tolerance = 1e-5
    tested = "0.18.0"
    notes = ("stored at 8 bits whatever the width", "asymmetric scheme only; diffusers loads linear layers only")

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """int2 to int8 for linear layers."""
        return int_choices(range(2, 9)) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """A byte a weight, a float32 scale and an int8 zero point a row."""
        return coded_bits(layer, 8, scales=layer.n_channels, scale_bits=32, zero_bits=8)

    def read(self, path: Path) -> Reading | None:
        """The ``FqnToConfig`` in the ``quantization_config`` of a diffusers folder."""
        config = quantization_config(path, "torchao")
        if config is None:
            return None
        kind = config.get("quant_type")
        return read_config(kind.get("default", kind) if isinstance(kind, Mapping) else {"_type": str(kind)})

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Weights as diffusers names them, ``config.json`` with the quantization, and the check."""
        import torch
        from safetensors.torch import save_file
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import quantize_

        from mpqsearch.export.check import copy_of, fake_quantized, our_rows, own_tensors, write_check

        rows = our_rows(job, plan)
        module = copy_of(job)
        config = fqn_config(planned_widths(plan))
        quantize_(module, config, filter_fn=None)
        modules: dict[str, Any] = dict(module.named_modules())
        for name, ours in rows.items():
            weight = modules[name].weight
            middle = torch.exp2(ours.quantizer.bits.float() - 1)[:, None]
            weight.qdata.copy_((ours.codes.float() - middle).to(torch.int8))
            weight.scale.copy_(ours.quantizer.scale[:, None])
            weight.zero_point.copy_((ours.quantizer.zero[:, None] - middle).to(torch.int8))
        tensors, metadata = flatten_tensor_state_dict(module.state_dict())
        with atomic_path(folder / WEIGHTS) as temporary:
            save_file(own_tensors(tensors), temporary, {**metadata, "format": "pt"})
        assert job.denoiser is not None
        paths = write_config(
            folder, job.denoiser.module, {"quantization_config": diffusers_config(config)} if rows else {}
        )
        return [folder / WEIGHTS, *paths, *write_check(folder / CHECK, fake_quantized(job, rows), job.cond)]

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Load the folder with diffusers and read the dtype of every weight."""
        import torch

        from mpqsearch.export.check import forward_error, libraries, model_class, planned_layers, stored_size

        if module is not None:
            raise ConfigError(
                "the target 'torchao' is loaded by diffusers, which builds the model itself: give no module"
            )
        module = (
            model_class(folder).from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True).eval()
        )
        return {
            "widths": seen_widths(module, planned_layers(folder)),
            "forward_error": forward_error(folder, module),
            "versions": libraries("torchao", "accelerate"),
            **stored_size(folder / WEIGHTS),
        }


class TorchaoConfigExporter(ConsumerTarget):
    """``torchao_config.json``: give ``config_from_dict`` of it to ``quantize_(model, config, filter_fn=None)``."""

    name = "torchao-config"
    requires = "torchao"
    imports = ("torchao",)
    kinds = ("Linear", "Conv2d")
    tested = "0.18.0"
    limits = "convolutions with more than one input channel a group"
    payload = False
    notes = ("a configuration: torchao derives scales from the weights", "stored at 8 bits whatever the width")

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """int2 to int8; torchao 0.18 fails on a kernel of one input channel, whose every weight would have a scale of
        its own."""
        return int_choices(range(2, 9)) if layer.kind in self.kinds and layer.weight_shape[1] > 1 else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """A byte a weight, a float32 scale and an int8 zero point a row, and for convolutions each tap."""
        return coded_bits(layer, 8, scales=scale_count(layer, by_tap=True), scale_bits=32, zero_bits=8)

    def read(self, path: Path) -> Reading | None:
        """``torchao_config.json``, or any JSON that ``config_to_dict`` made."""
        data = json_at(path, RECIPE)
        return read_config(data) if isinstance(data, Mapping) and {"_type", "_data"} <= set(data) else None

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The configuration as torchao writes it, and ``config.json`` for the check."""
        from torchao.core.config import config_to_dict

        assert job.denoiser is not None
        write_text(folder / RECIPE, json.dumps(config_to_dict(fqn_config(planned_widths(plan))), indent=1) + "\n")
        return [folder / RECIPE, *write_config(folder, job.denoiser.module)]

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Quantize a new model with the configuration and read the dtype of every weight and the levels that it
        holds."""
        from torchao.core.config import config_from_dict
        from torchao.quantization import quantize_

        from mpqsearch.export.check import build_model, libraries, planned_layers

        module = module or build_model(folder)
        quantize_(module, config_from_dict(json.loads((folder / RECIPE).read_text())), filter_fn=None)
        widths = seen_widths(module, planned_layers(folder))
        modules: dict[str, Any] = dict(module.named_modules())
        problems = []
        for name, bits in widths.items():
            weight = modules[name].weight
            if bits == FULL_PRECISION:
                continue
            found = int(weight.qdata.max()) - int(weight.qdata.min()) + 1
            if found > 2**bits:
                problems.append(f"{name} holds codes over a range of {found}, more than {bits} bits have")
        return {"widths": widths, "problems": problems, "versions": libraries("torchao")}


def read_config(data: Mapping[str, Any]) -> Reading:
    """The widths in a configuration as torchao writes it: exact names, then ``re:`` expressions, then ``_default``, for
    linear layers."""
    if "fqn_to_config" not in data.get("_data", {}):
        return Reading(
            rules=(Rule(width=_config_bits(data), kinds=("Linear",)),), notes=float_note({"all": data["_type"]})
        )
    entries = {n.removesuffix(".weight"): c for n, c in data["_data"]["fqn_to_config"].items()}
    bits = {n: _config_bits(c) for n, c in entries.items()}
    rules = [
        Rule(width=b, pattern=rf"^(?:{n[3:]})$", kinds=("Linear",) if "weight" not in n else ())
        for n, b in bits.items()
        if n.startswith("re:")
    ]
    rules += [Rule(width=bits["_default"], kinds=("Linear",))] if "_default" in bits else []
    return Reading(
        layers={n: b for n, b in bits.items() if n != "_default" and not n.startswith("re:")},
        rules=tuple(rules),
        notes=float_note({n: (c or {}).get("_type", "") for n, c in entries.items()}),
    )


def _config_bits(config: Mapping[str, Any] | None) -> int:
    """Width of one torchao configuration: of its ``weight_dtype``, else in its name."""
    if config is None:
        return FULL_PRECISION
    dtype = (config.get("_data") or {}).get("weight_dtype")
    if isinstance(dtype, Mapping):
        return bits_of(dtype["_data"])
    found = re.search(r"(\d+)_?(?:weight|wo\b)", str(config["_type"]), re.IGNORECASE)
    if found is None:
        raise ArtifactError(f"the torchao configuration {config['_type']!r} names no width")
    return int(found[1])


def fqn_config(widths: dict[str, int]) -> Any:
    """torchao's configuration for these widths: one entry per weight layer, zero points as integers."""
    import torch
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.quant_primitives import MappingType

    entries = OrderedDict(
        (
            name,
            IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0), mapping_type=MappingType.ASYMMETRIC
            ),
        )
        for name, bits in widths.items()
    )
    return FqnToConfig(entries)


def diffusers_config(config: Any) -> dict[str, Any]:
    """The ``quantization_config`` of a diffusers ``config.json``."""
    from diffusers import TorchAoConfig

    data: dict[str, Any] = TorchAoConfig(config).to_dict()
    return data


def seen_widths(module: Any, planned: Sequence[str]) -> dict[str, int]:
    """Bits of every weight as torchao holds it; 16 for planned layers that are not quantized."""
    found = {}
    for name, layer in module.named_modules():
        dtype = getattr(getattr(layer, "weight", None), "target_dtype", None)
        if dtype is not None:
            found[name] = int(str(dtype).removeprefix("torch.int"))
        elif name in planned:
            found[name] = FULL_PRECISION
    return found
