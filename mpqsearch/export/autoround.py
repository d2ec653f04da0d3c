"""AutoRound: linear layers of 2 to 8 bits in the GPTQ-like layout that ``diffusers`` (``quant_method: auto-round``)
loads.

Limits, from its code (auto-round 0.16.1) and from running it through diffusers 0.42.1:

- Our codes, scales and zero points are kept (asymmetric scheme, a scale a row). It runs in half precision, so
  everything else is stored so too: load it with ``torch_dtype=torch.float16``. Decoded weights are rounded to half
  precision.
- Both sides of a layer must be multiples of 32. Convolutions stay at full precision.
- Codes are a dense bit stream along the inputs, zero points one along the outputs, both in 32-bit words.
- Layers are named one by one; those at full precision have 16 bits in ``extra_config``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.core.packing import pack_bits
from mpqsearch.errors import NumericsError
from mpqsearch.export.contract import WEIGHTS, Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, float_note, number_of_bits, pattern_of
from mpqsearch.export.reading import quantization_config as config_of
from mpqsearch.export.target import Target, int_choices, write_config

if TYPE_CHECKING:
    from mpqsearch.quant import QuantizedRows


class AutoRoundTarget(Target):
    """A diffusers folder: ``Model.from_pretrained(folder)`` loads it, with auto-round installed."""

    name = "autoround"
    requires = "auto-round"
    imports = ("auto_round", "accelerate")
    tested = "0.16.1"
    limits = "input and output counts that are multiples of 32"
    rerounds = False
    full_bits = 16
    kept_bits = 16
    tolerance = 2e-3  # decoded weights are rounded to half precision

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """2 to 8 bits for linear layers whose sides are multiples of 32."""
        fits = layer.kind in self.kinds and all(size % 32 == 0 for size in layer.weight_shape)
        return int_choices(range(2, 9)) if fits else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Dense codes, a half-precision scale and a packed zero point a row."""
        return coded_bits(layer, choice.width, scales=layer.n_channels, scale_bits=16, zero_bits=choice.width)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Packed weights as diffusers names them, ``config.json`` with the quantization, and the check."""
        from mpqsearch.export.check import decode_in_place, our_rows, save_tensors, write_check

        rows = our_rows(job, plan)
        expected = decode_in_place(job, rows)
        state: dict[str, Any] = {}
        for key, tensor in expected.state_dict().items():
            name = key.removesuffix(".weight")
            if key.endswith(".weight") and name in rows:
                state |= {f"{name}.{part}": words for part, words in packed(rows[name]).items()}
            else:
                state[key] = half(key, tensor)
                tensor.copy_(state[key])
        save_tensors(folder / WEIGHTS, state, {"mpqsearch.bit_map": job.bit_map.digest})
        extra = {"quantization_config": quantization_config(plan)} if rows else {}
        paths = write_config(folder, job.model.module, extra)
        return [folder / WEIGHTS, *paths, *write_check(folder, job, expected)]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Load the folder with diffusers and read the bits of every layer that AutoRound put in."""
        import torch

        from mpqsearch.export.check import load_pretrained, loaded

        module = load_pretrained(folder, torch.float16)
        for parameter in module.parameters():  # compare in single precision, so that only decoding differs
            parameter.data = parameter.data.float()
        for layer in module.modules():
            if getattr(layer, "bias", None) is not None and hasattr(layer, "qweight"):
                layer.bias = layer.bias.float()
        layers = ((n, m) for n, m in module.named_modules() if hasattr(m, "qweight") and hasattr(m, "bits"))
        return loaded(folder, module, {n: f"int{m.bits}" for n, m in layers}) | self.sizes(folder)


def read(path: Path, table: LayerTable) -> Reading | None:
    """A ``quantization_config`` as AutoRound resolves it, see `layer_bits`."""
    config = config_of(path, "auto-round")
    if config is None:
        return None
    extra = config.get("extra_config") or {}
    plain = tuple(n for n, v in extra.items() if re.fullmatch(r"[\w.]+", n) and v.get("bits") != FULL_PRECISION)
    return Reading(
        widths=layer_bits(config, table, str(path)),
        names=tuple(n for n in plain if not any(pattern_of(n, str(path)).search(layer.name) for layer in table)),
        notes=float_note({n: v.get("data_type", "int") for n, v in extra.items()}),
    )


