"""Our own packed checkpoint: codes of 1 to 8 bits densely packed by channel, and back into a diffusers model, bit for
bit.

``packed.safetensors`` holds, for every quantized layer, its codes as bit streams (one for each width, rows of that
width in order), the half-precision scales with one exponent a layer, zero points, widths, smoothing factors and rows at
full precision; every other tensor of the model is stored as it is. ``packed.json`` names the model, the map's digest
and the SHA-256 of every layer's tensors; the map is beside it in ``bitmap.json``. Layers are written and read one after
another, so that no more than one of them is in memory beside the model.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.artifacts import atomic_write, read_json, save_bit_map, write_json
from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable
from mpqsearch.core.packing import pack_bits, packed_size, unpack_bits
from mpqsearch.errors import ArtifactError, ConfigError, LayerMismatchError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpqsearch.quant import QuantizedRows

FILE, HEADER, MAP = "packed.safetensors", "packed.json", "bitmap.json"
_SCHEMA = "mpqsearch/packed"
_TYPES = {
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "bool": "BOOL",
}
_TYPES |= {"bfloat16": "BF16", "float64": "F64"}

Arrays = dict[str, NDArray[Any]]

BLOCK = 1 << 18
"""Weights that are decoded at a time: their temporaries stay in the cache."""


def pack_layer(rows: QuantizedRows) -> Arrays:
    """The arrays that hold one layer: see `unpack_layer`, its inverse."""
    bits = rows.quantizer.bits.numpy()
    codes, scale, zero = rows.codes.numpy(), rows.quantizer.scale.numpy(), rows.quantizer.zero.numpy()
    exponent = 2.0 ** (np.floor(np.log2(scale.max())) - 15) if len(scale) else 1.0
    half = (scale / np.float32(exponent)).astype(np.float16)
    if not np.array_equal(half.astype(np.float32) * np.float32(exponent), scale):
        half, exponent = scale, 1.0  # rows that kept a scale of another origin: single precision, still exact
    arrays: Arrays = {
        "bits": bits.astype(np.uint8),
        "scale": half,
        "exponent": np.array([exponent], dtype=np.float32),
        "zero": np.rint(2 * zero).astype(np.int16),  # symmetric zeros are halves
    }
    for width in np.unique(bits[bits != FULL_PRECISION]):
        arrays[f"codes.{int(width)}"] = pack_bits(codes[bits == width], int(width))
    if rows.factor is not None:
        arrays["factor"] = rows.factor.numpy()
    if rows.full_rows is not None:
        arrays["full_rows"] = rows.full_rows.numpy()
    return arrays


def unpack_layer(arrays: Mapping[str, NDArray[Any]], layer: LayerSpec) -> Tensor:
    """The weight rows ``float32 [channels, fan-in]`` that the fake-quantized forward uses, from the arrays of
    `pack_layer`.

    Raises `ConfigError` when an array has another length than the layer needs.
    """
    import torch

    bits = arrays["bits"]
    n, fan_in = layer.n_channels, layer.weights_per_channel
    if bits.shape != (n,) or arrays["scale"].shape != (n,) or arrays["zero"].shape != (n,):
        raise ConfigError(f"{n} widths, scales and zero points are needed, got {bits.shape}")
    scale = torch.from_numpy(arrays["scale"].astype(np.float32) * arrays["exponent"][0])
    zero = torch.from_numpy(arrays["zero"].astype(np.float32) / 2)
    out = torch.empty(n, fan_in)
    step = max(1, BLOCK // fan_in)
    for width in np.unique(bits[bits != FULL_PRECISION]):
        rows = torch.from_numpy(np.flatnonzero(bits == width))
        codes = torch.from_numpy(unpack_bits(arrays[f"codes.{int(width)}"], int(width), len(rows) * fan_in)).view(
            -1, fan_in
        )
        for start in range(0, len(rows), step):  # what `mpqsearch.quant.decode` does, in blocks that stay in the cache
            part = rows[start : start + step]
            block = codes[start : start + step].float()
            out[part] = block.sub_(zero[part, None]).mul_(scale[part, None])
    if "factor" in arrays:
        out /= torch.from_numpy(arrays["factor"]).repeat_interleave(n // len(arrays["factor"]), dim=0)
    if "full_rows" in arrays:
        out[torch.from_numpy(bits == FULL_PRECISION)] = torch.from_numpy(arrays["full_rows"])
    return out


def save_quantized(
    folder: Path,
    module: nn.Module,
    table: LayerTable,
    bit_map: BitMap,
    *,
    input_max: Mapping[str, Any] | None = None,
    moments: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> list[Path]:
    """Quantize ``module`` layer by layer and write the packed checkpoint; a reader sees all of it or none.

    ``input_max`` is needed by smoothed formats, ``moments`` by GPTQ rounding.
    Raises `LayerMismatchError` when the map is for another model, `ConfigError` for a
    module without a diffusers configuration.
    """
    import torch

    from mpqsearch.quant import quantize_weight
    from mpqsearch.quant.apply import check_moments, moment_of

    bit_map.validate(table)
    check_moments(bit_map, moments)
    to_text = getattr(module, "to_json_string", None)
    if to_text is None:
        raise ConfigError(f"{type(module).__name__} has no diffusers configuration from which it could be built again")
    modules: dict[str, Any] = dict(module.named_modules())
    quantized = {la.name: la for la in table if int(bit_map.weights[la.name].min()) != FULL_PRECISION}
    digests: dict[str, str] = {}

    def parts() -> Iterator[tuple[str, Arrays]]:
        with torch.no_grad():
            for name, layer in quantized.items():
                if name not in modules:
                    raise LayerMismatchError(f"the model has no module {name!r}, which the layer table names")
                widths = torch.from_numpy(bit_map.channel_widths(name, layer.n_channels).copy())
                peaks = (input_max or {}).get(name)
                found = None if peaks is None else torch.as_tensor(peaks)
                weight: Tensor = modules[name].weight
                yield (
                    name,
                    pack_layer(
                        quantize_weight(
                            weight, layer, widths, bit_map.format_of(name), found, moment_of(name, moments, None)
                        )
                    ),
                )

    state = {
        k: v
        for k, v in module.state_dict().items()
        if k.removesuffix(".weight") not in quantized or not k.endswith(".weight")
    }
    with atomic_write(folder / FILE) as handle:
        entries, offset = {}, 0
        sizes = _layout(state, quantized, bit_map)
        for key, (dtype, shape, size) in sizes.items():
            entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps({"__metadata__": {"format": "mpqsearch.packed"}, **entries}).encode()
        text += b" " * (-len(text) % 8)
        handle.write(struct.pack("<Q", len(text)) + text)
        own: dict[str, list[str]] = {name: [] for name in quantized}
        for key in sorted(k for k in sizes if ".packed." in k):
            own[key.split(".packed.")[0]].append(key)
        for key, tensor in state.items():
            raw = _raw(tensor)
            digests[key] = hashlib.sha256(raw.data).hexdigest()
            handle.write(raw)
        for name, arrays in parts():
            total = hashlib.sha256()
            for key in own[name]:
                raw = np.ascontiguousarray(arrays[key.removeprefix(f"{name}.packed.")]).reshape(-1).view(np.uint8)
                if len(raw) != sizes[key][2]:
                    raise ConfigError(f"layer {name!r}: {key} takes {len(raw)} bytes, {sizes[key][2]} were laid out")
                total.update(raw.data)
                handle.write(raw)
            digests[name] = total.hexdigest()
    data = {
        "model": table.to_data(),
        "config": json.loads(to_text()),
        "map_digest": bit_map.digest,
        "digests": digests,
    }
    save_bit_map(folder / MAP, bit_map, dict(inputs or {}))
    write_json(folder / HEADER, _SCHEMA, data, dict(inputs or {}))
    return [
        p
        for p in (folder / FILE, folder / MAP, (folder / MAP).with_suffix(".safetensors"), folder / HEADER)
        if p.is_file()
    ]


def load_quantized(path: str | Path) -> nn.Module:
    """The diffusers model of a packed checkpoint, with the weights of the fake-quantized forward, bit for bit.

    Raises `ArtifactError`, naming the layer, when a tensor is missing, cut off or altered.
    """
    import diffusers
    import torch
    from safetensors import SafetensorError, safe_open

    from mpqsearch.quant import weight_of

    folder = Path(path)
    data = read_json(folder / HEADER, _SCHEMA).data
    table = LayerTable.from_data(data["model"])
    maker: Any = getattr(diffusers, str(data["config"].get("_class_name")), None)
    if not (isinstance(maker, type) and issubclass(maker, diffusers.ModelMixin)):
        raise ArtifactError(
            f"{folder / HEADER} names {data['config'].get('_class_name')!r}, which is no model of diffusers"
        )
    build: Any = maker  # diffusers has no types to say that it has from_config
    with _without_filling():
        module: Any = build.from_config(data["config"]).eval().requires_grad_(False)
    target, parameters = module.state_dict(), dict(module.named_parameters(remove_duplicate=False))
    file = folder / FILE
    try:
        stored: Any = safe_open(file, framework="np")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{file} {_first_lost(file, data['digests'])} ({error}). Copy or write the checkpoint again."
        ) from error
    with stored, torch.no_grad():
        keys = sorted(stored.keys())
        by_layer: dict[str, list[str]] = {}
        for key in keys:
            if ".packed." in key:
                by_layer.setdefault(key.split(".packed.")[0], []).append(key)
        for name, digest in data["digests"].items():
            found = by_layer.get(name) or ([name] if name in keys else [])
            arrays = {k: stored.get_tensor(k) for k in found}
            total = hashlib.sha256()
            for key in found:
                total.update(np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8).data)
            if not found or total.hexdigest() != digest:
                raise ArtifactError(
                    f"{file}: the layer {name!r} is missing or was altered after the checkpoint was written"
                )
            if name in by_layer:
                layer = table[name]
                rows = unpack_layer({k.removeprefix(f"{name}.packed."): a for k, a in arrays.items()}, layer)
                weight = parameters[f"{name}.weight"]
                weight.data = weight_of(rows, layer).to(weight.dtype)  # its own memory: no second copy of the layer
            else:
                target[name].copy_(torch.from_numpy(arrays[name].copy()).reshape(target[name].shape))
    missing = sorted(k for k in target if k not in data["digests"] and k.removesuffix(".weight") not in data["digests"])
    if missing:
        raise ArtifactError(f"{file} holds nothing for {missing[0]!r}, which {data['config']['_class_name']} has")
    result: nn.Module = module
    return result


def _layout(
    state: Mapping[str, Tensor], quantized: Mapping[str, LayerSpec], bit_map: BitMap
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Type, shape and bytes of every tensor, in the order of the file, known before any layer is quantized."""
    sizes: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for key, tensor in state.items():
        sizes[key] = (
            _TYPES[str(tensor.dtype).removeprefix("torch.")],
            tuple(tensor.shape),
            tensor.numel() * tensor.element_size(),
        )
    for name, layer in quantized.items():
        widths = bit_map.channel_widths(name, layer.n_channels)
        n, fan_in = layer.n_channels, layer.weights_per_channel
        parts: dict[str, tuple[str, tuple[int, ...], int]] = {
            "bits": ("U8", (n,), n),
            "scale": ("F16", (n,), 2 * n),
            "exponent": ("F32", (1,), 4),
            "zero": ("I16", (n,), 2 * n),
        }
        for width in np.unique(widths[widths != FULL_PRECISION]):
            size = packed_size(int((widths == width).sum()) * fan_in, int(width))
            parts[f"codes.{int(width)}"] = ("U8", (size,), size)
        if bit_map.format_of(name).smooth:
            parts["factor"] = ("F32", (layer.groups, fan_in), 4 * layer.groups * fan_in)
        full = int((widths == FULL_PRECISION).sum())
        if full:
            parts["full_rows"] = ("F32", (full, fan_in), 4 * full * fan_in)
        for key in sorted(parts):
            sizes[f"{name}.packed.{key}"] = parts[key]
    return sizes


