"""MLX: linear layers of 1, 2, 3, 4, 5, 6 or 8 bits as packed weights, in the layout of ``mlx.nn.QuantizedLinear``.

Limits, from running mlx 0.32.4 on a processor without Apple's GPU:

- Our codes are kept, in either scheme: MLX decodes ``scale * code + bias``, so a zero of ``(2**bits - 1) / 2`` is no
  obstacle.
- MLX has groups of 32, 64 or 128 inputs. The largest that divides a row is used and the row's scale repeated, so rows
  must be multiples of 32. There are no 7 bits, and no packed convolutions.
- The model itself must exist in MLX; names are those of the model here. Width by layer is in ``config.json`` under
  ``quantization``, as mlx-lm has it. The check fills a tree of ``QuantizedLinear`` layers and runs each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, coded_bits, scale_count
from mpqsearch.core.packing import pack_bits
from mpqsearch.export.contract import CHECK, CONFIG, Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, json_at, number_of_bits
from mpqsearch.export.target import Target, int_choices, write_config
from mpqsearch.untrusted import read_json

FILE = "model.safetensors"


class MlxTarget(Target):
    """``model.safetensors`` and ``config.json``: ``nn.quantize(model, class_predicate=...)``, then
    ``model.load_weights``."""

    name = "mlx"
    requires = "mlx"
    imports = ("mlx",)
    tested = "0.32.4"
    get = "pip install 'mlx[cpu]'"
    limits = "rows of a multiple of 32 weights"
    rerounds = False
    file = FILE
    tolerance = 1e-4  # layers of a few hundred inputs, summed in another order

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """1 to 6 and 8 bits for linear layers with rows of a multiple of 32."""
        fits = layer.kind in self.kinds and layer.weights_per_channel % 32 == 0
        return int_choices((1, 2, 3, 4, 5, 6, 8)) if fits else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Dense codes, a float32 scale and bias a group."""
        groups = scale_count(layer, group_size(layer.weights_per_channel))
        return coded_bits(layer, choice.width, scales=groups, scale_bits=32, zero_bits=32)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Packed weights, ``config.json``, and inputs and outputs of every quantized layer for the check."""
        import torch

        from mpqsearch.export.check import decode_in_place, our_rows, save_tensors

        smoothed = [e.layer for e in plan if e.choice and job.bit_map.format_of(e.layer).smooth]
        rows = our_rows(job, plan, asymmetric=bool(smoothed))
        state = dict(decode_in_place(job, rows).state_dict())
        check: dict[str, Any] = {}
        settings: dict[str, Any] = {"group_size": 64, "bits": 4}
        generator = torch.Generator().manual_seed(0)
        for name, ours in rows.items():
            fan_in = job.table[name].weights_per_channel
            group = group_size(fan_in)
            bits = int(ours.quantizer.bits[0])
            words = pack_bits(ours.codes.numpy(), bits).reshape(len(ours.codes), -1).view("<u4")
            scale = ours.quantizer.scale[:, None].expand(-1, fan_in // group).contiguous()
            state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(words, dtype=np.uint32))
            state[f"{name}.scales"] = scale
            state[f"{name}.biases"] = -scale * ours.quantizer.zero[:, None]
            settings[name] = {"group_size": group, "bits": bits}
            x = torch.randn(4, fan_in, generator=generator)
            check |= {f"x.{name}": x, f"y.{name}": x @ ours.rows().T}
        settings |= {e.layer: False for e in plan if not e.choice}
        save_tensors(folder / FILE, state, {"format": "mlx", "mpqsearch.bit_map": job.bit_map.digest})
        save_tensors(folder / CHECK, check)
        return [folder / FILE, folder / CHECK, *write_config(folder, job.model.module, {"quantization": settings})]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Fill MLX layers from the files, read their bits, and run each on the inputs of the check."""
        import mlx.core as mx
        import mlx.nn
        from safetensors.numpy import load_file

        settings = read_json(folder / CONFIG)["quantization"]
        weights, check = mx.load(str(folder / FILE)), load_file(folder / CHECK)
        widths = {}
        worst = 0.0
        for name, values in settings.items():
            if not isinstance(values, dict):
                continue
            x, y = check[f"x.{name}"], check[f"y.{name}"]
            layer = mlx.nn.Linear(x.shape[1], y.shape[1], bias=False).to_quantized(**values)
            layer.load_weights(
                [(part, weights[f"{name}.{part}"]) for part in ("weight", "scales", "biases")], strict=True
            )
            widths[name] = int(layer.bits)
            seen = np.array(layer(mx.array(x)))
            worst = max(worst, float(np.abs(seen - y).max() / np.abs(y).max()))
        return {"widths": widths, "forward_error": worst, **self.sizes(folder)}


def read(path: Path, table: LayerTable) -> Reading | None:
    """``quantization`` of ``config.json`` as mlx-lm has it: settings or false by name, else ``bits`` for linear
    layers whose rows the group size divides."""
    data = json_at(path, CONFIG)
    settings = data.get("quantization") if isinstance(data, Mapping) else None
    if not isinstance(settings, Mapping) or not {"group_size", "bits"} <= set(settings):
        return None
    base, group = number_of_bits(settings["bits"]), int(settings["group_size"])
    named = {n: v for n, v in settings.items() if isinstance(v, Mapping) or v is False or v is True}
    widths = {}
    for layer in table:
        setting = named.get(layer.name, layer.kind == "Linear" and layer.weights_per_channel % group == 0)
        bits = number_of_bits(setting.get("bits", base)) if isinstance(setting, Mapping) else base
        widths[layer.name] = bits if setting is not False else FULL_PRECISION
    return Reading(widths=widths, names=tuple(n for n, v in named.items() if v is not False))


def group_size(fan_in: int) -> int:
    """The largest group of MLX that divides a row."""
    return next(g for g in (128, 64, 32) if fan_in % g == 0)
