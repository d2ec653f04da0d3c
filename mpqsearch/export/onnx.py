"""ONNX: true widths of every output channel inside one layer, as ONNX Runtime runs them.

The rows of a layer are sorted into containers of 2, 4 and 8 bits, each container goes through a ``DequantizeLinear``
with a scale and a zero point a row, and ``Concat`` and ``Gather`` put the rows back in order. Limits, from running onnx
1.23 and ONNX Runtime 1.31:

- Our codes, scales and zero points are kept in every scheme: what runs is the fake-quantized model. 1 bit lies in a
  2-bit container, as three levels do, 3 bits in 4, 5 to 7 bits in 8; the stored size says so.
- One scale a channel: a format with groups of inputs is refused.
- The order of the rows costs 64 bits a row of a mixed layer whose rows are not sorted by width already.
- Linear layers and ungrouped or grouped convolutions; transposed ones stay at full precision. 2-bit containers need
  opset 25.
- ONNX Runtime may quantize activations where it fuses 2- and 4-bit weights with a product: the session option
  ``session.qdq_matmulnbits_accuracy_level`` = ``1`` keeps them in single precision, as the check does.
- The graph is that of one call: an input for each tensor that the module was given, under the names of its arguments.
  The batch size is free where the model allows it, other shapes are not.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.artifacts import atomic_path
from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits, stored_total, unquantized_bits
from mpqsearch.core.packing import pack_bits
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.plan import plan_channels
from mpqsearch.export.target import Target, int_choices

if TYPE_CHECKING:
    from torch import nn

    from mpqsearch.models.calls import Call
    from mpqsearch.quant import QuantizedRows

FILE = "model.onnx"
OPSET, IR_VERSION = 25, 13
CONTAINERS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Width to the bits of the ONNX type that holds its codes."""

MAX_INLINE = 1_500_000_000
"""Bytes of tensors above which they go into a file of their own: a protobuf ends at 2 GB."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one layer in one container: ``rows`` are their positions in the layer; ``bits`` 32 for rows at full
    precision."""

    bits: int
    rows: NDArray[np.int64]


