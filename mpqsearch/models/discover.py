"""Which layers a model has, what they do, and what stays at full precision."""

from __future__ import annotations

import logging
import math
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from mpqsearch.core import KeptParameter, LayerSpec, LayerTable
from mpqsearch.errors import ModelError
from mpqsearch.models.calls import Call, tensors_in
from mpqsearch.models.denoiser import Condition, Denoiser, Given

log = logging.getLogger("mpqsearch")

WEIGHT_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)

_ROLES: tuple[tuple[str, str], ...] = (
    ("time", r"time_emb|timestep_emb|time_proj|temb|\btime_embedding|(?<![a-z])t_embedder|time_text_embed"),
    ("class", r"class_emb|label_emb|class_proj|add_embedding|guidance_embed"),
    (
        "norm",
        r"(^|\.)(norm\w*|adaln\w*|adaLN\w*|scale_shift\w*)\.(linear|proj|\d+)|adaLN_modulation|adaln_single\.linear|^proj_out_1$",
    ),
    ("shortcut", r"shortcut|skip_connection|nin_shortcut|\.skip$|residual_conv"),
    ("resample", r"downsample|upsample|\.op$|upsampler|downsampler|(up|down)_sample|(up|down)scalers"),
    ("attention", r"attn|attention|\.to_(q|k|v|out)|qkv|add_[qkv]_proj|kv_mapper"),
    ("feed-forward", r"\.ff\.|\.ff_|\.ffn\.|mlp|feed_forward|\.net\.\d|DenseReluDense|\.(gate|up|down)_proj$"),
)
_OWN_TIME = re.compile(r"(time_emb|time_proj|timestep|(?<![a-z])t_embedder)\w*(\.\w+)?$")
_MODULATION = re.compile(
    r"norm|adaln|modul|_mod\.|film|scale_bias|scale_shift|gamma|beta|context_mlp|mapper|time_mod", re.IGNORECASE
)
_SKIP = re.compile(r"skip_linear|skip_proj|skip_layer|skip_connection|linear_skip|long_skip")
_QKV = re.compile(r"(^|_)(q|k|v|query|key|value)(_proj|_lin(ear)?)?\d*$")
_QKV_GROUP = re.compile(r"(^|_)(q|k|v|query|key|value)(?=_|\d|$)")
_APART = "its weight is used without calling the layer, so its input cannot be measured: kept at full precision"
EXAMPLES = 4
"""Recorded calls on which the layers of a model are looked for."""

_FIRST = re.compile(r"^(conv_in|pos_embed\.proj|x_embedder|proj_in|patch_embed\w*(\.proj)?|input_blocks\.0\.0)$")
_LAST = re.compile(r"^(conv_out|proj_out|proj_out_2|out\.2|final_layer\.linear)$")


