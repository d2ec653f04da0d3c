"""ComfyUI: one checkpoint with a format for each linear layer, which ComfyUI and others of the field read.

By its source (Comfy-Org/ComfyUI, ``comfy/ops.py``, ``comfy/quant_ops.py`` and ``comfy/utils.py`` at commit 0271a46) and
by running its kernels, comfy-kitchen 0.2.40, on a processor:

- Each quantized layer has a tensor ``<layer>.comfy_quant`` beside its weight and scales: the bytes of a JSON,
  ``{"format": ...}``. Older files hold the same in the header, as ``_quantization_metadata``, or mark all layers with
  ``scaled_fp8``. Other layers are loaded as they are.
- Codes and scales are those of comfy-kitchen's own quantizers, which `round_trip` prices; it has none for
  ``awq_w4a16``, whose codes are ours (minimum and maximum of a group). ``asym_w4a8_int8`` with codes of 6 bits is
  called ``asym_w6a8_int8`` here; the file says the first.
- Scales of ``nvfp4`` and ``mxfp8`` lie in tiles of 128 rows, which small layers pay for; formats that take a layer
  more than 16 bits a weight are not offered for it.
- Every layer asks for ``full_precision_matrix_mult``: ComfyUI then decodes the weight and multiplies in 16 bits, as
  here. Without it, it quantizes the inputs of layers, too, where the device can.
- Names are those of the model's own code where `mpqsearch.export.names` knows them, else those of diffusers. Layers
  that are one layer there have one format. All that is not quantized takes 16 bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import read_tensors
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, stored_total
from mpqsearch.errors import ArtifactError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.names import PREFIX, Place, fused, in_diffusers, joined, places_of, separated, tied
from mpqsearch.export.reading import Reading, by_name, float_note, json_at
from mpqsearch.export.target import Target, write_config
from mpqsearch.untrusted import parse_json

if TYPE_CHECKING:
    from torch import Tensor

FILE = "diffusion_model.safetensors"
KEY, MARK, LEGACY = "_quantization_metadata", "comfy_quant", "scaled_fp8"
"""The key of the header, the tensor of a layer, and the tensor of older files in which all scaled layers are FP8."""

ROTATIONS = (256, 64, 16)
"""Columns that are rotated together, by a Hadamard matrix: the first that divides a row."""

GROUP = 64
"""Columns of a group of ``awq_w4a16``; ComfyUI's default."""

MARK_BYTES = 1 << 12
"""Longest description of a layer that is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of ComfyUI: the width of its codes, the class of comfy-kitchen that decodes it, the fields of that class
    in which its tensors go, and what its quantizer takes. ``columns``: rows must be a multiple of so many."""

    width: int
    layout: str
    fields: Mapping[str, str] = field(default_factory=lambda: {"weight_scale": "scale"})
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: int = 1
    rotates: bool = False
    name: str = ""


_GROUPED = {"weight_s_rel": "scale", "weight_s_channel": "s_channel", "weight_codebook": "codebook"}

FORMATS = {
    "int8_tensorwise": Format(width=8, layout="TensorWiseINT8Layout", options={"per_channel": True}, rotates=True),
    "float8_e4m3fn": Format(width=8, layout="TensorCoreFP8Layout"),
    "mxfp8": Format(width=8, layout="TensorCoreMXFP8Layout"),
    "float8_e5m2": Format(width=8, layout="TensorCoreFP8Layout", options={"dtype": "float8_e5m2"}),
    "asym_w6a8_int8": Format(
        width=6, layout="AsymW4A8Int8Layout", fields=_GROUPED, options={"bits": 6}, columns=32, rotates=True,
        name="asym_w4a8_int8",
    ),
    "asym_w4a8_int8": Format(width=4, layout="AsymW4A8Int8Layout", fields=_GROUPED, columns=16, rotates=True),
    "nvfp4": Format(
        width=4, layout="TensorCoreNVFP4Layout", fields={"weight_scale": "block_scale", "weight_scale_2": "scale"},
    ),
    "awq_w4a16": Format(
        width=4, layout="TensorCoreAWQW4A16Layout", fields={"weight_scale": "scale", "weight_zeros": "zeros"},
        columns=GROUP,
    ),
    "convrot_w4a4": Format(width=4, layout="TensorCoreConvRotW4A4Layout", columns=64, rotates=True),
}  # fmt: skip
"""What a layer can be stored in, the least error of a width first."""


