"""The weight files of a model folder: which they are, where each tensor lies in them, and what must be there.

Everything here reads headers and names only, so that a folder which cannot be used is refused before a weight is read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from mpqsearch.errors import ModelError
from mpqsearch.sources import PICKLES, WEIGHTS
from mpqsearch.untrusted import build, file_name, parse_json, read_json

_INDEX = re.compile(rf"{WEIGHTS}\.safetensors\.index(?:\.(\w+))?\.json")
_WHOLE = re.compile(rf"{WEIGHTS}(?:\.(\w+))?\.safetensors")
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

_SCALES = re.compile(
    r"(weight_scale\w*|scale_weight|scale_input|input_scale|comfy_quant|absmax|quant_map|quant_state\S*|scales|qzeros|zero_point)$"
)
"""Ends of keys that only quantized checkpoints have."""

_WAY_OUT = (
    "mpqsearch starts from weights in float32, bfloat16 or float16: give the checkpoint that this one was made from. "
    "`mpqsearch import` reads the bit widths of a quantized one."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where one tensor lies: its file, the byte there at which it starts, its shape and the type of its values."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The safetensors files of a model, and the variant that they are (``fp16`` in
    ``diffusion_pytorch_model.fp16.safetensors``; None for files without one)."""

    paths: tuple[Path, ...]
    variant: str | None

    def tensors(self) -> dict[str, Stored]:
        """Every stored tensor by its key. Raises `ModelError` when a file is damaged or holds quantized weights."""
        return {key: place for path in self.paths for key, place in _header(path)}


def weight_files(folder: Path) -> WeightFiles:
    """The safetensors files that hold the weights of a model folder, as diffusers names them.

    Files without a variant come first, and shards before a whole file. Raises `ModelError` when there are none, when
    only pickles are there, when a shard is missing, or when several variants leave the choice open.
    """
    names = sorted(p.name for p in folder.iterdir())
    by_variant: dict[str | None, tuple[Path, ...]] = {m[1]: (folder / n,) for n in names if (m := _WHOLE.fullmatch(n))}
    for name in names:
        if match := _INDEX.fullmatch(name):
            by_variant[match[1]] = _shards(folder / name)
    if None in by_variant:
        return WeightFiles(paths=by_variant[None], variant=None)
    if len(by_variant) == 1:
        ((variant, paths),) = by_variant.items()
        return WeightFiles(paths=paths, variant=variant)
    if by_variant:
        listed = ", ".join(map(str, by_variant))
        raise ModelError(f"{folder} holds several variants of its weights ({listed}) and none without: leave one there")
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles:
        raise ModelError(
            f"{folder} holds only pickle checkpoints ({', '.join(pickles[:3])}), which may run code when loaded. "
            "Convert them: load once where you trust them, call model.save_pretrained(folder, safe_serialization=True)."
        )
    others = [n for n in names if n.endswith(".safetensors")]
    raise ModelError(
        f"{folder} holds no {WEIGHTS}.safetensors and no index of shards ({', '.join(others[:4]) or 'no safetensors'})"
    )


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `ModelError` when the configuration says that the weights are quantized already."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ModelError(f"{folder}/config.json: the weights are quantized already (by {method}). {_WAY_OUT}")


def check_keys(source: str, missing: Collection[str], unexpected: Collection[str], stored: Collection[str]) -> None:
    """Raise `ModelError` when a checkpoint lacks keys of the model, or holds scales of a quantized one.

    ``missing`` are keys of the model that are not stored, ``unexpected`` stored keys that the model does not have.
    """
    scales = sorted(k for k in unexpected if _SCALES.search(k))
    if scales:
        raise ModelError(f"{source}: the weights are quantized already: they come with {scales[0]!r}. {_WAY_OUT}")
    if not missing:
        return
    lacking = sorted(missing)
    prefix = _likely_prefix(lacking, stored)
    raise ModelError(
        f"{source}: the weights lack {len(lacking)} keys of the configured model, such as {', '.join(lacking[:3])}. "
        + (
            f"They are there under the prefix {prefix!r}: save the inner model, or store the keys without it."
            if prefix
            else "The file is incomplete, or config.json belongs to another model."
        )
    )


def check_shapes(source: str, meta: Mapping[str, torch.Tensor], stored: Mapping[str, Stored]) -> None:
    """Raise `ModelError` for a stored tensor of another shape than the configured model's, before memory is taken."""
    for key, tensor in meta.items():
        if key in stored and stored[key].shape != tuple(tensor.shape):
            raise ModelError(
                f"{source}: {key!r} is stored with the shape {stored[key].shape}, the configuration says "
                f"{tuple(tensor.shape)}"
            )


def _likely_prefix(lacking: Sequence[str], stored: Collection[str]) -> str:
    """What stands before most of the lacking keys in the file, such as ``module.``; empty when nothing does."""
    prefixes: Counter[str] = Counter()
    for key in lacking[:20]:
        prefixes.update({s[: -len(key)] for s in stored if s.endswith(f".{key}")})
    most = prefixes.most_common(1)
    return most[0][0] if most and most[0][1] > min(len(lacking), 20) / 2 else ""


class _Index(TypedDict):
    weight_map: Mapping[str, str]


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names, which must all be in its folder."""
    names = sorted(set(build(_Index, read_json(index, ModelError), str(index), ModelError)["weight_map"].values()))
    for name in names:
        file_name(name, f"{index}: each shard", ModelError)
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise ModelError(
            f"{index} names {len(names)} shards, of which {len(missing)} are not in its folder: "
            f"{', '.join(missing[:3])}"
        )
    return tuple(index.parent / n for n in names)


def keys_in(folder: Path) -> set[str]:
    """The keys of all safetensors files in a folder. Raises `ModelError` when there is none, or one is damaged."""
    from safetensors import SafetensorError, safe_open

    keys: set[str] = set()
    for path in sorted(p for p in folder.glob("*.safetensors") if p.is_file()):
        try:
            with safe_open(path, framework="pt") as file:
                keys.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error
    if not keys:
        raise ModelError(f"{folder} holds no safetensors weights")
    return keys


def _header(path: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of one file. The library checks the file; where tensors start is in the header that it checked.

    Format: eight bytes with the length of the header, the header in JSON with ``data_offsets`` counted from its end,
    the values.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # a pipe would be waited for
        raise ModelError(f"{path} is no file")
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length), str(path), ModelError)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None or (key.endswith("weight") and not dtype.is_floating_point):
            raise ModelError(
                f"{path}: {key!r} is stored as {entry['dtype']}: the weights are quantized already. {_WAY_OUT}"
            )
        offset = 8 + length + entry["data_offsets"][0]
        yield key, Stored(file=path, offset=offset, shape=tuple(entry["shape"]), dtype=dtype)
