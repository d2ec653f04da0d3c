"""Calls of a denoiser as a pipeline makes them: recorded by a hook, stored without pickle, replayed.

A pipeline passes prompt embeddings, guidance, position ids and more, under names that differ from class to class. A
hook on the denoiser sees all of it, so a recorded call runs any denoiser again and no code per class is needed:

    with capture(pipe.transformer, limit=64) as calls:
        for prompt in ("a lighthouse", "two cats asleep", "a map of Rome", "snow at night"):
            pipe(prompt, num_inference_steps=20)
    save_calls("calls.safetensors", calls)

Several prompts, because a map that is made on one of them fits that one: its error on others was nine times as large,
with four prompts 1.4 times.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, overload
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpqsearch import artifacts, untrusted
from mpqsearch._version import __version__
from mpqsearch.errors import ArtifactError, ConfigError, ModelError
from mpqsearch.models.devices import float_dtype

SCHEMA = "mpqsearch/calls"
VALUES = "mpqsearch/values"

_SAMPLE = ("sample", "hidden_states", "x", "latents", "decoder_input_tokens")
TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t", "timestep_ratio", "decoder_noise_time", "sigma")
_TIMES = re.compile(r"^(t|sigma|timestep_ratio|\w*timesteps?(_r)?|\w+_time)$")
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """One call of a denoiser: what it was given, whatever that is.

    ``args`` and ``kwargs`` hold tensors, numbers, strings and nested tuples, lists and dictionaries of them. ``sample``
    is the noisy input among them, ``batch`` the number of its rows, ``timestep`` the time of the call (NaN when the
    module takes none), ``index`` its position in its run. ``part`` names the denoiser of a `Parts`. Where a pipeline
    batches both halves of classifier-free guidance, both are rows of the call.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    sample: Tensor = field(default_factory=lambda: torch.zeros(1))
    timestep: float = math.nan
    batch: int = 1
    dtype: torch.dtype = torch.float32
    part: str = ""
    index: int = 0

    def times(self, module: nn.Module) -> list[Tensor]:
        """Tensors among the arguments that say when: by the names in the signature of ``module``."""
        owner = module.get_submodule(self.part)
        try:
            bound = inspect.signature(getattr(owner, entry_of(owner))).bind_partial(*self.args, **self.kwargs).arguments
        except TypeError:
            bound = dict(self.kwargs)
        return [t for name, value in bound.items() if _TIMES.match(name) for t in tensors_in(value)]

    def kept(self, pool: MutableMapping[str, Tensor] | None = None) -> Call:
        """A copy that holds nothing of the run: its tensors are detached, in main memory, and change no more.

        Calls that are kept with one ``pool`` share equal tensors, such as embedded prompts.
        """
        copied: MutableMapping[str, Tensor] = {} if pool is None else pool
        args, kwargs, sample = mapped((self.args, dict(self.kwargs), self.sample), lambda t: _pooled(t, copied))
        return replace(self, args=args, kwargs=kwargs, sample=sample)

    def replay(self, module: nn.Module) -> Tensor:
        """The raw prediction of ``module`` for this call, as one tensor: see `prediction_in`.

        Tensors follow the module's device, and its dtype where they had that of the recorded module. Where gradients
        are enabled they are so inside too, whatever the model says: routed experts of some models run under ``no_grad``
        in evaluation, which would look as if no error of theirs reached the output.
        """
        return prediction_in(self.outputs(module), self.sample, type(module).__name__)

    def outputs(self, module: nn.Module) -> Any:
        """What ``module`` returns for this call."""
        device, dtype = next(module.parameters()).device, float_dtype(module)

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.dtype == self.dtype else value.dtype)

        with gradients_everywhere():
            owner = module.get_submodule(self.part)
            return invoke(owner, mapped(self.args, move), mapped(dict(self.kwargs), move))