class ComfyTarget(Target):
    """``diffusion_model.safetensors``: for ComfyUI's folder ``models/diffusion_models``."""

    name = "comfyui"
    requires = "comfy-kitchen"
    imports = ("comfy_kitchen",)
    tested = "0.2.40"
    limits = "a format that takes the layer less than 16 bits a weight"
    full_bits = 16
    kept_bits = 16
    tolerance = 1e-5
    file = FILE

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Formats that fit the columns of the layer and make it smaller."""
        if layer.kind not in self.kinds:
            return ()
        fits = (Choice(name=n, width=f.width) for n, f in FORMATS.items() if layer.n_inputs % f.columns == 0)
        return tuple(c for c in fits if self.coded(layer, c).total < FULL_PRECISION * layer.n_weights)

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Codes, scales and the bytes that name the format."""
        payload, metadata = _BITS[choice.name](layer.n_channels, layer.n_inputs)
        return StoredBits(payload=payload, metadata=metadata + 8 * len(description(choice.name, layer.n_inputs)))

    def tied(self, table: LayerTable) -> list[tuple[str, ...]]:
        """Layers that are one layer in ComfyUI."""
        return tied(table)

    def promise(self, job: ExportJob, plan: Sequence[PlanEntry]) -> StoredBits:
        """As any target's; layers that are one layer in ComfyUI share what is stored once."""
        table, choices = job.table, {e.layer: e.choice for e in plan}
        bits: dict[str, StoredBits] = {}
        for group in fused(table):
            first = table[group[0]]
            shape = (sum(table[n].n_channels for n in group), *first.weight_shape[1:])
            whole = replace(first, weight_shape=shape) if len(group) > 1 else first
            bits |= dict.fromkeys(group, StoredBits())
            bits[group[0]] = self.cost(whole, self.choice_of(whole, choices[group[0]]))
        return stored_total(table, bits, self.kept_bits)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The checkpoint, ``config.json`` of the model, and the check."""
        from mpqsearch.export.check import correct_bias, save_tensors, write_check

        module = job.model.module
        formats = {e.layer: e.choice for e in plan if e.choice}
        owners: dict[str, Any] = {n: module.get_submodule(n) for n in (e.layer for e in plan)}
        weights = {f"{n}.weight": _plain(owners[n].weight) for n in formats}
        found = places_of(module)
        choices = {found[f"{n}.weight"].name: choice for n, choice in formats.items()}
        packed: dict[str, Tensor] = {}
        for name, whole in joined(weights, found).items():
            tensors = quantize(whole, choices[name])
            packed |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in tensors.items()}
        decoded = _decoded(packed, found, {key: tensor.shape for key, tensor in weights.items()})
        for name, owner in owners.items():
            value = decoded.get(f"{name}.weight", _rounded(_plain(owner.weight)))
            correct_bias(job, name, owner, value)
            owner.weight.data.copy_(value)
        rest = {key: _half(tensor) for key, tensor in module.state_dict().items() if key not in weights}
        for key, tensor in module.state_dict().items():
            tensor.copy_(rest.get(key, tensor))
        save_tensors(folder / FILE, joined(rest, found) | packed, {"mpqsearch.bit_map": job.bit_map.digest})
        return [folder / FILE, *write_config(folder, module), *write_check(folder, job, module)]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Decode every layer with comfy-kitchen, as ComfyUI's loader would, and read the formats."""
        from mpqsearch.export.check import build_model, forward_errors, put_weights

        module, tensors = build_model(folder), read_tensors(folder / FILE)
        found = places_of(module)
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        values = _decoded(tensors, found, shapes)
        formats = {}
        for key in values:
            mark = tensors.get(found[key].name.removesuffix("weight") + MARK)
            if key.endswith(".weight") and mark is not None:
                formats[key.removesuffix(".weight")] = _kind(mark, tensors[found[key].name], shapes[key])
        absent = sorted(shapes.keys() - values.keys())
        problems = [f"the file has no tensor for {key!r}, which the model holds" for key in absent]
        if not problems:
            put_weights(module, values)
        known = {place.name for place in found.values()}
        marked = (key.removesuffix(MARK) for key in tensors if key.endswith(f".{MARK}"))
        stems = tuple(stem for stem in marked if f"{stem}weight" in known)
        others = sorted(key for key in tensors if key not in known and not key.startswith(stems))
        problems += [f"the model has no place for the tensor {key!r} of the file" for key in others]
        widths = {n: FORMATS[f].width for n, f in formats.items()}
        errors = {} if absent else forward_errors(folder, module)
        return {"widths": widths, "choices": formats, "problems": problems, **errors} | self.sizes(folder)

    def weights(self, folder: Path) -> Mapping[str, Tensor]:
        """All values, decoded by comfy-kitchen, by their names in diffusers."""
        from mpqsearch.export.check import build_model

        module = build_model(folder)
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        return _decoded(read_tensors(folder / FILE), places_of(module), shapes)

    def round_trip(self, weight: Tensor, layer: LayerSpec, choice: Choice) -> Tensor:
        """What the format makes of a weight."""
        return dequantize(quantize(_plain(weight), choice.name), weight.shape)