class OnnxTarget(Target):
    """``model.onnx``; weights above 1.5 GB go into ``model.onnx.data``."""

    name = "onnx"
    requires = "onnxruntime"
    imports = ("onnx", "onnxruntime", "onnxscript")
    tested = "1.32.0"
    get = "pip install onnx onnxruntime onnxscript"
    kinds = ("Linear", "Conv1d", "Conv2d", "Conv3d")
    granularity = "channel"
    rerounds = False
    needs_config = False
    any_scheme = True
    tolerance = 1e-5

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """1 to 8 bits; 2, 4 and 8 are stored as they are."""
        return int_choices(tuple(CONTAINERS), "uint{}") if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Containers, and a float32 scale and a zero point a row."""
        return part_bits(layer, CONTAINERS[choice.width], layer.n_channels)

    def plan(self, job: ExportJob) -> list[PlanEntry]:
        """Every layer as asked, channel by channel; kinds that it does not have at full precision."""
        return plan_channels(job, self)

    def promise(self, job: ExportJob, plan: Sequence[PlanEntry]) -> StoredBits:
        """Containers, scales, zero points and the order of the rows, layer by layer."""
        layers = {}
        for entry in plan:
            layer = job.table[entry.layer]
            if entry.will_get == FULL_PRECISION:
                layers[layer.name] = unquantized_bits(layer, self.full_bits)
                continue
            parts = parts_of(job.bit_map.channel_widths(layer.name, layer.n_channels))
            stored = [part_bits(layer, p.bits, len(p.rows)) for p in parts]
            order = 0 if in_order(parts) else 64 * layer.n_channels
            fmt = job.bit_map.format_of(layer.name)
            order += _shift_bits(parts, fmt.scheme) + (32 * layer.weights_per_channel if fmt.smooth else 0)
            layers[layer.name] = StoredBits(
                payload=sum(b.payload for b in stored),
                metadata=sum(b.metadata for b in stored) + order,
                unquantized=sum(b.unquantized for b in stored),
            )
        return stored_total(job.table, layers, self.kept_bits)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Trace the model, put containers in the place of its weights, and write the check."""
        import onnx

        from mpqsearch.export.check import decode_in_place, our_rows, write_check

        for name in (e.layer for e in plan if e.will_get != FULL_PRECISION):
            if job.bit_map.format_of(name).scales_of(job.table[name].weights_per_channel) > 1:
                raise ConfigError(
                    f"onnx holds one scale a channel here, and {name!r} has one for each group of its inputs; use a "
                    "format without groups, or the target packed"
                )
            if job.bit_map.format_of(name).smooth and job.table[name].groups > 1:
                raise ConfigError(
                    f"onnx cannot hold the smoothing of the grouped layer {name!r}; use a format without smooth"
                )
        rows = our_rows(job, plan, asymmetric=False)
        module = decode_in_place(job, rows)
        check = write_check(folder, job, module)
        model = traced(job.model.runner.examples(job.model.module)[0], module)
        for name, ours in rows.items():
            widths = job.bit_map.channel_widths(name, job.table[name].n_channels)
            whole = job.bit_map.format_of(name).scheme == "asymmetric"
            put_containers(model.graph, job.table[name], parts_of(widths), ours, whole=whole)
        model.metadata_props.add(key="mpqsearch.bit_map", value=job.bit_map.digest)
        files = [folder / FILE]
        outside = sum(len(t.raw_data) for t in model.graph.initializer) > MAX_INLINE
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / FILE) as temporary:
            if outside:
                files.append(folder / f"{FILE}.data")
                files[-1].unlink(missing_ok=True)
                onnx.save_model(model, temporary, save_as_external_data=True, location=files[-1].name)
            else:
                onnx.save_model(model, temporary)
        return [*files, *check]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Run the file with ONNX Runtime, and count the weights in its containers."""
        import onnx

        from mpqsearch.export.check import forward_errors
        from mpqsearch.export.mapfile import FILE as MAP
        from mpqsearch.export.mapfile import load_neutral

        tensors = onnx.load(folder / FILE).graph.initializer
        neutral, held = load_neutral(folder / MAP), weights_held(tensors)
        widths: dict[str, int | None] = {}
        problems = []
        for layer in neutral.layers:
            asked = neutral.bit_map.channel_widths(layer.name, layer.n_channels)
            planned = {p.bits: len(p.rows) * layer.weights_per_channel for p in parts_of(asked)}
            if layer.name in held:
                found = held[layer.name]
                widths[layer.name] = None if asked.min() != asked.max() else int(asked[0])
                if found != planned:
                    problems.append(f"{layer.name}: weights by bits of their container {found}, planned {planned}")
        errors = forward_errors(folder, session(folder / FILE))
        return {"widths": widths, "problems": problems, **errors, **self.sizes(folder)}

    def sizes(self, folder: Path) -> dict[str, int]:
        """Buffers and constants of the trace belong to the header, as the graph does."""
        import onnx

        from mpqsearch.export.mapfile import FILE as MAP
        from mpqsearch.export.mapfile import load_neutral

        neutral = load_neutral(folder / MAP)
        names = {u["name"] for u in neutral.data["unquantized"]} | {f"{n}.weight" for n in neutral.bit_map.weights}
        tensors = onnx.load(folder / FILE).graph.initializer
        stored = sum(_bytes_of(t) for t in tensors if _owner(t.name) in names)
        on_disk = sum(p.stat().st_size for p in (folder / FILE, folder / f"{FILE}.data") if p.exists())
        return {"stored_bytes": stored, "header_bytes": on_disk - stored}


def session(path: Path) -> nn.Module:
    """A file as a module that takes what the traced module took, and runs it with ONNX Runtime."""
    import onnxruntime
    import torch

    from mpqsearch.models.calls import tensors_in

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    runs = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    class Session(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero = torch.nn.Parameter(torch.zeros(1))  # tells the caller type and device

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            names = (i.name for i in runs.get_inputs())
            feed = {n: t.numpy() for n, t in zip(names, tensors_in((args, kwargs)), strict=True)}
            return tuple(torch.from_numpy(y) for y in runs.run(None, feed))

    return Session()


def parts_of(widths: NDArray[np.uint8]) -> list[Part]:
    """Rows by container, narrow ones first; rows at full precision last."""
    bits = np.array([CONTAINERS.get(int(w), 32) for w in range(FULL_PRECISION + 1)], dtype=np.int64)[widths]
    return [Part(int(b), np.flatnonzero(bits == b)) for b in np.unique(bits)]


def in_order(parts: Sequence[Part]) -> bool:
    """True when the containers one after another are the rows in order."""
    order = np.concatenate([p.rows for p in parts])
    return bool((order == np.arange(len(order))).all())


def part_bits(layer: LayerSpec, bits: int, n_rows: int) -> StoredBits:
    """Bits of ``n_rows`` rows of a layer in containers of ``bits`` bits."""
    rows = LayerSpec(name=layer.name, kind="Linear", weight_shape=(n_rows, layer.weights_per_channel))
    if bits == 32:
        return unquantized_bits(rows, 32)
    zeros = 8 * -(-n_rows * bits // 8)
    return coded_bits(rows, bits, scales=n_rows, scale_bits=32, other=zeros)


def traced(call: Call, module: nn.Module) -> Any:
    """The ONNX graph of a call, with the module's parameters under their own names."""
    import onnx
    import torch

    arguments = inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            call.args,
            kwargs=dict(call.kwargs),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=20,
            dynamic_shapes={name: _free_batch(value, call.batch) for name, value in arguments.items()},
        )
    model: Any = program.model_proto  # type: ignore[union-attr]
    model = onnx.version_converter.convert_version(model, OPSET)
    model.ir_version = IR_VERSION
    return model


