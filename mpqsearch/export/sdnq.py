"""SDNQ: unsigned integers of 1 to 8 bits for linear layers and convolutions, through diffusers (``quant_method:
sdnq``).

SDNQ is GPL-3.0-only software. Nothing here imports it: diffusers does, when it is installed, from the configuration
that is written here as data. Limits, from running sdnq 0.2.8 through diffusers 0.42.1:

- It derives scales anew (minimum and maximum of a row, and of each tap of a convolution kernel), so searched ranges and
  schemes of a map are not used.
- 2 to 8 bits are packed densely; one bit takes a whole byte a weight in 0.2.8.
- At 3 bits and fewer layers are rotated by its Hadamard matrices, which take no bytes (a layer whose inputs have no
  such matrix is left as it is). Its other options cost more than they give at equal bytes: ``studies/sdnq``.
- Its own skip lists and size limits would change a map: the configuration switches them off, and names every layer as
  ``<layer>.weight``, since a bare name would match path segments anywhere. Groups stay off: they multiply the scales.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import atomic_path, temporary_prefix, write_text
from mpqsearch.core import LayerSpec, LayerTable, StoredBits, coded_bits, scale_count
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import CONFIG, WEIGHTS, Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, bits_of, float_note, pattern_of, quantization_config
from mpqsearch.export.target import Target, int_choices, planned_widths
from mpqsearch.sources import read_config

if TYPE_CHECKING:
    from torch import Tensor

WITHOUT_COMPILER = ("SDNQ_USE_TORCH_COMPILE", "0")
"""SDNQ compiles its quantizer for every shape of a weight, which takes a minute for a small model; it reads this where
it is first imported."""

ROTATED = 3
"""Widest layers that are rotated: beyond, the gain is within its error (``studies/sdnq``)."""

HADAMARD, SMALLEST = 256, 4
"""Most and fewest inputs that are rotated together; of a convolution, channels divide into such groups."""


def hadamard(n: int) -> Tensor:
    """The symmetric orthogonal matrix ``[n, n]`` by which SDNQ rotates ``n`` inputs, a power of two: a Kronecker power
    of the one of order 4 where there is one, else of that of order 2."""
    import torch

    of_two, of_four = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), 1.0 - 2.0 * torch.eye(4).fliplr()
    block = of_four if n.bit_length() % 2 else of_two
    matrix = block
    while len(matrix) < n:
        matrix = torch.kron(matrix, block)
    return matrix / math.sqrt(n)


class SdnqTarget(Target):
    """A diffusers folder: ``Model.from_pretrained(folder)`` loads it, with sdnq installed."""

    name = "sdnq"
    loading = "import sdnq\nfrom diffusers import {cls}\n\nmodel = {cls}.from_pretrained({folder!r})"
    requires = "sdnq"
    imports = ("sdnq", "accelerate")
    kinds = ("Linear", "Conv2d")
    limits = "a multiple of 8 weights"
    tested = "0.2.8"
    tolerance = 1e-5
    asks_itself = False  # `round_trip` repeats what SDNQ does, without it

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """uint1 to uint8 for linear layers and 2-d convolutions."""
        fits = layer.kind in self.kinds and layer.n_weights % 8 == 0
        return int_choices(range(1, 9), "uint{}") if fits else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Dense codes (a byte at one bit), a float32 scale and zero point a row and tap."""
        code_bits = 8 if choice.width == 1 else choice.width
        return coded_bits(layer, code_bits, scales=scale_count(layer, by_tap=True), scale_bits=32, zero_bits=32)

    def round_trip(self, weight: Tensor, layer: LayerSpec, choice: Choice) -> Tensor:
        """Minimum and maximum of a row and tap on codes of the width, in the rotated inputs at `ROTATED` bits and
        fewer."""
        import torch

        own = weight.detach().float().cpu()
        group = math.gcd(layer.weight_shape[1], HADAMARD) if choice.width <= ROTATED else 1
        turn = hadamard(group) if group >= SMALLEST else torch.eye(1)

        def turned(values: Tensor) -> Tensor:  # the matrix is symmetric, so twice is not at all
            return (values.reshape(len(own), -1, len(turn)) @ turn).reshape(own.shape)

        rotated = turned(own)
        low, high = rotated.amin(1, keepdim=True), rotated.amax(1, keepdim=True)
        scale = ((high - low) / (2**choice.width - 1)).clamp_min(torch.finfo(torch.float32).tiny)
        return turned(((rotated - low) / scale).round() * scale + low)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Let diffusers quantize the model with the configuration, and keep what it saves."""
        import diffusers
        import torch

        from mpqsearch.export.check import correct_bias, write_check

        os.environ.setdefault(*WITHOUT_COMPILER)
        module: Any = job.model.module
        if not isinstance(module, diffusers.ModelMixin):
            raise ConfigError(
                f"the target 'sdnq' goes through diffusers; {type(module).__name__} is no diffusers model"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=temporary_prefix()) as scratch:
            plain, packed = Path(scratch, "plain"), Path(scratch, "packed")
            module.save_pretrained(plain, safe_serialization=True)
            config = diffusers.SDNQConfig(**sdnq_config(plan)) if planned_widths(plan) else None
            quantized = (
                type(module).from_pretrained(plain, quantization_config=config, torch_dtype=torch.float32).eval()
            )
            for name, weight in _decoded(quantized).items():
                correct_bias(job, name, quantized.get_submodule(name), weight)
            quantized.save_pretrained(packed, safe_serialization=True, max_shard_size="1TB")
            with atomic_path(folder / WEIGHTS) as temporary:
                (packed / WEIGHTS).replace(temporary)
            write_text(folder / CONFIG, json.dumps(read_config(packed / CONFIG), indent=1, sort_keys=True) + "\n")
        return [folder / WEIGHTS, folder / CONFIG, *write_check(folder, job, quantized)]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Load the folder with diffusers and read the dtype that each layer's dequantizer has."""
        from mpqsearch.export.check import load_pretrained, loaded

        os.environ.setdefault(*WITHOUT_COMPILER)
        module = load_pretrained(folder)
        decoders = {n: getattr(m, "sdnq_dequantizer", None) for n, m in module.named_modules()}
        formats = {n: str(d.weights_dtype) for n, d in decoders.items() if d is not None}
        return loaded(folder, module, formats) | self.sizes(folder)

    def weights(self, folder: Path) -> Mapping[str, Any]:
        """What diffusers loads, every weight as its dequantizer decodes it."""
        from mpqsearch.export.check import load_pretrained, plain_weights

        os.environ.setdefault(*WITHOUT_COMPILER)
        module = load_pretrained(folder)
        return plain_weights(module, _decoded(module))


