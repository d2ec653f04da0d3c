"""One call for every model: ``denoise(x, t, cond)``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mpqsearch.errors import ConfigError, ModelError, NumericsError

Condition = Tensor | Mapping[str, Tensor] | None
"""Class labels ``[N]``, keyword tensors with a leading sample axis, or nothing."""

DEFAULT_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": True,
}
"""Used when a model folder names no scheduler: the one of DDPM."""


@runtime_checkable
class Denoises(Protocol):
    """What a module of the user's needs beside its weights."""

    def denoise(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Predicted noise ``[N, ...]`` of ``x`` ``[N, ...]`` at timesteps ``t`` ``[N]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A model and what is needed to sample from it.

    ``sample_shape`` is the shape of one sample without the batch axis. ``n_classes`` is 0 for unconditional models;
    ``null_class`` is the label that means "no class" (None: the model cannot be guided). ``scheduler`` is a diffusers scheduler
    configuration. ``digest`` is the SHA-256 over names, dtypes, shapes and bytes of the weights.
    """

    name: str
    module: nn.Module
    sample_shape: tuple[int, ...]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_SCHEDULER))
    n_classes: int = 0
    null_class: int | None = None
    digest: str = ""
    source: str = ""

    def denoise(self, x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """Prediction ``[N, ...]`` for noisy samples ``x`` at timesteps ``t`` ``[N]``; a learned variance is dropped."""
        if isinstance(self.module, Denoises):
            return self.module.denoise(x, t, cond)
        kwargs: dict[str, Any] = dict(cond) if isinstance(cond, Mapping) else {}
        if isinstance(cond, Tensor):
            kwargs["class_labels"] = cond
        try:
            out = self.module(x, t, return_dict=False, **kwargs)[0]
        except TypeError as error:
            raise ModelError(
                f"{type(self.module).__name__} cannot be called as model(x, t{', class_labels=...' if kwargs else ''}): {error}. "
                "Give it a method denoise(x, t, cond) that passes what it needs."
            ) from error
        result: Tensor = out
        if result.shape[1] == 2 * x.shape[1]:
            result = result[:, : x.shape[1]]
        return result

    def with_module(self, module: nn.Module) -> Denoiser:
        """The same denoiser with other weights, as after quantization."""
        return replace(self, module=module)

    def guided(self, x: Tensor, t: Tensor, cond: Condition, guidance: float) -> Tensor:
        """Classifier-free guidance ``u + g (c - u)`` in one batched call; ``guidance`` 1 is the conditional prediction."""
        if guidance == 1.0 or cond is None:
            return self.denoise(x, t, cond)
        if self.null_class is None or not isinstance(cond, Tensor):
            raise ConfigError(f"{self.name} has no null class, so guidance must be 1, got {guidance:g}")
        null = torch.full_like(cond, self.null_class)
        both = self.denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)


def adapt(
    module: nn.Module,
    *,
    sample_shape: tuple[int, ...],
    name: str = "custom",
    scheduler: Mapping[str, Any] | None = None,
    n_classes: int = 0,
    null_class: int | None = None,
    source: str = "",
) -> Denoiser:
    """Wrap a module as a `Denoiser`: any ``torch.nn.Module`` with a ``denoise(x, t, cond)`` method, or a diffusers denoiser.

    Raises `NumericsError` when a weight is not finite, `ModelError` when it can be called in neither way.
    """
    if not isinstance(module, Denoises) and "timestep" not in inspect.signature(module.forward).parameters:
        raise ModelError(f"{type(module).__name__} is no diffusers denoiser and has no method denoise(x, t, cond). Give it one.")
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"{name}: the weight {key!r} holds NaN or infinity. Repair or reload the checkpoint.")
    module.eval().requires_grad_(False)
    return Denoiser(
        name=name,
        module=module,
        sample_shape=sample_shape,
        scheduler=dict(scheduler or DEFAULT_SCHEDULER),
        n_classes=n_classes,
        null_class=null_class,
        digest=weights_digest(module),
        source=source,
    )


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over sorted (name, dtype, shape, bytes) of the state dict: independent of how it is stored."""
    total = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        total.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