def discover(denoiser: Denoiser, cond: Given = None, *, run: bool = True) -> LayerTable:
    """All weight layers in the order of one forward pass, with MACs for one sample; every other parameter with its
    reason.

    The model runs once on ``cond`` (default: class 0 of class-conditional models), or on a few of the denoiser's
    recorded calls. Layers that do not run get the role ``unused``, and layers whose weight is used without calling them
    are kept, since their input cannot be seen. With ``run`` off nothing of that is seen: MACs are 0 and roles go by
    names and shapes. Raises `ModelError` when the model has no weight layer.
    """
    modules, borrowers = _owners(denoiser.module)
    if not modules:
        raise ModelError(f"{denoiser.name} has no convolution and no linear layer: there is nothing to quantize")
    seen = _observe(denoiser, modules, cond) if run else _Seen()
    apart = {n: m for n, m in modules.items() if n not in seen.macs and n in seen.used}
    layers = {n: modules[n] for n in [*seen.macs, *(n for n in modules if n not in seen.macs and n not in apart)]}
    if not layers:
        raise ModelError(
            f"{denoiser.name}: every weight is used without calling its layer, so no input can be measured"
        )
    first, last = _ends(list(layers), modules, seen, denoiser.sample_shape)
    unused = [n for n in layers if n not in seen.macs] if run else []
    if unused:
        log.warning(
            "%s: %d layers did not run on the examples and are held at 8 bits, such as %s",
            denoiser.name,
            len(unused),
            unused[0],
        )

    def role(name: str) -> str:
        if name in unused:
            return "unused"
        if name in (first, last):
            return "first" if name == first else "last"
        found = _role(name, modules[name])
        if found in ("shortcut", "linear", "conv") and (name in seen.joined or _SKIP.search(name)):
            return "skip"
        if found == "time" and _OWN_TIME.search(name):
            return found
        if found in ("time", "linear", "conv", "feed-forward") and name in seen.conditional:
            return "norm" if found != "time" and _MODULATION.search(name) else seen.conditional[name]
        return "linear" if found == "time" and name in seen.tokens else found

    return LayerTable(
        digest=denoiser.digest,
        layers=tuple(_spec(n, m, seen.macs.get(n, 0), role(n), seen.fuse.get(n, "")) for n, m in layers.items()),
        kept=(*borrowers, *_kept(denoiser.module, layers, apart)),
        model=denoiser.name,
    )


def example_condition(denoiser: Denoiser, n: int) -> Condition:
    """Class labels ``0, 1, ...`` for ``n`` samples, or None for unconditional models."""
    return torch.arange(n) % denoiser.n_classes if denoiser.n_classes else None