def _decoded(module: Any) -> dict[str, Any]:
    """The weights that SDNQ's layers compute with, by the name of the layer."""
    layers = ((n, m) for n, m in module.named_modules() if getattr(m, "sdnq_dequantizer", None) is not None)
    return {name: copy.deepcopy(layer).dequantize().weight for name, layer in layers}


def read(path: Path, table: LayerTable) -> Reading | None:
    """A ``quantization_config`` as SDNQ resolves it, see `layer_types`."""
    config = quantization_config(path, "sdnq")
    if config is None:
        return None
    types = layer_types(config, table, str(path))
    keys = [*_keys(config.get("modules_dtype_dict")), *(config.get("modules_quant_config") or ())]
    spelled = (n for n in keys if n.endswith(".weight") and "*" not in n and not n.startswith("."))
    names = tuple(n.removesuffix(".weight") for n in spelled)
    return Reading(widths={n: bits_of(t) for n, t in types.items()}, names=names, notes=float_note(types))


def layer_types(config: Mapping[str, Any], table: LayerTable, where: str) -> dict[str, str]:
    """Data type of every layer that SDNQ quantizes when it loads a model with this configuration.

    ``modules_to_not_convert`` come first; then the ``weights_dtype`` of the first entry of ``modules_quant_config``
    that fits, else that of the whole; then the first entry of ``modules_dtype_dict`` that fits replaces it, or raises
    it, where its key is a lower bound (``minimum_6bit``, ``uint5bits``).
    """
    skipped, special = config.get("modules_to_not_convert") or (), config.get("modules_quant_config") or {}
    dtypes = config.get("modules_dtype_dict") or {}
    types = {}
    for layer in table:
        name = f"{layer.name}.weight"
        quantized = layer.kind == "Linear" or ("Conv" in layer.kind and bool(config.get("quant_conv")))
        if not quantized or _first_fit(name, _keys(skipped), where) is not None:
            continue
        key = _first_fit(name, special, where)
        dtype = str((special[key] if key else config).get("weights_dtype") or config.get("weights_dtype", "int8"))
        entry = next((k for k, names in dtypes.items() if _first_fit(name, _keys(names), where) is not None), None)
        types[layer.name] = dtype if entry is None else _at_least(dtype, str(entry).lower())
    return types


def _first_fit(name: str, keys: Iterable[str], where: str) -> str | None:
    """The first key that fits the name of a parameter: the name itself, one of its parts, a prefix after a dot, or a
    pattern in which ``*`` is any text."""
    parts = name.split(".")
    for key in keys:
        if key.startswith("."):
            fits = name.startswith(key[1:])
        else:
            pattern = re.sub(r"\.?\*", lambda m: r"\..*" if m[0] == ".*" else ".*", key)
            fits = name == key or key in parts or ("*" in key and pattern_of(pattern, where).match(name))
        if fits:
            return key
    return None


def _keys(names: Any) -> list[str]:
    """Names in a list, in the lists of a mapping, or a single one."""
    if isinstance(names, Mapping):
        return [n for values in names.values() for n in _keys(values)]
    return [names] if isinstance(names, str) else [str(n) for n in names or ()]


def _at_least(dtype: str, key: str) -> str:
    """What a key of ``modules_dtype_dict`` makes of a type: itself, or the type raised to a lower bound."""
    bound = re.fullmatch(r"(?:minimum)?[-_]?(u?int)?(\d+)[-_]?(?:bits?)?", key)
    if bound is None or not (key.startswith("minimum") or key.endswith(("bit", "bits"))):
        return key
    return dtype if bits_of(dtype) >= int(bound[2]) else f"{bound[1] or 'int'}{bound[2]}"


def sdnq_config(plan: Sequence[PlanEntry]) -> dict[str, Any]:
    """The arguments of ``diffusers.SDNQConfig``: every layer by the name of its parameter, no rules of SDNQ's own."""
    rotated = [f"{e.layer}.weight" for e in plan if e.choice and bits_of(e.choice) <= ROTATED]
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
        "modules_quant_config": {name: {"use_hadamard": True} for name in rotated},
        "modules_to_not_convert": [f"{e.layer}.weight" for e in plan if not e.choice],
    }
