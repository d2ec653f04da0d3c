"""Our own packed checkpoint: codes of 1 to 8 bits densely packed by output channel, those of three levels five a byte,
and back into a diffusers model, bit for bit.

``packed.safetensors`` holds, for every quantized layer, one tensor of codes as bit streams (one for each width, the
channels of that width in order) and zero points likewise, one of half-precision scales with their exponent, one of
widths, and smoothing factors and channels at full precision where there are any; these and every other tensor of the
model take 16 bits a value. There are few tensors, since a file names and describes each. ``packed.json`` names
the model, the map's digest and the SHA-256 of the other file. Layers are quantized one after another, so that of the
quantized model no more than its packed form is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpqsearch.artifacts import digest_file, read_json, read_tensors, save_bit_map, write_json
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, QuantFormat, StoredBits, stored_total
from mpqsearch.core.formats import TERNARY_WIDTH, TRITS, WIDTHS
from mpqsearch.core.packing import pack_bits, pack_trits, packed_size, unpack_bits, unpack_trits
from mpqsearch.core.stored import code_bits
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.plan import plan_channels
from mpqsearch.export.target import Target, int_choices, plain_config
from mpqsearch.untrusted import build

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpqsearch.quant import QuantizedModel, QuantizedRows

FILE, HEADER, MAP = "packed.safetensors", "packed.json", "bitmap.json"
_SCHEMA = "mpqsearch/packed"
_MARK = ".packed."
_FLOATS = ("factor", "full_rows")
_METADATA = {"format": "mpqsearch.packed"}

TAG_BITS = 4
"""The width of each channel in a layer whose channels differ; 0 stands for full precision."""

THREE_LEVELS = 9
"""What stands in the place of the width of channels with codes 0, 1 and 2."""

Arrays = dict[str, NDArray[Any]]
Tensors: TypeAlias = "dict[str, Tensor]"


class PackedTarget(Target):
    """The packed checkpoint as an export target: every map as it is; ``load_quantized(folder)`` gives the model."""

    name = "packed"
    loading = "import mpqsearch as mpq\n\nmodel = mpq.load_quantized({folder!r})"
    kinds = ()
    granularity = "channel"
    holds_any_map = True
    rerounds = False
    file = FILE
    needs_config = False
    any_scheme = True
    full_bits = 16
    kept_bits = 16
    tolerance = 0.0
    encoders = True

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Every width, for every layer."""
        return int_choices(WIDTHS, "uint{}")

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Dense codes, a half-precision scale and a zero point of as many bits as a code a channel."""
        return layer_bits(layer, np.full(layer.n_channels, choice.width, dtype=np.uint8), QuantFormat())

    def plan(self, job: ExportJob) -> list[PlanEntry]:
        """Every layer as asked."""
        return plan_channels(job, self)

    def promise(self, job: ExportJob, plan: Sequence[PlanEntry]) -> StoredBits:
        """Layer by layer, with the widths of the channels and the smoothing factors."""
        layers = {}
        for e in plan:
            layer, widths = job.table[e.layer], job.bit_map.channel_widths(e.layer, job.table[e.layer].n_channels)
            full, fmt = e.will_get == FULL_PRECISION, job.bit_map.format_of(e.layer)
            layers[e.layer] = self.cost(layer, None) if full else layer_bits(layer, widths, fmt)
        return stored_total(job.table, layers, self.kept_bits)

    def names_bits(self, job: ExportJob, plan: Sequence[PlanEntry]) -> int:
        """The header of safetensors, up to a digit of an offset."""
        state = job.model.module.state_dict()
        shapes = {k.name: tuple(state[k.name].shape) for k in job.table.kept if k.name in state}
        for e in plan:
            layer = job.table[e.layer]
            if e.will_get == FULL_PRECISION:
                shapes[f"{e.layer}.weight"] = layer.weight_shape
            else:
                widths = job.bit_map.channel_widths(e.layer, layer.n_channels)
                own = shapes_of(layer, widths, job.bit_map.format_of(e.layer))
                shapes |= {f"{e.layer}{_MARK}{part}": shape for part, shape in own.items()}
        described: dict[str, Any] = {"__metadata__": _METADATA}
        offset = 0
        for name, shape in shapes.items():
            end = offset + 2 * math.prod(shape)
            described[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        return 64 * (1 + -(-len(json.dumps(described, separators=(",", ":"))) // 8))

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The checkpoint and the check."""
        from mpqsearch.export.check import decode_in_place, each_quantized, write_check

        def rows() -> Iterator[tuple[str, QuantizedRows]]:
            for layer, exact in each_quantized(job, plan, asymmetric=False):
                full = exact.full_rows
                quantized = exact if full is None else replace(exact, full_rows=in_half(full).float())
                yield layer.name, quantized
                decode_in_place(job, {layer.name: quantized})

        paths = write_packed(folder, job.model.module, job.table, rows(), job.bit_map.digest, job.inputs)
        quantized = {f"{e.layer}.weight" for e in plan if e.will_get != FULL_PRECISION}
        for name, tensor in job.model.module.state_dict().items():
            if name not in quantized:
                tensor.copy_(in_half(tensor))
        return [*paths, *write_check(folder, job, job.model.module)]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Load the checkpoint, and read the width of every channel from it."""
        from safetensors import safe_open

        from mpqsearch.export.check import forward_errors

        widths: dict[str, int | None] = {}
        with safe_open(folder / FILE, framework="np") as stored:
            for name, mark, part in (k.partition(_MARK) for k in stored.keys()):  # noqa: SIM118 - not a mapping
                if part in ("bits", "tags"):
                    tag = stored.get_tensor(f"{name}{mark}{part}")
                    widths[name] = int(widths_of({part: tag}, 1)[0][0]) if part == "bits" else None
        return {"widths": widths, **forward_errors(folder, load_quantized(folder)), **self.sizes(folder)}

    def weights(self, folder: Path) -> Mapping[str, Tensor]:
        """What `load_quantized` gives."""
        return load_quantized(folder).state_dict()


def layer_bits(layer: LayerSpec, widths: NDArray[np.uint8], fmt: QuantFormat) -> StoredBits:
    """Stored bits of one layer with one width a channel."""
    n, fan_in = layer.n_channels, layer.weights_per_channel
    counts = {int(w): int((widths == w).sum()) for w in np.unique(widths)}
    tags = 8 if len(counts) == 1 else 8 * packed_size(n, TAG_BITS)
    full = counts.pop(FULL_PRECISION, 0)
    codes = sum(-(-count * code_bits(fan_in, width, fmt) // 8) * 8 for width, count in counts.items())
    per_row = fmt.scales_of(fan_in)
    zeros = sum(8 * packed_size(k * per_row, width) for width, k in counts.items() if fmt.zero_point_bits(width))
    factors = 32 * layer.groups * fan_in if fmt.smooth else 0
    return StoredBits(
        payload=codes, metadata=tags + 16 * (n * per_row + 1) + zeros + factors, unquantized=16 * full * fan_in
    )


def shapes_of(layer: LayerSpec, widths: NDArray[np.uint8], fmt: QuantFormat) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of `pack_layer` for one layer with one width a channel."""
    n, fan_in, full = layer.n_channels, layer.weights_per_channel, int((widths == FULL_PRECISION).sum())
    codes = layer_bits(layer, widths, fmt).payload // 8
    shapes: dict[str, tuple[int, ...]] = {"scale": (n * fmt.scales_of(fan_in) + 1,), "codes": (codes,)}
    shapes |= {"bits": (1,)} if len(np.unique(widths)) == 1 else {"tags": (packed_size(n, TAG_BITS),)}
    shapes |= {"factor": (layer.groups, fan_in)} if fmt.smooth else {}
    return shapes | ({"full_rows": (full, fan_in)} if full else {})


