"""Our own packed checkpoint: codes of 1 to 8 bits densely packed by output channel, and back into a diffusers model,
bit for bit.

``packed.safetensors`` holds, for every quantized layer, its codes as bit streams (one for each width, channels of that
width in order), the half-precision scales with one exponent a layer, zero points, widths, smoothing factors and
channels at full precision; every other tensor of the model is stored as it is. ``packed.json`` names the model, the
map's digest and the SHA-256 of the other file. Layers are quantized one after another, so that of the quantized model
no more than its packed form is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.artifacts import digest_file, read_json, save_bit_map, write_json
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, stored_total
from mpqsearch.core.formats import WIDTHS
from mpqsearch.core.packing import pack_bits, packed_size, unpack_bits
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.plan import plan_channels
from mpqsearch.export.target import Target, int_choices
from mpqsearch.untrusted import build

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpqsearch.quant import QuantizedModel, QuantizedRows

FILE, HEADER, MAP = "packed.safetensors", "packed.json", "bitmap.json"
_SCHEMA = "mpqsearch/packed"
_MARK = ".packed."

Arrays = dict[str, NDArray[Any]]


class PackedTarget(Target):
    """The packed checkpoint as an export target: every map as it is; ``load_quantized(folder)`` gives the model."""

    name = "packed"
    kinds = ()
    granularity = "channel"
    holds_any_map = True
    rerounds = False
    needs_config = False
    tolerance = 0.0

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Every width, for every layer."""
        return int_choices(WIDTHS, "uint{}")

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Dense codes, and a width, a half-precision scale and a 16-bit zero point a channel."""
        return layer_bits(layer, np.full(layer.n_channels, choice.width, dtype=np.uint8), smooth=False)

    def plan(self, job: ExportJob) -> list[PlanEntry]:
        """Every layer as asked."""
        return plan_channels(job, self)

    def promise(self, job: ExportJob, plan: Sequence[PlanEntry]) -> StoredBits:
        """Layer by layer, with the widths of the channels and the smoothing factors."""
        layers = {}
        for e in plan:
            layer, widths = job.table[e.layer], job.bit_map.channel_widths(e.layer, job.table[e.layer].n_channels)
            smooth = job.bit_map.format_of(e.layer).smooth
            full = e.will_get == FULL_PRECISION
            layers[e.layer] = self.cost(layer, None) if full else layer_bits(layer, widths, smooth=smooth)
        return stored_total(job.table, layers, self.kept_bits)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The checkpoint and the check."""
        from mpqsearch.export.check import decode_in_place, each_quantized, write_check

        def rows() -> Iterator[tuple[str, QuantizedRows]]:
            for layer, quantized in each_quantized(job, plan, asymmetric=False):
                yield layer.name, quantized
                decode_in_place(job, {layer.name: quantized})

        paths = write_packed(folder, job.model.module, job.table, rows(), job.bit_map.digest, job.inputs)
        return [*paths, *write_check(folder, job.model, job.model.module)]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Load the checkpoint, and read the width of every channel from it."""
        from safetensors import safe_open

        from mpqsearch.export.check import forward_error, stored_size

        widths: dict[str, int | None] = {}
        with safe_open(folder / FILE, framework="np") as stored:
            for key in (k for k in stored.keys() if k.endswith(f"{_MARK}bits")):  # noqa: SIM118 - not a mapping
                bits = stored.get_tensor(key)
                widths[key.removesuffix(f"{_MARK}bits")] = int(bits[0]) if bool((bits == bits[0]).all()) else None
        error = forward_error(folder, load_quantized(folder))
        return {"widths": widths, "forward_error": error, **stored_size(folder / FILE)}


def layer_bits(layer: LayerSpec, widths: NDArray[np.uint8], *, smooth: bool) -> StoredBits:
    """Stored bits of one layer with one width a channel."""
    n, fan_in = layer.n_channels, layer.weights_per_channel
    counts = {int(w): int((widths == w).sum()) for w in np.unique(widths)}
    full = counts.pop(FULL_PRECISION, 0)
    codes = sum(8 * packed_size(count * fan_in, width) for width, count in counts.items())
    factors = 32 * layer.groups * fan_in if smooth else 0
    return StoredBits(payload=codes, metadata=n * (8 + 16 + 16) + 32 + factors, unquantized=32 * full * fan_in)


def pack_layer(rows: QuantizedRows) -> Arrays:
    """The arrays that hold one layer: see `unpack_layer`, its inverse."""
    bits, codes, scale, zero = (
        x.cpu().numpy() for x in (rows.quantizer.bits, rows.codes, rows.quantizer.scale, rows.quantizer.zero)
    )
    exponent = 2.0 ** (np.floor(np.log2(scale.max())) - 15) if len(scale) else 1.0
    half = (scale / np.float32(exponent)).astype(np.float16)
    if not np.array_equal(half.astype(np.float32) * np.float32(exponent), scale):
        half, exponent = scale, 1.0  # scales of another origin: single precision, still exact
    arrays: Arrays = {
        "bits": bits.astype(np.uint8),
        "scale": half,
        "exponent": np.array([exponent], dtype=np.float32),
        "zero": np.rint(2 * zero).astype(np.int16),  # symmetric zeros are halves
    }
    for width in np.unique(bits[bits != FULL_PRECISION]):
        arrays[f"codes.{int(width)}"] = pack_bits(codes[bits == width], int(width))
    if rows.factor is not None:
        arrays["factor"] = rows.factor.cpu().numpy()
    if rows.full_rows is not None:
        arrays["full_rows"] = rows.full_rows.cpu().numpy()
    return arrays


def unpack_layer(arrays: Mapping[str, NDArray[Any]], layer: LayerSpec) -> Tensor:
    """The weight rows ``float32 [channels, fan-in]`` that the fake-quantized forward uses, from the arrays of
    `pack_layer`.

    Raises `ConfigError` when an array has another length than the layer needs.
    """
    import torch

    from mpqsearch.quant import QuantizedRows, RowQuantizer

    bits, n, fan_in = arrays["bits"], layer.n_channels, layer.weights_per_channel
    if any(arrays[key].shape != (n,) for key in ("bits", "scale", "zero")):
        raise ConfigError(f"layer {layer.name!r}: {n} widths, scales and zero points are needed, got {bits.shape}")
    codes = np.zeros((n, fan_in), dtype=np.uint8)
    for width in np.unique(bits[bits != FULL_PRECISION]):
        rows = bits == width
        codes[rows] = unpack_bits(arrays[f"codes.{int(width)}"], int(width), int(rows.sum()) * fan_in).reshape(
            -1, fan_in
        )
    quantizer = RowQuantizer(
        scale=torch.from_numpy(arrays["scale"].astype(np.float32) * arrays["exponent"][0]),
        zero=torch.from_numpy(arrays["zero"].astype(np.float32) / 2),
        bits=torch.from_numpy(bits),
    )
    factor, full = (torch.from_numpy(arrays[k]) if k in arrays else None for k in ("factor", "full_rows"))
    return QuantizedRows(codes=torch.from_numpy(codes), quantizer=quantizer, factor=factor, full_rows=full).rows()


def save_quantized(
    folder: str | Path, model: QuantizedModel, table: LayerTable, inputs: Mapping[str, str] | None = None
) -> list[Path]:
    """Write a quantized model as a packed checkpoint with its bit map, biases and all as they are in ``model.module``.

    Quantizers of layers' inputs are not part of it. Raises `LayerMismatchError` when the map is for another model,
    `ConfigError` for a module without a diffusers configuration.
    """
    folder = Path(folder)
    model.bit_map.validate(table)
    paths = write_packed(folder, model.module, table, model.rows.items(), model.bit_map.digest, inputs or {})
    save_bit_map(folder / MAP, model.bit_map, dict(inputs or {}))
    return [*paths, *(p for p in (folder / MAP, (folder / MAP).with_suffix(".safetensors")) if p.is_file())]


def write_packed(
    folder: Path,
    module: nn.Module,
    table: LayerTable,
    layers: Iterable[tuple[str, QuantizedRows]],
    map_digest: str,
    inputs: Mapping[str, str],
) -> list[Path]:
    """Write ``packed.safetensors`` and ``packed.json``: ``layers`` packed, all else from ``module``."""
    import torch

    from mpqsearch.export.check import save_tensors

    config = _config_of(module)
    ours = tuple(f"{n}." for n, m in module.named_modules() if type(m).__module__.startswith("mpqsearch.quant"))
    packed: dict[str, Tensor] = {}
    names = set()
    for name, rows in layers:
        names.add(f"{name}.weight")
        packed |= {f"{name}{_MARK}{key}": torch.from_numpy(array) for key, array in pack_layer(rows).items()}
    plain = {k: v for k, v in module.state_dict().items() if k not in names and not k.startswith(ours)}
    (folder / HEADER).unlink(missing_ok=True)
    save_tensors(folder / FILE, packed | plain, {"format": "mpqsearch.packed"})
    digest = digest_file(folder / FILE)
    data = {"model": table.to_data(), "config": config, "map_digest": map_digest, "sha256": digest}
    write_json(folder / HEADER, _SCHEMA, data, dict(inputs))
    return [folder / FILE, folder / HEADER]


def _config_of(module: nn.Module) -> dict[str, Any]:
    """What a model is built from again; of several denoisers under ``parts``."""
    from mpqsearch.models.runner import Parts

    if isinstance(module, Parts):
        return {"parts": {name: _config_of(part) for name, part in module.items()}}
    to_text = getattr(module, "to_json_string", None)
    if to_text is None:
        raise ConfigError(f"{type(module).__name__} has no diffusers configuration from which it could be built again")
    config: dict[str, Any] = json.loads(to_text())
    return config


def _built(config: Mapping[str, Any]) -> nn.Module:
    from mpqsearch.export.check import model_class
    from mpqsearch.models.runner import Parts

    if "parts" in config:
        return Parts({name: _built(part) for name, part in config["parts"].items()})
    module: nn.Module = model_class(config).from_config(config)
    return module


def load_quantized(path: str | Path) -> nn.Module:
    """The diffusers model of a packed checkpoint, with the weights of the fake-quantized forward, bit for bit; of
    several denoisers a `Parts`.

    Raises `ArtifactError` when the checkpoint is missing, cut off or altered.
    """
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    from mpqsearch.quant import weight_of

    folder = Path(path)
    data, file = read_json(folder / HEADER, _SCHEMA).data, folder / FILE
    if not file.is_file() or digest_file(file) != data["sha256"]:
        raise ArtifactError(
            f"{file} is missing, cut off or was altered after it was written. Copy or write the checkpoint again."
        )
    state: dict[str, Tensor] = {}
    packed: dict[str, Arrays] = {}
    for key, tensor in load_file(file).items():
        name, mark, part = key.partition(_MARK)
        if mark:
            packed.setdefault(name, {})[part] = tensor.numpy()
        else:
            state[key] = tensor.float() if tensor.is_floating_point() else tensor
    table = build(LayerTable, data["model"], str(folder / HEADER))
    for name, arrays in packed.items():
        state[f"{name}.weight"] = weight_of(unpack_layer(arrays, table[name]), table[name])
    with init_empty_weights():  # random weights take longer than reading all of them
        module = _built(data["config"])
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{file} is no checkpoint of {type(module).__name__}: {error}") from error
    return module.eval().requires_grad_(False)