@dataclass
class _Seen:
    """What a forward pass showed, by layer name.

    ``macs`` of one sample, in the order in which layers run; ``used``: weights that any function took; ``joined``:
    layers fed with a concatenation along their input channels; ``fuse``: group of projections of one input; ``takes``:
    layers fed with the sample itself; ``gives``: layers whose output reaches the prediction through no other layer.
    ``conditional``: layers that do not depend on the sample, but on the time (``time``) or on one vector of other
    conditions (``class``); ``tokens``: those that depend on neither.
    """

    macs: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)
    fuse: dict[str, str] = field(default_factory=dict)
    takes: list[str] = field(default_factory=list)
    gives: frozenset[str] = frozenset()
    conditional: dict[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


class _Watch(TorchFunctionMode):
    """Follows tensors through every torch function: which come from the sample or from a layer, which are
    concatenations."""

    def __init__(self, weights: dict[int, str], seen: _Seen) -> None:
        super().__init__()
        self._weights, self._seen = weights, seen
        self.origin: Any = (
            WeakIdKeyDictionary()
        )  # tensor -> names of the layers that it comes from; SAMPLE for the model's input
        self.depends: Any = WeakIdKeyDictionary()  # tensor -> SAMPLE, TIME or both, through whatever layers
        self.joins: Any = WeakIdKeyDictionary()  # concatenation -> its axis and the origins of its parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and pass on where its result comes from."""
        out = func(*args, **(kwargs or {}))
        if (
            torch.compiler.is_compiling()
        ):  # flexible attention is compiled as it runs, and the compiler would look in here
            return out
        results = list(tensors_in(out))
        if getattr(func, "__name__", "") == "__get__" or not results:  # a weight's type or size is no use of it
            return out
        inputs = list(tensors_in((args, kwargs)))
        names = {self._weights[id(t)] for t in inputs if id(t) in self._weights}
        self._seen.used |= names
        came = frozenset(names) or frozenset().union(*(self.origin.get(t, frozenset()) for t in inputs))
        on = frozenset().union(*(self.depends.get(t, frozenset()) for t in inputs))
        for result in results if came or on else ():
            self.origin[result] = came
            self.depends[result] = on
        if func in (torch.cat, torch.concat, torch.concatenate) and isinstance(out, Tensor):
            axis = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            parts = [self.origin.get(t, frozenset()) for t in inputs if SAMPLE in self.depends.get(t, ())]
            self.joins[out] = (axis % out.dim(), parts)
        return out

    def joined(self, x: Tensor, axis: int, parent: str) -> bool:
        """True when ``x`` joins along its channels two streams of the sample that both come from outside ``parent``.

        The parts that one block makes of one stream, such as attention beside feed-forward, are no skip connection.
        """
        found, parts = self.joins.get(x, (None, []))
        away = [p for p in parts if any(not n.startswith(f"{parent}.") for n in p - {SAMPLE})]
        return found == axis % x.dim() and len(away) > 1


SAMPLE, TIME = "<sample>", "<time>"


@torch.no_grad()
def _observe(denoiser: Denoiser, modules: dict[str, nn.Module], cond: Given) -> _Seen:
    """Run the model on its examples and look."""
    seen = _Seen()
    watch = _Watch({id(m.weight): n for n, m in modules.items()}, seen)
    siblings: dict[str, list[tuple[Any, str]]] = {}
    device = next(denoiser.module.parameters()).device
    examples: list[Given] = [cond]
    if cond is None:
        examples = list(denoiser.calls[:: max(1, len(denoiser.calls) // EXAMPLES)][:EXAMPLES]) or [
            example_condition(denoiser, 1)
        ]
    batch = 1

    def hook(name: str) -> Any:
        channels = -1 if isinstance(modules[name], nn.Linear) else 1
        transposed = isinstance(modules[name], nn.modules.conv._ConvTransposeNd)
        # Linear and convolution: weights behind one output, times outputs; a transposed one spreads each input instead.
        weight: Any = modules[name].weight
        each = math.prod(weight.shape[1:])
        parent, _, short = name.rpartition(".")

        def look(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen.macs[name] = seen.macs.get(name, 0) + (x if transposed else output).numel() * each // batch
            if watch.joined(x, channels, parent):
                seen.joined.add(name)
            on = watch.depends.get(x, frozenset())
            if TIME in on and SAMPLE not in on:
                seen.conditional[name] = "time"
            elif not on and x.numel() <= batch * x.shape[-1]:
                seen.conditional[name] = "class"
            elif not on:
                seen.tokens.add(name)
            if SAMPLE in watch.origin.get(x, ()) and name not in seen.takes:
                seen.takes.append(name)
            if _QKV.search(short) and name not in seen.fuse:
                group = siblings.setdefault(parent, [])
                mates = [other for ref, other in group if ref() is x]
                group.append((weakref.ref(x), name))
                if mates:
                    for mate in (mates[0], name):
                        seen.fuse[mate] = f"{parent}.[{_QKV_GROUP.sub('', mates[0].rpartition('.')[2])}]"

        return look

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        for example in examples:
            if isinstance(example, Call):
                x, batch = example.sample, example.batch
                t, times = torch.zeros(1), example.times(denoiser.module)
            else:
                x = torch.zeros(1, *denoiser.sample_shape, device=device)
                t = torch.zeros(1, dtype=torch.long, device=device)
                times = [t]
                example = example.to(device) if isinstance(example, Tensor) else example  # noqa: PLW2901
            watch.origin[x] = watch.depends[x] = frozenset({SAMPLE})
            for time in times:
                watch.depends[time] = frozenset({TIME})
            with watch:
                out = denoiser.denoise(x, t, example)
                seen.gives |= watch.origin.get(out, frozenset()) & set(modules)
            siblings.clear()
    finally:
        for handle in handles:
            handle.remove()
    seen.macs = {n: m // len(examples) for n, m in seen.macs.items()}
    if (
        "time" not in seen.conditional.values()
    ):  # the time was given as a number, and nothing can be said of what depends on it
        seen.conditional, seen.tokens = {}, set()
    return seen


def _spec(name: str, module: nn.Module, macs: int, role: str, fuse: str = "") -> LayerSpec:
    weight: Tensor = module.weight  # type: ignore[assignment]
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    kind = next(base.__name__ for base in type(module).__mro__ if base in WEIGHT_LAYERS)
    return LayerSpec(
        name=name,
        kind=kind,
        weight_shape=tuple(weight.shape),
        channel_axis=1 if transposed else 0,
        groups=int(getattr(module, "groups", 1)),
        macs=macs,
        role=role,
        has_bias=getattr(module, "bias", None) is not None,
        fuse=fuse,
    )


def _role(name: str, module: nn.Module) -> str:
    for role, pattern in _ROLES:
        if re.search(pattern, name):
            return role
    return "linear" if isinstance(module, nn.Linear) else "conv"


def _ends(
    order: list[str], modules: dict[str, nn.Module], seen: _Seen, sample_shape: tuple[int, ...]
) -> tuple[str, str]:
    """The layer that takes the sample in and the one that gives the prediction out: by name, else by what was seen,
    else by shape and order."""
    ran = seen.macs or order
    first = next((n for n in order if n in ran and _FIRST.match(n)), None) or next(iter(seen.takes), None)
    if first is None:
        takes = [n for n in order if sample_shape and _inputs(modules[n]) == sample_shape[0]]
        first = (
            takes[0] if takes else next((n for n in order if _role(n, modules[n]) not in ("time", "class")), order[0])
        )
    last = next((n for n in reversed(order) if n in ran and _LAST.match(n)), None)
    if last is None:
        last = next((n for n in reversed(order) if n in seen.gives), None) or [*seen.macs, *order][len(seen.macs) - 1]
    return first, last if last != first else order[-1]


def _inputs(module: nn.Module) -> int:
    return int(getattr(module, "in_channels", getattr(module, "in_features", 0)))


def _owners(model: nn.Module) -> tuple[dict[str, nn.Module], list[KeptParameter]]:
    """Weight layers by name, and the layers that only borrow the weight of another: it is quantized and stored once."""
    owner: dict[int, str] = {}
    modules: dict[str, nn.Module] = {}
    borrowers: list[KeptParameter] = []
    for name, module in model.named_modules():
        # A weight that is computed as the layer runs is no parameter: what it is computed from stays as it is.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if not isinstance(module, WEIGHT_LAYERS) or weight is None or not weight.numel():
            continue
        first = owner.setdefault(id(weight), name)
        if first == name:
            modules[name] = module
        else:
            borrowers.append(KeptParameter(name=f"{name}.weight", n_values=0, reason=f"shares the weight of {first}"))
    return modules, borrowers


def _kept(model: nn.Module, layers: dict[str, nn.Module], apart: dict[str, nn.Module]) -> Iterator[KeptParameter]:
    quantized = {id(m.weight) for m in layers.values()}
    unseen = {id(m.weight) for m in apart.values()}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in quantized or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{key}" if module_name else key
            yield KeptParameter(
                name=name,
                n_values=parameter.numel(),
                reason=_APART if id(parameter) in unseen else _reason(module, key, name),
            )
    parameters = {id(p) for p in model.parameters()}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in parameters and id(value) not in seen:
            seen.add(id(value))
            yield KeptParameter(name=name, n_values=value.numel(), reason="persistent buffer")


def _reason(module: nn.Module, key: str, name: str) -> str:
    if isinstance(module, WEIGHT_LAYERS):
        return "bias" if key == "bias" else "a weight is computed from it as the layer runs"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding table"
    if isinstance(module, _NORMS) or re.search(r"norm", type(module).__name__, re.IGNORECASE):
        return "normalization"
    if key == "bias":
        return "bias"
    log.warning(
        "%s (%s) holds weights that no quantizer here knows; they stay at full precision and are counted so",
        name,
        type(module).__name__,
    )
    return f"unknown module {type(module).__name__}: kept at full precision"