def pack_layer(rows: QuantizedRows) -> Tensors:
    """The tensors that hold one layer: see `unpack_layer`, its inverse up to half precision of rows that are not
    quantized.

    ``scale`` ends with the logarithm of the exponent, base 2. A negative scale says that the zero point is the middle
    of the codes, as in the symmetric scheme and at three levels; others are stored in as many bits as a code, in
    ``codes`` after all codes.
    """
    import torch

    bits, codes, scale, zero = (
        x.cpu().numpy() for x in (rows.quantizer.bits, rows.codes, rows.quantizer.scale, rows.quantizer.zero)
    )
    quantized, per_row = bits != FULL_PRECISION, rows.quantizer.groups
    three = rows.quantizer.three_levels.cpu().numpy()
    middle = np.repeat(quantized, per_row) & ((zero != np.rint(zero)) | np.repeat(three, per_row))
    power = float(np.floor(np.log2(scale.max()))) - 15 if len(scale) else 0.0
    half = (scale / np.float32(2.0**power)).astype(np.float16)
    if not np.array_equal(half.astype(np.float32) * np.float32(2.0**power), scale):
        half, power = scale, 0.0  # scales of another origin: single precision, still exact
    widths = [int(w) for w in np.unique(bits[quantized])]
    streams = [
        pack_trits(codes[own]).reshape(-1) if three[own].all() else pack_bits(codes[own], width)
        for own, width in ((bits == width, width) for width in widths)
    ]
    for width in widths:
        own = np.repeat(bits == width, per_row)
        if not middle[own].all():
            streams.append(pack_bits(np.where(middle, 0, zero)[own].astype(np.uint8), width))
    arrays: Arrays = {
        "scale": np.append(np.where(middle, -half, half), half.dtype.type(power)),
        "codes": np.concatenate([np.zeros(0, dtype=np.uint8), *streams]),
    }
    tags = np.where(three, THREE_LEVELS, bits).astype(np.uint8)
    if bool((bits == bits[0]).all()):
        arrays["bits"] = tags[:1]
    else:
        arrays["tags"] = pack_bits(np.where(quantized, tags, 0), TAG_BITS)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if rows.factor is not None:
        tensors["factor"] = rows.factor.cpu()
    if rows.full_rows is not None:
        tensors["full_rows"] = in_half(rows.full_rows.cpu())
    return tensors