def read(path: Path, table: LayerTable) -> Reading | None:
    """The formats of a checkpoint, of the only one that we write in a folder, or of the metadata as JSON.

    Layers may have the names of the model's own code; those of other parts in a checkpoint of a whole pipeline are
    passed over.
    """
    file = path / FILE if path.is_dir() else path
    if file.suffix == ".safetensors" and file.is_file():
        formats = _in_file(file)
    else:
        data = json_at(path, "comfyui_metadata.json")
        layers = data[KEY]["layers"] if isinstance(data, Mapping) and KEY in data else {}
        formats = {str(n): (str(v["format"]), 0) for n, v in layers.items()}
    if not formats:
        return None
    known = {*FORMATS, *(f.name for f in FORMATS.values())}
    unknown = next((n for n, (f, _) in formats.items() if f not in known), None)
    if unknown is not None:
        raise ArtifactError(
            f"{path}: the layer {unknown!r} has the format {formats[unknown][0]!r}, which is not known here"
        )
    own = {n: f for n, f in formats.items() if n.startswith(PREFIX)} or formats
    here = in_diffusers(own, table)
    kinds = {n: _by_rows(f, stored, table[n].n_inputs) if n in table.by_name else f for n, (f, stored) in here.items()}
    return by_name({n: FORMATS[f].width for n, f in kinds.items()}, float_note(kinds))


def _in_file(file: Path) -> dict[str, tuple[str, int]]:
    """Format of every quantized layer of a checkpoint, and the length of its stored rows. Raises `ArtifactError` for a
    damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            keys = set(opened.keys())
            formats = {}
            for key in (k for k in keys if k.endswith(f".{MARK}")):
                shape = opened.get_slice(key).get_shape()
                if len(shape) != 1 or shape[0] > MARK_BYTES:
                    raise ArtifactError(f"{file} is damaged: {key!r} has the shape {shape}")
                formats[key.removesuffix(f".{MARK}")] = str(_said(opened.get_tensor(key))["format"])
            if any(key.rpartition(".")[2] == LEGACY for key in keys):
                scaled = (k.removesuffix(".scale_weight") for k in keys if k.endswith(".scale_weight"))
                formats |= dict.fromkeys(scaled, "float8_e4m3fn")
            header = (opened.metadata() or {}).get(KEY)
            if header is not None:
                formats |= {str(n): str(v["format"]) for n, v in parse_json(header, str(file))["layers"].items()}
            rows = {n: opened.get_slice(f"{n}.weight").get_shape() for n in formats if f"{n}.weight" in keys}
            return {n: (f, rows[n][-1] if rows.get(n) else 0) for n, f in formats.items()}
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged: {error}") from error


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _tiled(rows: int, columns: int) -> int:
    """Bits of scales of a byte each, in tiles of 128 by 4."""
    return 8 * _up(rows, 128) * _up(columns, 4)


_BITS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "int8_tensorwise": lambda n, k: (8 * n * k, 32 * n),
    "float8_e4m3fn": lambda n, k: (8 * n * k, 32),
    "float8_e5m2": lambda n, k: (8 * n * k, 32),
    "mxfp8": lambda n, k: (8 * _up(n, 32) * _up(k, 32), _tiled(_up(n, 32), _up(k, 32) // 32)),
    "asym_w6a8_int8": lambda n, k: (6 * n * k, 8 * n * k // 16 + 32 * n),
    "asym_w4a8_int8": lambda n, k: (4 * n * k, 8 * n * k // 16 + 32 * n + 16 * 32),
    "nvfp4": lambda n, k: (4 * _up(n, 16) * _up(k, 16), _tiled(_up(n, 16), _up(k, 16) // 16) + 32),
    "awq_w4a16": lambda n, k: (4 * n * k, 2 * 16 * n * k // GROUP),
    "convrot_w4a4": lambda n, k: (4 * n * k, 32 * n),
}
"""Bits of codes, and of all else, of a layer with ``n`` rows and ``k`` columns."""


def description(choice: str, columns: int) -> bytes:
    """The ``comfy_quant`` of a layer with so many columns."""
    said = {"format": FORMATS[choice].name or choice, "full_precision_matrix_mult": True} | _settings(choice, columns)
    return json.dumps(said).encode()


def _settings(choice: str, columns: int) -> dict[str, Any]:
    """What a format says of itself beside its name: columns that are rotated together, or have one scale."""
    said: dict[str, Any] = {"group_size": GROUP} if choice == "awq_w4a16" else {}
    size = _rotated(columns) if FORMATS[choice].rotates else 0
    if size and choice == "int8_tensorwise":
        said["convrot"] = True
    return said | ({"convrot_groupsize": size} if size else {})


def _rotated(columns: int) -> int:
    """Columns that are rotated together; 0 for rows that no rotation fits."""
    return next((size for size in ROTATIONS if columns % size == 0), 0)


def quantize(weight: Tensor, choice: str) -> dict[str, Tensor]:
    """The tensors of a layer with the weight ``float32 [rows, columns]``, by the last part of their names."""
    import torch
    from comfy_kitchen.tensor import get_layout_class

    said = description(choice, weight.shape[1])
    mark = {MARK: torch.tensor(list(said), dtype=torch.uint8)}
    if choice == "awq_w4a16":
        return _grouped(weight) | mark
    options = {**FORMATS[choice].options, **_settings(choice, weight.shape[1])}
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    layout = get_layout_class(FORMATS[choice].layout)
    codes, params = layout.quantize(weight, **options)
    tensors = {f"weight{suffix}": tensor for suffix, tensor in layout.state_dict_tensors(codes, params).items()}
    if choice == "mxfp8":  # readers of the file need not know the type of its scales
        tensors["weight_scale"] = tensors["weight_scale"].view(torch.uint8)
    return tensors | mark


def _grouped(weight: Tensor) -> dict[str, Tensor]:
    """Codes from minimum and maximum of every `GROUP` columns: ``(code - 8) * scale + zero``."""
    import torch

    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
    zero = (low + 8 * scale).bfloat16()
    codes = ((groups - zero.float()) / scale.float() + 8).round().clamp(0, 15).to(torch.uint8).reshape(weight.shape)
    return {
        "weight": (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8),
        "weight_scale": scale[..., 0].t().contiguous(),
        "weight_zeros": zero[..., 0].t().contiguous(),
    }


def dequantize(tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The weight ``float32`` of the tensors of a layer, by comfy-kitchen."""
    import torch
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    choice = _kind(tensors[MARK], tensors["weight"], shape)
    said, fmt = _said(tensors[MARK]), FORMATS[choice]
    params = {to: tensors[name] for name, to in fmt.fields.items() if name in tensors}
    if choice == "mxfp8":
        params["scale"] = params["scale"].view(torch.float8_e8m0fnu)
    params |= {key: said[key] for key in ("convrot", "convrot_groupsize", "group_size") if key in said}
    layout = get_layout_class(fmt.layout)
    known = layout.Params(**params, orig_dtype=torch.float32, orig_shape=tuple(shape))
    decoded: Tensor = QuantizedTensor(tensors["weight"], fmt.layout, known).dequantize()
    return decoded.float()