def invoke(owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a part by its `entry_of`."""
    entry = entry_of(owner)
    if entry != "denoise":
        return owner(*args, **kwargs) if entry == "forward" else owner.decode(*args, **kwargs)  # type: ignore[operator]
    clock: Any = getattr(owner, "timestep_clock", None)  # of a model whose activation scales go by the timestep
    if clock is not None:
        clock.set(args[1])
    return owner.denoise(*args, **kwargs)  # type: ignore[operator]


def entry_of(owner: nn.Module) -> str:
    """The method of a part that computes: ``denoise(x, t, cond)`` where it has one, ``decode`` of an autoencoder."""
    if hasattr(owner, "denoise"):
        return "denoise"
    return "decode" if "Autoencoder" in type(owner).__name__ else "forward"


def prediction_in(outputs: Any, sample: Tensor, owner: str) -> Tensor:
    """The prediction among what a denoiser returned for ``sample``: all rows, a learned variance dropped.

    Several outputs (the residuals of a ControlNet, sound beside pictures) come flattened and joined as ``[1, values]``.
    Raises `ModelError` when there is none.
    """
    found = [t for t in tensors_in(outputs) if t.is_floating_point()]
    if not found:
        raise ModelError(f"{owner} returned no floating-point tensor ({type(outputs).__name__}): it predicts nothing")
    if len(found) > 1:
        return torch.cat([t.reshape(1, -1) for t in found], dim=1)
    (result,) = found
    learned = result.dim() == sample.dim() > 1 and result.shape[1] == 2 * sample.shape[1]
    return result[:, : sample.shape[1]] if learned and result.shape[2:] == sample.shape[2:] else result


def gradients_everywhere() -> AbstractContextManager[Any]:
    """Where gradients are enabled they are so inside too, whatever a model says."""
    return _Differentiable() if torch.is_grad_enabled() else nullcontext()


class _Differentiable(TorchFunctionMode):
    """Inside, ``no_grad`` of a model has no effect.

    Only the switch itself is turned: operations of an `torch.autograd.Function` stay without a graph, which nothing
    would ever free.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; what would turn gradients off turns them on."""
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func is Tensor.scatter_reduce_ and len(args) == 4 and kwargs == {"reduce": "sum"}:
            # The same sum, and repeatable in place: it keeps nothing for its gradient.
            func, kwargs = Tensor.scatter_add_, {}
        if getattr(func, "__name__", "") == "_set_grad_enabled":  # what `torch.no_grad` and its like call
            args = (True,)
        return func(*args, **(kwargs or {}))


class Calls(Sequence[Call]):
    """Recorded calls in the order in which they were made. ``seen`` counts all that went by, ``model`` names the
    class."""

    def __init__(self, calls: Sequence[Call] = (), *, model: str = "", seen: int | None = None) -> None:
        self._calls = list(calls)
        self.model = model
        self.seen = len(self._calls) if seen is None else seen

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> Calls: ...
    def __getitem__(self, index: int | slice) -> Call | Calls:
        """One call, or the calls of a slice."""
        if isinstance(index, slice):
            return Calls(self._calls[index], model=self.model, seen=self.seen)
        return self._calls[index]

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return artifacts.digest_of(_Encoder().encode(self.to_data()))

    def to_data(self) -> dict[str, Any]:
        """All calls as nested values."""
        calls = [{f.name: getattr(call, f.name) for f in fields(call)} for call in self]
        return {"model": self.model, "seen": self.seen, "calls": calls}


@contextmanager
def capture(module: nn.Module, *, limit: int = 64, leave_out: Sequence[str] = (), seed: int = 0) -> Iterator[Calls]:
    """Record the calls of ``module`` while the block runs; the `Calls` fill when it ends.

    limit
        Calls to keep at most. When more go by, each timestep keeps the same number (within one), drawn evenly from its
        calls with ``seed``.
    leave_out
        Keyword arguments that are not recorded, such as caches, which a replay without them does the same with.

    Tensors are copied to main memory; equal ones, such as the prompt embeddings of all steps, are kept once. Raises
    `ModelError` naming the argument when a value is neither plain data nor a tensor, and when the block ends without a
    call.
    """
    calls, recorder = Calls(model=type(module).__name__), Recorder(limit, leave_out=leave_out, seed=seed)

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.add(module, args, kwargs)

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
    if not recorder.seen:
        raise ModelError(
            f"{type(module).__name__} was not called while its calls were recorded. Run the pipeline inside the "
            "block, and give the module that it calls (pipe.unet or pipe.transformer)."
        )
    calls._calls, calls.seen = recorder.calls(), recorder.seen


def save_calls(path: str | Path, calls: Calls) -> None:
    """Write calls as one safetensors file; the structure of the arguments is JSON in its header."""
    _write(Path(path), SCHEMA, calls.to_data())


def load_calls(path: str | Path) -> Calls:
    """Read what `save_calls` wrote. Raises `ArtifactError` when it is missing, damaged, of another kind or version."""
    value = _read(Path(path), SCHEMA, "Record the calls of a pipeline with `mpqsearch record`.")
    stored = untrusted.build(_Stored, value, f"{path} is damaged or no whole record")
    return Calls(stored["calls"], model=stored["model"], seen=stored["seen"])


class _Stored(TypedDict):
    """What a file of calls holds."""

    model: str
    seen: int
    calls: tuple[Call, ...]


def save_values(path: Path, value: Any) -> None:
    """Write nested tuples, lists and dictionaries of tensors, numbers and strings as one safetensors file."""
    _write(path, VALUES, value)


def load_values(path: Path) -> Any:
    """Read what `save_values` wrote. Raises `ArtifactError` as `load_calls` does."""
    return _read(path, VALUES, "")


def _write(path: Path, schema: str, value: Any) -> None:
    from safetensors.torch import save

    encoder = _Encoder()
    data = {"value": encoder.encode(value)}
    body = {
        "schema": schema,
        "version": artifacts.VERSIONS[schema],
        "created_by": f"mpqsearch {__version__}",
        "digest": artifacts.digest_of(data),
        "data": data,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with artifacts.atomic_write(path) as handle:
        handle.write(save(encoder.tensors, metadata={"mpqsearch": json.dumps(body)}))


def _read(path: Path, schema: str, advice: str) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ArtifactError(f"{path} does not exist. {advice}".rstrip())
    try:
        with safe_open(path, framework="pt") as file:
            body = untrusted.parse_json((file.metadata() or {}).get("mpqsearch", "{}"), str(path))
            # Clones: the file's own memory is not aligned, and vectorised sums over it round otherwise than those of
            # the recording.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    header = untrusted.build(_Header, body, f"{path} is damaged or no artifact of mpqsearch")
    if header["schema"] != schema:
        raise ArtifactError(f"{path} holds {untrusted.quoted(header['schema'])}, but {schema!r} is needed")
    if header["version"] != artifacts.VERSIONS[schema]:
        raise ArtifactError(
            f"{path} has version {header['version']} of {schema!r}; this mpqsearch ({__version__}) reads version "
            f"{artifacts.VERSIONS[schema]}. {advice}".rstrip()
        )
    changed = any(_key(tensor) != key for key, tensor in tensors.items())
    if changed or header.get("digest") not in (None, artifacts.digest_of(header["data"])):
        raise ArtifactError(f"{path} was changed after it was written, or is damaged. {advice}".rstrip())
    try:
        return _decoded(header["data"]["value"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # values that are not as `_Encoder` writes them
        raise ArtifactError(f"{path} is damaged or no whole record: {type(error).__name__} {error}") from error


class _Header(TypedDict):
    """The envelope of a safetensors file; earlier versions gave no digest."""

    schema: str
    version: int
    digest: NotRequired[str]
    data: dict[str, Any]


class Recorder:
    """Keeps ``limit`` calls, as evenly over timesteps as it goes; within a timestep those with the smallest random
    keys. See `capture`."""

    def __init__(self, limit: int, *, leave_out: Sequence[str] = (), seed: int = 0) -> None:
        if limit < 1:
            raise ConfigError(f"at least 1 call must be recorded, got {limit}")
        self._limit, self._leave_out = limit, leave_out
        self._random = random.Random(seed)  # noqa: S311  (which calls are kept is no secret)
        self._strata: dict[float, list[tuple[float, int, Call]]] = {}
        self._pool: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._first = self._last = math.nan
        self._index = -1
        self.seen = 0

    def add(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, part: str = "", index: int = -1
    ) -> None:
        """Copy a call of ``owner``, unless its turn does not come. Where its ``index`` is not known, a new run begins
        when the first timestep comes back."""
        wanted = {k: v for k, v in kwargs.items() if k not in self._leave_out}
        _check(args, wanted, type(owner).__name__)
        call = call_of(owner, args, wanted, part=part, index=index).kept(self._pool)
        if index < 0:
            call = replace(call, index=self._counted(call.timestep))
        stratum = self._strata.setdefault(call.timestep if math.isfinite(call.timestep) else 0.0, [])
        stratum.append((self._random.random(), self.seen, call))
        self.seen += 1
        if sum(map(len, self._strata.values())) > self._limit:
            fullest = max(self._strata.values(), key=lambda stratum: (len(stratum), max(stratum, default=(0.0,))[0]))
            fullest.remove(max(fullest, key=lambda entry: entry[0]))

    def _counted(self, timestep: float) -> int:
        """The position of a call in its run."""
        if not self.seen:
            self._first = timestep
        begins = timestep == self._first != self._last
        self._index, self._last = 0 if begins else self._index + 1, timestep
        return self._index

    def calls(self) -> list[Call]:
        """Those that were kept, in the order in which they were made."""
        entries = [entry for stratum in self._strata.values() for entry in stratum]
        return [call for _, _, call in sorted(entries, key=lambda entry: entry[1])]


def call_of(
    owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, part: str = "", index: int = 0
) -> Call:
    """A call of ``owner`` from its arguments: which of them is the sample, and which the time."""
    try:
        bound = dict(inspect.signature(getattr(owner, entry_of(owner))).bind_partial(*args, **kwargs).arguments)
    except TypeError:  # the module's own forward will say what is wrong
        bound = dict(kwargs)
    named = [bound[n] for n in _SAMPLE if n in bound] + list(bound.values())
    wide = [(v, t) for v in named for t in tensors_in(v) if t.dim() > 1]
    # Text encoders take no floats: their sample are the words.
    holder, sample = next((p for p in wide if p[1].is_floating_point()), wide[0] if wide else (None, torch.zeros(1)))
    return Call(
        args=args,
        kwargs=kwargs,
        sample=sample,
        timestep=next((_number(bound[n]) for n in TIMESTEP_ARGUMENTS if n in bound), math.nan),
        batch=len(holder) if isinstance(holder, (list, tuple)) else len(sample),
        dtype=float_dtype(owner),
        part=part,
        index=index,
    )


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel():
        return float(value.flatten()[0])
    return float(value) if isinstance(value, (int, float)) else math.nan


def _pooled(value: Tensor, pool: MutableMapping[str, Tensor]) -> Tensor:
    """A copy in main memory; the same object for equal content."""
    copy = in_memory(value)
    return pool.setdefault(_key(copy), copy)


def in_memory(value: Tensor) -> Tensor:
    """A copy in main memory with an ordinary layout, whatever the strides of the original.

    ``contiguous()`` is not enough: an expanded tensor of one value counts as contiguous and keeps its stride of 0.
    """
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _key(value: Tensor) -> str:
    total = hashlib.sha256(f"{value.dtype}|{tuple(value.shape)}|".encode())
    total.update(in_memory(value).flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


def _check(args: tuple[Any, ...], kwargs: Mapping[str, Any], owner: str) -> None:
    """Refuse what can neither be stored nor replayed."""
    for name, value in [
        *((f"argument {i}", a) for i, a in enumerate(args)),
        *((f"argument {k!r}", v) for k, v in kwargs.items()),
    ]:
        bad = _unknown(value)
        if bad is not None:
            raise ModelError(
                f"{owner}: {name} holds a {type(bad).__module__}.{type(bad).__name__}, which can be neither stored "
                "nor replayed. "
                "Name it in capture(..., leave_out=(...)) if the denoiser works without it."
            )


def _unknown(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return next((bad for v in value if (bad := _unknown(v)) is not None), None)
    if isinstance(value, Mapping):
        return next((bad for k, v in value.items() if (bad := _unknown(k) or _unknown(v)) is not None), None)
    return None if isinstance(value, (*_PLAIN, Tensor, np.ndarray, torch.dtype)) else value


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed; outputs of diffusers' and transformers' own classes keep them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        items = [mapped(v, change) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict) and is_dataclass(type(value)):  # a ModelOutput
        return type(value)(**{k: mapped(v, change) for k, v in value.items()})
    if isinstance(value, Mapping):
        return {k: mapped(v, change) for k, v in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a nested structure, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name))


class _Encoder:
    """Nested values as JSON data with names in the place of tensors, and the ``tensors`` by name (a digest: equal ones
    are stored once)."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._keys: dict[int, str] = {}

    def encode(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            key = self._keys.get(id(value)) or self._keys.setdefault(id(value), _key(value))
            self.tensors.setdefault(key, in_memory(value))
            return {"tensor": key}
        if isinstance(value, np.ndarray):
            held = torch.from_numpy(np.ascontiguousarray(value))
            self.tensors.setdefault(_key(held), held)
            return {"array": _key(held)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            return {"list" if isinstance(value, list) else "tuple": [self.encode(v) for v in value]}
        if isinstance(value, Mapping):
            return {"dict": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        return value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{untrusted.quoted(name)} is no data type of torch")
    return found


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dtype":
        return _dtype(content)
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {_decoded(k, tensors): _decoded(v, tensors) for k, v in content}
    if kind not in ("list", "tuple") or not isinstance(content, list):
        raise ValueError(f"{untrusted.quoted(kind)} is no kind of value")
    items = [_decoded(v, tensors) for v in content]
    return items if kind == "list" else tuple(items)
