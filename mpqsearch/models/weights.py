"""A model on disk: its structure from the configuration, without weights; its weights from safetensors, one tensor at a
time.

So a model larger than memory can be listed and its weights measured. Nothing here keeps a weight: a tensor that
`StreamedModel.read` returns is mapped from its file and given back when the caller drops it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpqsearch.core import LayerTable
from mpqsearch.errors import ModelError, NumericsError
from mpqsearch.models.calls import Call
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.discover import discover
from mpqsearch.models.loader import EMBEDDED, REFERENCE, _classes, _read_config, _refuse_pickles

log = logging.getLogger("mpqsearch")

Progress = Callable[[str, int, int], None]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
"""Types of the values that are read, by their names in safetensors."""

_PIECE = 1 << 18
"""Values that are hashed at a time: in float32 they stay in the second-level cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where one tensor lies: its shard, the byte there at which it starts, its shape and the type of its values."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class StreamedModel:
    """A denoiser whose weights stay on disk.

    ``module`` has the structure and the shapes, on the device ``meta``. ``stored`` maps every key of its state dict to
    the file that holds it; keys that share one parameter share one place. ``calls`` are recorded calls of a pipeline,
    to run the structure with.
    """

    name: str
    module: nn.Module
    stored: Mapping[str, Stored]
    source: str = ""
    calls: Sequence[Call] = field(default=())

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights as they are stored, each counted once."""
        return sum({(s.file, s.offset): s.n_bytes for s in self.stored.values()}.values())

    def read(self, key: str, part: slice = slice(None)) -> Tensor:
        """One tensor as it is stored (bf16, fp16, fp32), or ``part`` of its first axis, mapped from its file.

        Raises `ModelError` when the file is damaged.
        """
        place = self.stored[key]
        first = place.shape[0] if place.shape else 1
        start, stop, _ = part.indices(first)
        each = place.n_bytes // max(first, 1)
        try:
            # Of these values alone, and private: their pages go when the tensor goes.
            mapped = np.memmap(place.file, mode="c", offset=place.offset + start * each, shape=((stop - start) * each,))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {key!r} from {place.file}: {error}") from error
        shape = (stop - start, *place.shape[1:]) if place.shape else ()
        return torch.from_numpy(mapped).view(place.dtype).reshape(shape)

    def digest(self, progress: Progress | None = None) -> str:
        """What `weights_digest` gives for the loaded model in float32: SHA-256 over names, dtypes, shapes and bytes.

        One pass over the file. Raises `NumericsError` when a weight is not finite.
        """
        total = hashlib.sha256()
        done, size = 0, sum(s.n_bytes for s in self.stored.values())
        buffer = torch.empty(
            _PIECE
        )  # one for all pieces: a new one each time costs more in page faults than the conversion
        for key, meta in sorted(self.module.state_dict().items()):
            dtype = torch.float32 if meta.is_floating_point() else meta.dtype
            total.update(f"{key}|{dtype}|{tuple(meta.shape)}|".encode())
            values = self.read(key).flatten()
            for piece in torch.split(values, _PIECE):
                part = (
                    piece
                    if piece.dtype == dtype
                    else buffer[: len(piece)].copy_(piece)
                    if dtype == torch.float32
                    else piece.to(dtype)
                )
                # A sum is finite unless a value is not, or it overflows: looking at every value is left for then.
                if dtype == torch.float32 and not math.isfinite(part.sum()) and not bool(torch.isfinite(part).all()):
                    raise NumericsError(
                        f"{self.name}: the weight {key!r} holds NaN or infinity. Repair or reload the checkpoint."
                    )
                total.update(part.contiguous().view(torch.uint8).numpy().data)
            done += self.stored[key].n_bytes
            if progress is not None:
                progress("read weights", done, size)
        return total.hexdigest()


def open_streamed(source: str, *, calls: Sequence[Call] = ()) -> StreamedModel:
    """Open a model folder without loading its weights.

    source
        An embedded name, a folder with ``config.json`` and safetensors (one file, or shards with an index), or a
        pipeline folder.

    Raises `ModelError` when the folder is no diffusers model, holds no safetensors, or its weights do not fit its
    configuration.
    """
    folder = REFERENCE / source if source in EMBEDDED else Path(source).expanduser()
    if (folder / "model_index.json").is_file():
        parts = [folder / part for part in ("unet", "transformer") if (folder / part / "config.json").is_file()]
        if not parts:
            raise ModelError(f"the pipeline {source!r} has neither a unet nor a transformer")
        folder = parts[0]
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{source!r} is no folder with config.json: weights are streamed from a diffusers model or pipeline "
            "folder on disk. "
            "Download a hub model first."
        )
    _refuse_pickles(folder)
    module = _structure(folder)
    stored = dict(_placed(folder, module))
    name = (
        source
        if source in EMBEDDED
        else folder.resolve().name
        if folder.name not in ("unet", "transformer")
        else Path(source).name
    )
    return StreamedModel(name=name, module=module, stored=stored, source=source, calls=calls)


def discover_streamed(model: StreamedModel, *, progress: Progress | None = None) -> LayerTable:
    """`discover` for a model on disk: the same layers, shapes, roles and digest, without its weights in memory.

    MACs and what else only a run shows come from a run of the structure on the device ``meta``, with the recorded calls
    if there are any, else with inputs made up from the configuration. Where no such run succeeds MACs are 0, the roles
    go by names alone, and one line says so.
    """
    denoiser = _denoiser(model)
    table = None
    for attempt in _attempts(denoiser):
        try:
            table = discover(*attempt)
        except Exception as error:  # noqa: BLE001  (any model may fail on meta tensors or made-up inputs, in its own way)
            log.info("%s: no run on meta tensors with %s: %s", model.name, type(attempt[1]).__name__, error)
        else:
            break
    if table is None:
        log.warning(
            "%s: its structure could not be run without weights, so MACs are 0 and roles go by names. Give recorded "
            "calls to have them.",
            model.name,
        )
        table = discover(denoiser, run=False)
    return replace(table, digest=model.digest(progress))


def _attempts(denoiser: Denoiser) -> Iterator[tuple[Denoiser, Any]]:
    """Inputs that may run the structure."""
    if len(denoiser.calls):
        yield denoiser, None
        return
    if not denoiser.sample_shape:
        return
    yield denoiser, torch.zeros(1, dtype=torch.long, device="meta") if denoiser.n_classes else None
    width = getattr(denoiser.module, "config", {}).get("cross_attention_dim")
    if isinstance(width, int):
        yield denoiser, {"encoder_hidden_states": torch.empty(1, 77, width, device="meta")}


def _denoiser(model: StreamedModel) -> Denoiser:
    """The structure as a denoiser; not through `adapt`, which looks at every weight."""
    config: Mapping[str, Any] = getattr(model.module, "config", {})
    size, channels = config.get("sample_size"), config.get("in_channels")
    shape: tuple[int, ...] = ()
    if isinstance(channels, int) and isinstance(size, (int, list, tuple)):
        shape = (channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
    return Denoiser(
        name=model.name,
        module=model.module,
        sample_shape=shape,
        n_classes=_classes(dict(config))[0],
        source=model.source,
        calls=model.calls,
    )


def _structure(folder: Path) -> nn.Module:
    """The module of a folder on the device ``meta``."""
    import diffusers

    config = _read_config(folder / "config.json")
    name = config.get("_class_name", "")
    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise ModelError(
            f"{folder}/config.json names the class {name!r}, which diffusers {diffusers.__version__} does not have"
        )
    try:
        with torch.device("meta"):
            module: nn.Module = cls.from_config(config)
    except Exception as error:
        raise ModelError(f"cannot build {name} from {folder}/config.json: {type(error).__name__}: {error}") from error
    return module.eval().requires_grad_(False)


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of an index, else the only one."""
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        try:
            names = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index[0]} is damaged: {error}") from error
        missing = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
        if missing:
            raise ModelError(f"{index[0]} names shards that are not in its folder: {', '.join(missing[:3])}")
        return [folder / n for n in names]
    found = sorted(folder.glob("*.safetensors"))
    default = folder / "diffusion_pytorch_model.safetensors"
    if default in found:
        return [default]
    if len(found) != 1:
        raise ModelError(
            f"{folder} holds {len(found)} safetensors files and no index "
            f"({', '.join(p.name for p in found[:4]) or 'none'}): exactly one "
            "is needed, or shards with an index"
        )
    return found