def _raw(tensor: Tensor) -> NDArray[np.uint8]:
    import torch

    raw: NDArray[np.uint8] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return raw


@contextmanager
def _without_filling() -> Iterator[None]:
    """Build modules without their random initial weights, which take longer than reading all of them and are read over
    at once."""
    import torch
    from torch.overrides import TorchFunctionMode

    init = torch.nn.init
    skipped = {
        init.kaiming_uniform_,
        init.kaiming_normal_,
        init.xavier_uniform_,
        init.xavier_normal_,
        init.uniform_,
        init.normal_,
    }
    skipped |= {init.trunc_normal_, torch.Tensor.uniform_, torch.Tensor.normal_}

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if func in skipped:
                return args[0] if args else given["tensor"]
            return func(*args, **given)

    with Mode():
        yield


def _first_lost(file: Path, digests: Mapping[str, str]) -> str:
    """Which layer of a file that ends too early is the first to be incomplete."""
    try:
        raw = file.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + size])
    except (OSError, ValueError, struct.error):
        return "is missing or has no readable header"
    here = len(raw) - 8 - size
    lost = [
        (e["data_offsets"][0], k) for k, e in entries.items() if k != "__metadata__" and e["data_offsets"][1] > here
    ]
    if not lost:
        return f"is damaged ({len(digests)} layers)"
    return f"is cut off in the layer {min(lost)[1].split('.packed.')[0]!r}"
