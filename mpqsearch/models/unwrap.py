"""A user's module as it is needed here: plain weights, evaluation mode, no gradients; the original is not changed."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mpqsearch.errors import ModelError

_COMPILED = "_orig_mod"
"""Name of the inner module of what ``torch.compile`` returns."""

_LORA = re.compile(r"(^|\.)(base_layer\.|lora_[AB]\b|lora_magnitude_vector|lora_embedding)")


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that shares the memory of its weights, in evaluation mode and without gradients.

    Wrappers of ``torch.compile``, ``DataParallel`` and of accelerate's offloading are taken off; weight norm, spectral
    norm and other parametrizations are folded into the weights that they give. Raises `ModelError`, with the way out,
    for modules with LoRA adapters, fused projections, weights that are quantized already, or weights elsewhere.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    _refuse_unusable(module)
    duplicate = _shared_copy(module)
    for parent in list(duplicate.modules()):
        for name, child in list(parent.named_children()):
            if (inner := _inner(child)) is not None:
                setattr(parent, name, inner)
    _remove_offloading(duplicate)
    duplicate.eval()
    _fold_norms(duplicate)
    if hasattr(duplicate, "enable_gradient_checkpointing") and not hasattr(duplicate, "gradient_checkpointing"):
        # Some classes of diffusers read it and never set it.
        duplicate.gradient_checkpointing = False  # type: ignore[assignment]
    return duplicate.requires_grad_(False)


def _inner(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None when it is no wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = module.module
        return inner
    return dict(module.named_children()).get(_COMPILED)


def _refuse_unusable(module: nn.Module) -> None:
    owner = type(module).__name__
    for key, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"{owner}: {key!r} has no values (device meta: offloaded, or never loaded). Load the model without "
                "device_map, or take offloading off first: pipe.remove_all_hooks()"
            )
        # Tensor subclasses of torchao, quanto and others take themselves apart by this protocol of PyTorch.
        if not parameter.is_floating_point() or hasattr(type(parameter.data), "__tensor_flatten__"):
            raise ModelError(
                f"{owner}: {key!r} is quantized already ({type(parameter.data).__name__}, {parameter.dtype}). Give the "
                "model as it was before, in float32, bfloat16 or float16"
            )
        if _LORA.search(key):
            raise ModelError(
                f"{owner} carries LoRA adapters ({key!r}). Merge them first: pipe.fuse_lora() and then "
                "pipe.unload_lora_weights(), or model.merge_and_unload() of peft"
            )
    fused = next((n for n, m in module.named_modules() if getattr(m, "fused_projections", False) is True), None)
    if fused is not None:
        raise ModelError(
            f"{owner}: the projections of {fused!r} are fused, so its weights are there twice. Load the model again "
            "and leave fuse_qkv_projections() for after the export"
        )


def _shared_copy(module: nn.Module) -> nn.Module:
    """A deep copy of the structure over the same memory of parameters and buffers."""
    memo: dict[int, Any] = {id(b): b for b in module.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    for part in module.modules():  # weights that a norm computed are attributes with a graph, which deepcopy refuses
        memo |= {id(v): v.detach() for v in vars(part).values() if isinstance(v, Tensor) and id(v) not in memo}
    return copy.deepcopy(module, memo)


def _remove_offloading(module: nn.Module) -> None:
    """Take off the hooks by which accelerate moves weights as they are used."""
    if not any(hasattr(m, "_hf_hook") for m in module.modules()):
        return
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module, recurse=True)


@torch.no_grad()
def _fold_norms(module: nn.Module) -> None:
    """Replace every weight that is computed from others by its value."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            _fold_parametrizations(part)
        names = {n for n, _ in part.named_parameters(recurse=False)}
        for name in sorted(n.removesuffix("_g") for n in names if n.endswith("_g") and f"{n[:-1]}v" in names):
            nn.utils.remove_weight_norm(part, name)
        for name in sorted(n.removesuffix("_orig") for n in names if n.endswith("_orig")):
            if hasattr(part, f"{name}_u"):
                nn.utils.remove_spectral_norm(part, name)


def _fold_parametrizations(module: nn.Module) -> None:
    """Not by ``remove_parametrizations``: it changes the class, which a copy shares with its original."""
    names = list(module.parametrizations)  # type: ignore[arg-type]
    values = {name: getattr(module, name).detach().clone() for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