def _said(mark: Any) -> dict[str, Any]:
    """What a ``comfy_quant`` tensor says. Raises `ArtifactError` for one that says no format."""
    data = parse_json(bytes(mark.tolist()).decode(errors="replace"), MARK)
    if not isinstance(data, dict) or not isinstance(data.get("format"), str):
        raise ArtifactError(f"a {MARK} tensor names no format: {str(data)[:80]}")
    return data


def _kind(mark: Any, codes: Tensor, shape: Sequence[int]) -> str:
    """The format of a layer of this shape; the grouped one says its width by the length of its rows alone."""
    name = str(_said(mark)["format"])
    return _by_rows(name, codes.shape[-1], shape[-1])


def _by_rows(name: str, stored: int, columns: int) -> str:
    return "asym_w6a8_int8" if name == "asym_w4a8_int8" and 4 * stored == 3 * columns else name


def _decoded(
    tensors: Mapping[str, Tensor], found: Mapping[str, Place], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Values of parameters with these ``shapes``, by their names in diffusers, of the tensors of a checkpoint."""
    rows = {key: shape[0] if shape else 0 for key, shape in shapes.items()}
    total: dict[str, int] = {}
    for key, n in rows.items():
        total[found[key].name] = total.get(found[key].name, 0) + n
    whole = {}
    for key, shape in shapes.items():
        name = found[key].name
        mark = name.removesuffix("weight") + MARK
        if name in whole or name not in tensors:
            continue
        if not name.endswith(".weight") or mark not in tensors:
            whole[name] = tensors[name]
            continue
        stem = name.removesuffix("weight")
        own = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
        whole[name] = dequantize(own, (total[name], *shape[1:]))
    return separated(whole, found, rows)


def _plain(tensor: Any) -> Tensor:
    out: Tensor = tensor.detach().float().cpu()
    return out


def _half(tensor: Tensor) -> Tensor:
    """In half precision; in bfloat16 where that overflows, and as they are where they are no floats."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if bool(half.isfinite().all()) else tensor.bfloat16()


def _rounded(tensor: Tensor) -> Tensor:
    return _half(tensor).float()