def _free_batch(value: Any, batch: int) -> Any:
    """The first axis of every tensor in an argument that has the length of the batch is free."""
    import torch

    if isinstance(value, torch.Tensor):
        return {0: torch.export.Dim.AUTO} if value.dim() and len(value) == batch else {}
    if isinstance(value, (list, tuple)):
        return type(value)(_free_batch(v, batch) for v in value)
    if isinstance(value, Mapping):
        return {k: _free_batch(v, batch) for k, v in value.items()}
    return None


def put_containers(graph: Any, layer: LayerSpec, parts: Sequence[Part], ours: QuantizedRows, *, whole: bool) -> None:
    """Replace the weight of a layer by nodes that decode its rows; ``whole`` when all zero points are integers."""
    from onnx import TensorProto, helper, numpy_helper

    name = f"{layer.name}.weight"
    weight = next((t for t in graph.initializer if t.name == name), None)
    if weight is None:
        raise ConfigError(f"the traced model has no parameter {name!r}: was it folded or never used?")
    graph.initializer.remove(weight)
    shape = layer.weight_shape
    # ONNX Runtime 1.32 fails to fold a transposed 2-bit tensor: where only a Transpose takes the weight, store it
    # transposed instead
    target, flip = _transposed(graph, name)
    axis = 1 if flip else 0

    def placed(array: NDArray[Any]) -> NDArray[Any]:
        return array.T if flip else array

    types = {2: TensorProto.UINT2, 4: TensorProto.UINT4, 8: TensorProto.UINT8}
    codes, scale, zero = (x.numpy() for x in (ours.codes, ours.quantizer.scale, ours.quantizer.zero))
    nodes: list[Any] = []
    outputs = []
    constants: list[Any] = []

    def constant(suffix: str, array: NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), f"{name}.{suffix}"))
        return f"{name}.{suffix}"

    def packed(suffix: str, values: NDArray[np.uint8], bits: int, dims: Sequence[int]) -> str:
        raw = pack_bits(values, bits).tobytes()
        constants.append(helper.make_tensor(f"{name}.{suffix}", types[bits], dims, raw, raw=True))
        return f"{name}.{suffix}"

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}.{kind}", **attributes))
        return output

    for part in parts:
        tag, rows = f"b{part.bits}", part.rows
        dims = (shape[1], len(rows)) if flip else (len(rows), *shape[1:])
        if part.bits == 32:
            assert ours.full_rows is not None
            outputs.append(constant(f"{tag}.float", placed(ours.full_rows.numpy()).reshape(dims)))
            continue
        inputs = [packed(f"{tag}.codes", placed(codes[rows]), part.bits, dims), constant(f"{tag}.scale", scale[rows])]
        if whole:
            inputs.append(packed(f"{tag}.zero", zero[rows].astype(np.uint8), part.bits, (len(rows),)))
        value = node("DequantizeLinear", inputs, f"{name}.{tag}.rows", axis=axis)
        if not whole:
            shift = (zero[rows] * scale[rows]).astype(np.float32)
            shift = shift[None] if flip else shift.reshape(-1, *[1] * (len(shape) - 1))
            value = node("Sub", [value, constant(f"{tag}.shift", shift)], f"{name}.{tag}.shifted")
        outputs.append(value)
    value = outputs[0] if len(outputs) == 1 else node("Concat", outputs, f"{name}.sorted", axis=axis)
    if not in_order(parts):
        order = np.argsort(np.concatenate([p.rows for p in parts]))
        value = node("Gather", [value, constant("order", order.astype(np.int64))], f"{name}.ordered", axis=axis)
    if ours.factor is not None:
        factor = ours.factor.numpy().reshape(1, *shape[1:])
        value = node("Div", [value, constant("factor", placed(factor))], f"{name}.unscaled")
    node("Identity", [value], target)
    graph.initializer.extend(constants)
    for i, new in enumerate(nodes):
        graph.node.insert(i, new)