def widths_of(part: Mapping[str, NDArray[Any]], n: int) -> tuple[NDArray[np.uint8], bool]:
    """The width of each of ``n`` channels, from the tensors of `pack_layer`, and whether 2 bits are three levels."""
    tags = np.repeat(part["bits"].astype(np.uint8), n) if "bits" in part else unpack_bits(part["tags"], TAG_BITS, n)
    three = tags == THREE_LEVELS
    widths = np.where(three, TERNARY_WIDTH, np.where(tags == 0, FULL_PRECISION, tags))
    return widths.astype(np.uint8), bool(three.any())


def unpack_layer(tensors: Mapping[str, Tensor], layer: LayerSpec) -> Tensor:
    """The weight rows ``float32 [channels, fan-in]`` that the fake-quantized forward uses, from the tensors of
    `pack_layer`.

    Raises `ConfigError` when a tensor has another length than the layer needs.
    """
    import torch

    from mpqsearch.quant import QuantizedRows, RowQuantizer

    n, fan_in = layer.n_channels, layer.weights_per_channel
    part: Arrays = {k: t.numpy() for k, t in tensors.items() if k not in _FLOATS}
    if "codes" not in part:
        raise ConfigError(f"layer {layer.name!r} has no codes: packed files of earlier versions must be written again")
    (bits, ternary), stream, read = widths_of(part, n), part["codes"], 0
    stored = part["scale"][:-1].astype(np.float32) * np.float32(2.0 ** float(part["scale"][-1]))
    per_row, middle = stored.size // n, np.signbit(stored)
    if stored.shape != (n * per_row,) or not per_row or fan_in % per_row:
        raise ConfigError(
            f"layer {layer.name!r}: {n} scales, or as many for each group, are needed, got {stored.shape}"
        )

    def bytes_of(size: int) -> NDArray[np.uint8]:
        nonlocal read
        begin, read = read, read + size
        if read > stream.size:
            raise ConfigError(f"layer {layer.name!r}: its codes end after {stream.size} bytes, {read} are needed")
        return stream[begin:read]

    def codes_of(count: int, width: int) -> NDArray[np.uint8]:
        if ternary and width == TERNARY_WIDTH:
            in_row = -(-fan_in // TRITS)
            return unpack_trits(bytes_of(count * in_row).reshape(count, in_row), fan_in)
        return unpack_bits(bytes_of(packed_size(count * fan_in, width)), width, count * fan_in).reshape(-1, fan_in)

    codes, zero = np.zeros((n, fan_in), dtype=np.uint8), np.zeros(n * per_row, dtype=np.float32)
    widths = [int(w) for w in np.unique(bits[bits != FULL_PRECISION])]
    for width in widths:
        own = bits == width
        codes[own] = codes_of(int(own.sum()), width)
    for width in widths:
        own = np.repeat(bits == width, per_row)
        if not middle[own].all():
            zero[own] = unpack_bits(bytes_of(packed_size(int(own.sum()), width)), width, int(own.sum()))
    quantizer = RowQuantizer(
        scale=torch.from_numpy(np.abs(stored)),
        zero=torch.from_numpy(zero),
        bits=torch.from_numpy(bits),
        ternary=ternary,
    )
    quantizer.zero[middle] = quantizer.top[middle] / 2
    factor, full = (tensors[k].float() if k in tensors else None for k in _FLOATS)
    return QuantizedRows(codes=torch.from_numpy(codes), quantizer=quantizer, factor=factor, full_rows=full).rows()


def in_half(values: Tensor) -> Tensor:
    """Floats in 16 bits, of the two kinds the nearer one: exact for values that come from a file in 16 bits."""
    import torch

    if not values.is_floating_point():
        return values
    kinds = [values.to(kind) for kind in (torch.float16, torch.bfloat16)]
    return min(kinds, key=lambda kind: float((kind.float() - values.float()).abs().amax()) if values.numel() else 0.0)


def save_quantized(
    folder: str | Path, model: QuantizedModel, table: LayerTable, inputs: Mapping[str, str] | None = None
) -> list[Path]:
    """Write a quantized model as a packed checkpoint with its bit map, with the biases of ``model.module``, in 16 bits
    as everything that is not quantized.

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
    from mpqsearch.export.check import save_tensors

    config = _config_of(module)
    ours = tuple(f"{n}." for n, m in module.named_modules() if type(m).__module__.startswith("mpqsearch.quant"))
    packed: dict[str, Tensor] = {}
    names = set()
    for name, rows in layers:
        names.add(f"{name}.weight")
        packed |= {f"{name}{_MARK}{key}": tensor for key, tensor in pack_layer(rows).items()}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}  # under two names, such as the words of a T5
    for key, value in module.state_dict(keep_vars=True).items():
        if first.setdefault(id(value), key) != key:
            tied[key] = first[id(value)]
    skipped = {*names, *tied}
    kept = {k: v for k, v in module.state_dict().items() if k not in skipped and not k.startswith(ours)}
    plain = {k: in_half(v.detach().cpu()) for k, v in kept.items()}
    (folder / HEADER).unlink(missing_ok=True)
    save_tensors(folder / FILE, packed | plain, _METADATA)
    digest = digest_file(folder / FILE)
    data = {"model": table.to_data(), "config": config, "map_digest": map_digest, "sha256": digest}
    data |= {"tied": tied} if tied else {}
    write_json(folder / HEADER, _SCHEMA, data, dict(inputs))
    return [folder / FILE, folder / HEADER]


def _config_of(module: nn.Module) -> dict[str, Any]:
    """What a model is built from again; of several parts under ``parts``."""
    from mpqsearch.models.runner import Parts

    if isinstance(module, Parts):
        return {"parts": {name: _config_of(part) for name, part in module.items()}}
    config = plain_config(module)
    if config is None:
        raise ConfigError(
            f"{type(module).__name__} has no configuration of diffusers or transformers from which it could be built "
            "again"
        )
    return config


def _built(config: Mapping[str, Any]) -> nn.Module:
    from mpqsearch.export.check import model_class
    from mpqsearch.models.runner import Parts

    if "parts" in config:
        return Parts({name: _built(part) for name, part in config["parts"].items()})
    cls = model_class(config)
    module: nn.Module = cls.from_config(config) if hasattr(cls, "from_config") else _encoder_of(cls, config)
    return module


def _encoder_of(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """A model of transformers; attention as it is by default, whatever library was there when it was written."""
    module: nn.Module = cls(cls.config_class.from_dict(dict(config)))
    return module


def load_quantized(path: str | Path) -> nn.Module:
    """The diffusers model of a packed checkpoint in float32, with the weights of the fake-quantized forward, bit for
    bit; of several parts, text encoders among them, a `Parts`: ``pipeline.from_pretrained(source, **parts)``.

    Raises `ArtifactError` when the checkpoint is missing, cut off or altered.
    """
    from accelerate import init_empty_weights

    from mpqsearch.quant import weight_of

    folder = Path(path)
    data, file = read_json(folder / HEADER, _SCHEMA).data, folder / FILE
    if not file.is_file() or digest_file(file) != data["sha256"]:
        raise ArtifactError(
            f"{file} is missing, cut off or was altered after it was written. Copy or write the checkpoint again."
        )
    state: dict[str, Tensor] = {}
    packed: dict[str, Tensors] = {}
    for key, tensor in read_tensors(file).items():
        name, mark, part = key.partition(_MARK)
        if mark:
            packed.setdefault(name, {})[part] = tensor
        else:
            state[key] = tensor.float() if tensor.is_floating_point() else tensor
    table = build(LayerTable, data["model"], str(folder / HEADER))
    for name, tensors in packed.items():
        state[f"{name}.weight"] = weight_of(unpack_layer(tensors, table[name]), table[name])
    state |= {key: state[first] for key, first in data.get("tied", {}).items()}
    with init_empty_weights():  # random weights take longer than reading all of them
        module = _built(data["config"])
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{file} is no checkpoint of {type(module).__name__}: {error}") from error
    return module.eval().requires_grad_(False)