def _placed(folder: Path, module: nn.Module) -> Iterator[tuple[str, Stored]]:
    """Every key of the state dict with its place; raises `ModelError` where shape or presence differ."""
    found = {key: place for path in _files(folder) for key, place in _header(path)}
    meta = module.state_dict(keep_vars=True)
    same: dict[int, str] = {}  # parameters under several names are stored under one
    for key, tensor in meta.items():
        if key in found:
            same.setdefault(id(tensor), key)
    missing = [k for k, t in meta.items() if k not in found and id(t) not in same]
    if missing:
        raise ModelError(
            f"{folder}: the weights lack {', '.join(missing[:3])} and {len(missing) - 1} more of the configured model"
        )
    for key, tensor in meta.items():
        place = found[key if key in found else same[id(tensor)]]
        if place.shape != tuple(tensor.shape):
            raise ModelError(
                f"{folder}: {key!r} is stored with the shape {place.shape}, the configuration says "
                f"{tuple(tensor.shape)}"
            )
        yield key, place


def _header(path: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of one file. The library checks the file; where tensors start is in the header that it checked.

    Format: eight bytes with the length of the header, the header in JSON with ``data_offsets`` counted from its end,
    the values.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None or (key.endswith("weight") and not dtype.is_floating_point):
            raise ModelError(
                f"{path}: {key!r} is stored as {entry['dtype']}; weights must be floats (bf16, fp16, fp32): is it "
                "quantized already?"
            )
        yield (
            key,
            Stored(file=path, offset=8 + length + entry["data_offsets"][0], shape=tuple(entry["shape"]), dtype=dtype),
        )
