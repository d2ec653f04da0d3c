"""Which layers a model has, what they do, and what stays at full precision."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.core import KeptParameter, LayerSpec, LayerTable
from mpqsearch.errors import ModelError
from mpqsearch.models.denoiser import Condition, Denoiser

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
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

_ROLES: tuple[tuple[str, str], ...] = (
    ("time", r"time_emb|timestep_emb|time_proj|temb|\btime_embedding|t_embedder|time_text_embed"),
    ("class", r"class_emb|label_emb|class_proj|add_embedding|guidance_embed"),
    (
        "norm",
        r"(^|\.)(norm\w*|adaln\w*|adaLN\w*|scale_shift\w*)\.(linear|proj|\d+)|adaLN_modulation|adaln_single\.linear|^proj_out_1$",
    ),
    ("shortcut", r"shortcut|skip_connection|nin_shortcut|\.skip$|residual_conv"),
    ("resample", r"downsample|upsample|\.op$|upsampler|downsampler"),
    ("attention", r"attn|attention|\.to_(q|k|v|out)|qkv|add_[qkv]_proj"),
    ("feed-forward", r"\.ff\.|\.ff_|\.mlp|feed_forward|\.net\.\d"),
)
_FIRST = re.compile(r"^(conv_in|pos_embed\.proj|x_embedder|proj_in|patch_embed\w*(\.proj)?|input_blocks\.0\.0)$")
_LAST = re.compile(r"^(conv_out|proj_out|proj_out_2|out\.2|final_layer\.linear)$")


def discover(denoiser: Denoiser, cond: Condition = None) -> LayerTable:
    """All weight layers in the order of one forward pass, with MACs for one sample; every other parameter with its reason.

    ``cond`` defaults to class 0 for class-conditional models. Raises `ModelError` when the model has no weight layer.
    """
    modules, borrowers = _owners(denoiser.module)
    if not modules:
        raise ModelError(f"{denoiser.name} has no convolution and no linear layer: there is nothing to quantize")
    macs = _measure(denoiser, modules, cond)
    order = [*macs, *(n for n in modules if n not in macs)]
    first, last = _ends(order, modules, denoiser.sample_shape)
    layers = tuple(
        _spec(
            name,
            modules[name],
            macs.get(name, 0),
            "first" if name == first else "last" if name == last else _role(name, modules[name]),
        )
        for name in order
    )
    return LayerTable(
        digest=denoiser.digest, layers=layers, kept=(*borrowers, *_kept(denoiser.module, modules)), model=denoiser.name
    )


def example_condition(denoiser: Denoiser, n: int) -> Condition:
    """Class labels ``0, 1, ...`` for ``n`` samples, or None for unconditional models."""
    return torch.arange(n) % denoiser.n_classes if denoiser.n_classes else None


@torch.no_grad()
def _measure(denoiser: Denoiser, modules: dict[str, nn.Module], cond: Condition) -> dict[str, int]:
    """MACs of one sample for each layer that runs, in the order in which the layers run."""
    macs: dict[str, int] = {}
    handles = []

    def hook(name: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            # Linear and convolution: weights behind one output, times outputs; a transposed one spreads each input instead.
            each = math.prod(weight.shape[1:])
            positions = (inputs[0] if transposed else output).numel()
            macs[name] = macs.get(name, 0) + positions * each

        return count

    for name, module in modules.items():
        handles.append(module.register_forward_hook(hook(name)))
    try:
        x = torch.zeros(1, *denoiser.sample_shape, device=next(denoiser.module.parameters()).device)
        t = torch.zeros(1, dtype=torch.long, device=x.device)
        denoiser.denoise(x, t, example_condition(denoiser, 1) if cond is None else cond)
    finally:
        for handle in handles:
            handle.remove()
    return macs


def _spec(name: str, module: nn.Module, macs: int, role: str) -> LayerSpec:
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
    )


def _role(name: str, module: nn.Module) -> str:
    for role, pattern in _ROLES:
        if re.search(pattern, name):
            return role
    return "linear" if isinstance(module, nn.Linear) else "conv"


def _ends(order: list[str], modules: dict[str, nn.Module], sample_shape: tuple[int, ...]) -> tuple[str, str]:
    """The layer that takes the sample in and the one that gives the prediction out: by name, else by shape and order."""
    first = next((n for n in order if _FIRST.match(n)), None)
    if first is None:
        takes = [n for n in order if _inputs(modules[n]) == sample_shape[0]]
        first = takes[0] if takes else next(n for n in order if _role(n, modules[n]) not in ("time", "class"))
    last = next((n for n in reversed(order) if _LAST.match(n)), order[-1])
    return first, last if last != first else order[-1]


def _inputs(module: nn.Module) -> int:
    return int(getattr(module, "in_channels", getattr(module, "in_features", 0)))


def _owners(model: nn.Module) -> tuple[dict[str, nn.Module], list[KeptParameter]]:
    """Weight layers by name, and the layers that only borrow the weight of another: it is quantized and stored once."""
    owner: dict[int, str] = {}
    modules: dict[str, nn.Module] = {}
    borrowers: list[KeptParameter] = []
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHT_LAYERS):
            continue
        first = owner.setdefault(id(module.weight), name)
        if first == name:
            modules[name] = module
        else:
            borrowers.append(KeptParameter(name=f"{name}.weight", n_values=0, reason=f"shares the weight of {first}"))
    return modules, borrowers


def _kept(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[KeptParameter]:
    quantized = {id(m.weight) for m in layers.values()}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in quantized or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{key}" if module_name else key
            yield KeptParameter(name=name, n_values=parameter.numel(), reason=_reason(module, key, name))


def _reason(module: nn.Module, key: str, name: str) -> str:
    if isinstance(module, WEIGHT_LAYERS):
        return "bias"
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
