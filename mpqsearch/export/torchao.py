"""torchao: integers of 2 to 8 bits for linear layers, as a diffusers folder.

Limits, from its code (0.18.0) and from running it through diffusers 0.42.1:

- Codes are stored at 8 bits whatever their width, as ``IntxUnpackedToInt8Tensor``: memory as int8, error as planned.
- diffusers loads linear layers only.
- One bit would make every weight zero, so 2 is the narrowest.
- Names that a model does not have are ignored in silence: hence `verify`.
- Our codes, scales and zero points are kept (asymmetric scheme).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.errors import ArtifactError
from mpqsearch.export.contract import WEIGHTS, Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, bits_of, float_note, json_at, pattern_of, quantization_config
from mpqsearch.export.target import Target, int_choices, planned_widths, write_config


class TorchaoTarget(Target):
    """A diffusers folder: ``Model.from_pretrained(folder)`` loads it. Our codes, scales and zero points."""

    name = "torchao"
    loading = "from diffusers import {cls}\n\nmodel = {cls}.from_pretrained({folder!r})"
    requires = "torchao"
    imports = ("torchao", "accelerate")
    rerounds = False
    tolerance = 1e-5
    tested = "0.18.0"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """int2 to int8 for linear layers."""
        return int_choices(range(2, 9)) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """A byte a weight, a float32 scale and an int8 zero point a row."""
        return coded_bits(layer, 8, scales=layer.n_channels, scale_bits=32, zero_bits=8)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Weights as diffusers names them, ``config.json`` with the quantization, and the check."""
        import copy

        import torch
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import quantize_

        from mpqsearch.export.check import decode_in_place, our_rows, save_tensors, write_check

        rows = our_rows(job, plan)
        expected = decode_in_place(job, rows)
        module = copy.deepcopy(expected)
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
        save_tensors(folder / WEIGHTS, tensors, metadata)
        paths = write_config(
            folder, job.model.module, {"quantization_config": diffusers_config(config)} if rows else {}
        )
        return [folder / WEIGHTS, *paths, *write_check(folder, job, expected)]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Load the folder with diffusers and read the dtype of every weight."""
        from mpqsearch.export.check import load_pretrained, loaded

        module = load_pretrained(folder)
        types = {n: getattr(getattr(m, "weight", None), "target_dtype", None) for n, m in module.named_modules()}
        formats = {n: str(t).removeprefix("torch.") for n, t in types.items() if t is not None}
        return loaded(folder, module, formats) | self.sizes(folder)

    def weights(self, folder: Path) -> Mapping[str, Any]:
        """What diffusers loads, every weight as torchao decodes it."""
        from mpqsearch.export.check import load_pretrained, plain_weights

        module = load_pretrained(folder)
        layers: Any = ((n, getattr(m, "weight", None)) for n, m in module.named_modules())
        return plain_weights(module, {n: w.dequantize() for n, w in layers if hasattr(w, "target_dtype")})


def read(path: Path, table: LayerTable) -> Reading | None:
    """The ``quantization_config`` of a diffusers folder as diffusers applies it, or a JSON that torchao's
    ``config_to_dict`` made, as ``quantize_`` does."""
    config = quantization_config(path, "torchao")
    if config is not None:
        kind = config.get("quant_type")
        data = kind.get("default", kind) if isinstance(kind, Mapping) else {"_type": str(kind)}
        skipped = [str(n) for n in config.get("modules_to_not_convert") or ()]
        return _reading(data, table, str(path), kinds=("Linear",), skipped=skipped)
    data = json_at(path, "torchao_config.json")
    if not isinstance(data, Mapping) or not {"_type", "_data"} <= set(data):
        return None
    return _reading(data, table, str(path), kinds=("Linear", "Conv1d", "Conv2d", "Conv3d"))


def _reading(
    data: Mapping[str, Any], table: LayerTable, where: str, *, kinds: Sequence[str], skipped: Sequence[str] = ()
) -> Reading:
    """The widths of a configuration: that of the exact name of a parameter or module, else of the first ``re:`` that
    fits the whole name, else ``_default``, which is for linear layers.

    ``skipped`` are the ``modules_to_not_convert`` of diffusers: parts of names, up to a dot.
    """
    entries = data.get("_data", {}).get("fqn_to_config") if isinstance(data.get("_data", {}), Mapping) else None
    entries = {"_default": data} if entries is None else entries
    bits = {n: _config_bits(c) for n, c in entries.items()}
    patterns = {n: pattern_of(n[3:], where) for n in entries if n.startswith("re:")}
    widths = {}
    for layer in table:
        names = (f"{layer.name}.weight", layer.name)
        if layer.kind not in kinds or any(f"{part}." in names[0] or part == names[0] for part in skipped):
            continue
        exact = [n for n in names if n in bits]
        fitting = [n for name in names for n, p in patterns.items() if p.fullmatch(name)]
        default = ["_default"] if "_default" in bits and layer.kind == "Linear" else []
        key = next(iter([*exact, *fitting, *default]), None)
        widths[layer.name] = FULL_PRECISION if key is None else bits[key]
    spelled = (n for n, b in bits.items() if n != "_default" and n not in patterns and b != FULL_PRECISION)
    return Reading(
        widths=widths,
        names=tuple(n.removesuffix(".weight") for n in spelled),
        notes=float_note({n: (c or {}).get("_type", "") for n, c in entries.items()}),
    )


def _config_bits(config: Mapping[str, Any] | None) -> int:
    """Width of one torchao configuration: of its ``weight_dtype``, else in its name."""
    if config is None:
        return FULL_PRECISION
    dtype = (config.get("_data") or {}).get("weight_dtype")
    if isinstance(dtype, Mapping):
        return bits_of(dtype["_data"])
    number = re.search(r"(\d+)_?(?:weight|wo\b)", str(config["_type"]), re.IGNORECASE)
    if number is None:
        raise ArtifactError(f"the torchao configuration {config['_type']!r} names no width")
    return int(number[1])


def fqn_config(widths: dict[str, int]) -> Any:
    """torchao's configuration for these widths: one entry per weight layer, zero points as integers."""
    import torch
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.quant_primitives import MappingType

    def config(bits: int) -> IntxWeightOnlyConfig:
        return IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0), mapping_type=MappingType.ASYMMETRIC
        )

    return FqnToConfig(OrderedDict((name, config(bits)) for name, bits in widths.items()))


def diffusers_config(config: Any) -> dict[str, Any]:
    """The ``quantization_config`` of a diffusers ``config.json``."""
    from diffusers import TorchAoConfig

    data: dict[str, Any] = TorchAoConfig(config).to_dict()
    return data
