"""A model on disk: its structure from the configuration, without weights; its weights from safetensors, one tensor at a
time.

So a model larger than memory can be listed and its weights measured. Nothing here keeps a weight: a tensor that
`StreamedModel.read` returns is mapped from its file and given back when the caller drops it.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mpqsearch.core import LayerTable
from mpqsearch.errors import ModelError, NumericsError
from mpqsearch.models.calls import Call, call_of
from mpqsearch.models.discover import table_of
from mpqsearch.models.files import Stored, check_keys, check_shapes, refuse_quantized, weight_files
from mpqsearch.models.loader import classes_of, sample_shape_of, structure
from mpqsearch.models.runner import Parts
from mpqsearch.progress import Progress
from mpqsearch.sources import denoiser_folders, kind_of, local_folder, model_name, read_config

log = logging.getLogger("mpqsearch")

_PIECE = 1 << 18
"""Values that are hashed at a time: in float32 they stay in the second-level cache."""


@dataclass(frozen=True, kw_only=True)
class StreamedModel:
    """A denoiser whose weights stay on disk.

    ``module`` has the structure and the shapes, on the device ``meta``. ``stored`` maps every key of its state dict to
    the file that holds it; keys that share one parameter share one place.
    """

    name: str
    module: nn.Module
    stored: Mapping[str, Stored]
    source: str = ""

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
        stride = place.n_bytes // max(first, 1)
        try:
            # Of these values alone, and private: their pages go when the tensor goes.
            offset, size = place.offset + start * stride, (stop - start) * stride
            mapped = np.memmap(place.file, mode="c", offset=offset, shape=(size,))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {key!r} from {place.file}: {error}") from error
        shape = (stop - start, *place.shape[1:]) if place.shape else ()
        return torch.from_numpy(mapped).view(place.dtype).reshape(shape)

    def digest(self, progress: Progress | None = None) -> str:
        """What `weights_digest` gives for the loaded model in float32: SHA-256 over names, dtypes, shapes and bytes.

        One pass over the file. Raises `NumericsError` when a weight is not finite, or a buffer holds NaN.
        """
        total = hashlib.sha256()
        done, size = 0, sum(s.n_bytes for s in self.stored.values())
        parameters = {key for key, _ in self.module.named_parameters(remove_duplicate=False)}
        buffer = torch.empty(_PIECE)  # one for all pieces: making it anew costs more page faults than the conversion
        for key, meta in sorted(self.module.state_dict().items()):
            dtype = torch.float32 if meta.is_floating_point() else meta.dtype
            total.update(f"{key}|{dtype}|{tuple(meta.shape)}|".encode())
            for piece in torch.split(self.read(key).flatten(), _PIECE):
                part = _converted(piece, dtype, buffer)
                if dtype == torch.float32:
                    self._check_finite(key, part, parameter=key in parameters)
                total.update(part.contiguous().view(torch.uint8).numpy().data)
            done += self.stored[key].n_bytes
            if progress is not None:
                progress("read weights", done, size)
        return total.hexdigest()

    def _check_finite(self, key: str, part: Tensor, *, parameter: bool) -> None:
        # A sum is finite unless a value is not, or it overflows: looking at every value is left for then.
        if math.isfinite(part.sum()):
            return
        wrong = ~torch.isfinite(part) if parameter else torch.isnan(part)
        if bool(wrong.any()):
            what = f"the weight {key!r} holds NaN or infinity" if parameter else f"the buffer {key!r} holds NaN"
            raise NumericsError(f"{self.name}: {what}. Repair or reload the checkpoint.")


def _converted(piece: Tensor, dtype: torch.dtype, buffer: Tensor) -> Tensor:
    """``piece`` as ``dtype``, in ``buffer`` when that is float32."""
    if piece.dtype == dtype:
        return piece
    return buffer[: len(piece)].copy_(piece) if dtype == torch.float32 else piece.to(dtype)


def open_streamed(source: str, *, component: str | Sequence[str] = "") -> StreamedModel:
    """Open a model folder without loading its weights.

    source
        An embedded name, a folder with ``config.json`` and safetensors (one file, or shards with an index), or a
        pipeline folder.
    component
        Part of a pipeline, as for `mpqsearch.sampling.load_model`.

    Raises `ModelError` when the source is no folder or no diffusers model, holds no safetensors, or when its weights do
    not fit its configuration.
    """
    folder = local_folder(source)
    if folder is None:
        raise ModelError(f"{source!r} is no folder: weights are streamed from the disk. Save the model in one first.")
    parts: dict[str, nn.Module] = {}
    stored: dict[str, Stored] = {}
    for name, inner in denoiser_folders(source, folder, component).items():
        if kind_of(name):
            raise ModelError(f"the {name} of {source} cannot be streamed from the disk, only denoisers: load the model")
        config = read_config(inner / "config.json")
        refuse_quantized(inner, config)
        found = weight_files(inner).tensors()
        parts[name] = structure(inner, config, len(found)).eval().requires_grad_(False)
        stored |= {f"{name}.{key}" if name else key: place for key, place in _placed(inner, parts[name], found)}
    module = parts[""] if "" in parts else Parts(parts)
    return StreamedModel(name=model_name(source), module=module, stored=stored, source=source)


def discover_streamed(model: StreamedModel, *, progress: Progress | None = None) -> LayerTable:
    """`discover` for a model on disk: the same layers, shapes, roles and digest, without its weights in memory.

    MACs and what else only a run shows come from a run of the structure on the device ``meta``, with inputs made up
    from the configuration. Where no such run succeeds MACs are 0, the roles go by names alone, and one line says so.
    """
    return replace(structure_table(model), digest=model.digest(progress))


def structure_table(model: StreamedModel) -> LayerTable:
    """The layers of a model on disk, without reading a weight and so without the digest of `discover_streamed`."""
    for calls in _made_up(model.module):
        try:
            return table_of(model.module, calls, name=model.name)
        except Exception as error:  # noqa: BLE001  (any model may fail on meta tensors or made-up inputs, in its own way)
            log.info("%s: no run on meta tensors: %s", model.name, error)
    log.warning(
        "%s: its structure could not be run without weights, so MACs are 0 and roles go by names; a profile that runs "
        "the model has both",
        model.name,
    )
    return table_of(model.module, (), name=model.name)


def _made_up(module: nn.Module) -> Iterator[list[Call]]:
    """Inputs that may run a structure: a sample and a time, then with a class or with text."""
    config = dict(getattr(module, "config", {}))
    shape, width = sample_shape_of(config), config.get("cross_attention_dim")
    more = {"class_labels": torch.zeros(1, dtype=torch.long)} if classes_of(config)[0] else {}
    if not shape:
        return
    for extra in (more, {"encoder_hidden_states": torch.zeros(1, 77, width)} if isinstance(width, int) else None):
        if extra is not None:
            sample = torch.zeros(()).expand(1, *shape)  # no memory, whatever the configuration says of its size
            yield [call_of(module, (sample, torch.zeros(1, dtype=torch.long)), extra)]


def _placed(folder: Path, module: nn.Module, stored: Mapping[str, Stored]) -> Iterator[tuple[str, Stored]]:
    """Every key of the state dict with its place; raises `ModelError` where shape or presence differ."""
    meta = module.state_dict(keep_vars=True)
    same: dict[int, str] = {}  # parameters under several names are stored under one
    for key, tensor in meta.items():
        if key in stored:
            same.setdefault(id(tensor), key)
    missing = [k for k, t in meta.items() if k not in stored and id(t) not in same]
    check_keys(str(folder), missing, stored.keys() - meta.keys(), stored)
    check_shapes(str(folder), meta, stored)
    for key, tensor in meta.items():
        yield key, stored[key if key in stored else same[id(tensor)]]