def layer_bits(config: Mapping[str, Any], table: LayerTable, where: str) -> dict[str, int]:
    """Width of every linear layer, as ``auto_round.inference.convert_model.get_layer_config`` has it.

    Only layers inside the blocks of ``block_name_to_quantize`` (default: all numbered lists of modules) have ``bits``;
    ``modules_in_block_to_quantize`` and ``modules_to_not_convert`` take some of them out; ``extra_config`` speaks of
    any layer, by its name or else by an expression.
    """
    layers = [layer.name for layer in table if layer.kind == "Linear"]
    inside = [n for n in layers if any(n.startswith(block) for block in _blocks(config, table))]
    base = number_of_bits(config.get("bits", 4))
    extra = {n: number_of_bits((v or {}).get("bits", base)) for n, v in (config.get("extra_config") or {}).items()}
    named = {n: b for n, b in extra.items() if n in layers}
    chosen = [pattern_of(p, where) for p in _flat(config.get("modules_in_block_to_quantize"))]
    if chosen:
        named |= {n: FULL_PRECISION for n in inside if not any(p.search(n) for p in chosen)}
    skipped = [pattern_of(p, where) for p in _flat(config.get("modules_to_not_convert"))]
    named |= {n: FULL_PRECISION for n in inside if any(p.search(n) for p in skipped)}
    for text, bits in extra.items():
        if text in layers:
            continue
        pattern = pattern_of(text, where)
        matched = [n for n in inside if pattern.search(n)] or [n for n in layers if pattern.search(n)]
        named = {**dict.fromkeys(matched, bits), **named}
    return {**dict.fromkeys(inside, base), **named}


def _blocks(config: Mapping[str, Any], table: LayerTable) -> list[str]:
    """Prefixes of the names of layers that are quantized."""
    blocks = config.get("quant_block_list") or config.get("block_name_to_quantize")
    blocks = blocks or config.get("to_quant_block_names")
    if isinstance(blocks, str):
        return blocks.split(",")
    if blocks:
        return list(_flat(blocks))
    lists = (re.match(r"(.*?)\.\d+\.", layer.name) for layer in table)
    return sorted({match[1] for match in lists if match})


def _flat(values: Any) -> Iterator[str]:
    """The texts in nested lists."""
    if isinstance(values, str):
        yield values
    else:
        for value in values or ():
            yield from _flat(value)


def packed(rows: QuantizedRows) -> dict[str, Any]:
    """``qweight`` int32 ``[inputs * b / 32, outputs]``, ``qzeros`` int32 ``[1, outputs * b / 32]``, ``scales`` float16
    ``[1, outputs]``."""
    import torch

    bits = int(rows.quantizer.bits[0])
    codes = rows.codes.numpy()
    words = pack_bits(codes, bits).reshape(len(codes), -1).view("<i4")
    zeros = pack_bits(rows.quantizer.zero.numpy().astype(np.uint8), bits).view("<i4")
    return {
        "qweight": torch.from_numpy(_native(words.T)),
        "qzeros": torch.from_numpy(_native(zeros[None])),
        "scales": rows.quantizer.scale.half()[None].contiguous(),
    }


def quantization_config(plan: Sequence[PlanEntry]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``: every layer by its name."""
    common = {"group_size": -1, "sym": False, "data_type": "int"}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "bits": 4,
        **common,
        "extra_config": {e.layer: {"bits": e.will_get, **common} for e in plan},
    }


def half(key: str, tensor: Any) -> Any:
    """A parameter in half precision. Raises `NumericsError` when it does not fit."""
    import torch

    if not tensor.is_floating_point():
        return tensor
    small = tensor.half()
    if not bool(torch.isfinite(small).all()):
        raise NumericsError(f"{key!r} has values beyond half precision (65504), in which AutoRound runs")
    return small


def _native(words: NDArray[Any]) -> NDArray[np.int32]:
    return np.ascontiguousarray(words, dtype=np.int32)