def weights_held(tensors: Any) -> dict[str, dict[int, int]]:
    """Weights by the bits of their container, 32 for those at full precision, of every layer that has containers."""
    held: dict[str, dict[int, int]] = defaultdict(dict)
    for tensor in tensors:
        layer, mark, part = tensor.name.rpartition(".weight.b")
        bits, _, kind = part.partition(".")
        if mark and kind in ("codes", "float"):
            held[layer][int(bits)] = math.prod(tensor.dims)
    return held


def _transposed(graph: Any, name: str) -> tuple[str, bool]:
    """Name under which the decoded weight is wanted, and whether transposed; a Transpose that alone takes it is
    removed."""
    takers = [n for n in graph.node if name in n.input]
    if len(takers) != 1 or takers[0].op_type != "Transpose" or [list(a.ints) for a in takers[0].attribute] != [[1, 0]]:
        return name, False
    graph.node.remove(takers[0])
    return str(takers[0].output[0]), True


def _shift_bits(parts: Sequence[Part], scheme: str) -> int:
    """Schemes without integer zero points: rows are shifted by a float32 instead."""
    if scheme == "asymmetric":
        return 0
    return sum(32 * len(p.rows) - 8 * -(-len(p.rows) * p.bits // 8) for p in parts if p.bits != 32)


def _owner(tensor: str) -> str:
    """The parameter that a tensor of the graph belongs to."""
    head, dot, _ = tensor.rpartition(".weight.")
    return f"{head}.weight" if dot else tensor


def _bytes_of(tensor: Any) -> int:
    from onnx import TensorProto

    bits: Mapping[int, int] = {TensorProto.UINT2: 2, TensorProto.UINT4: 4, TensorProto.UINT8: 8, TensorProto.INT64: 64}
    n = int(np.prod(tensor.dims)) if tensor.dims else 1
    return -(-n * bits.get(tensor.data_type, 32) // 8)
