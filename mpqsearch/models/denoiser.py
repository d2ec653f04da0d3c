"""One call for every model: ``denoise(x, t, cond)``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mpqsearch.errors import ConfigError, ModelError, NumericsError
from mpqsearch.models.calls import Call, in_memory
from mpqsearch.models.devices import float_dtype
from mpqsearch.models.unwrap import plain_copy

Condition = Tensor | Mapping[str, Tensor] | None
"""Class labels ``[N]``, keyword tensors with a leading sample axis, or nothing."""

Given = Condition | Call
"""A condition, or a whole recorded call, which brings its own sample and time."""

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


@dataclass(frozen=True, kw_only=True, repr=False)
class Denoiser:
    """A model and what is needed to sample from it.

    ``sample_shape`` is the shape of one sample without the batch axis. ``n_classes`` is 0 for unconditional models;
    ``null_class`` is the label that means "no class" (None: the model cannot be guided). ``scheduler`` is a diffusers
    scheduler configuration. ``digest`` is the SHA-256 over names, dtypes, shapes and bytes of the weights. ``calls``
    are calls of a pipeline's own run: where there are any, layers are found and measured with them and not with the
    sampler here.
    """

    name: str
    module: nn.Module
    sample_shape: tuple[int, ...]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_SCHEDULER))
    n_classes: int = 0
    null_class: int | None = None
    digest: str = ""
    source: str = ""
    calls: Sequence[Call] = ()

    def denoise(self, x: Tensor, t: Tensor, cond: Given = None) -> Tensor:
        """Prediction ``[N, ...]`` for noisy samples ``x`` at timesteps ``t`` ``[N]``; a learned variance is dropped.

        The module computes in the type of its weights; the prediction comes in that of ``x``. Raises `ModelError` when
        the module needs other inputs, or predicts something of another shape than the samples.

        With a recorded call as ``cond`` the prediction is that of the call: its own sample and time count, not ``x``
        and ``t``.
        """
        if isinstance(cond, Call):
            return cond.replay(self.module)
        clock = getattr(self.module, "timestep_clock", None)  # of a model whose activation scales go by the timestep
        if clock is not None:
            clock.set(t)
        dtype = float_dtype(self.module)
        result = self._raw(x.to(dtype), t, _in_dtype(cond, dtype))
        if result.dim() == x.dim() > 1 and result.shape[1] == 2 * x.shape[1]:
            result = result[:, : x.shape[1]]
        if result.shape != x.shape:
            raise ModelError(
                f"{type(self.module).__name__} predicts {tuple(result.shape)} for samples {tuple(x.shape)}: "
                + _NEEDS_OTHER_INPUTS
            )
        return result.to(x.dtype)

    def _raw(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What the module itself returns."""
        if isinstance(self.module, Denoises):
            return self.module.denoise(x, t, cond)
        kwargs: dict[str, Any] = dict(cond) if isinstance(cond, Mapping) else {}
        if isinstance(cond, Tensor):
            kwargs["class_labels"] = cond
        try:
            out: Tensor = self.module(x, t, return_dict=False, **kwargs)[0]
        except (
            TypeError,
            AttributeError,
            ValueError,
        ) as error:  # classes say so in each of these ways when an input is missing
            if len(self.calls):
                raise ModelError(self._only_calls("a prediction for a sample, a time and a class", error)) from error
            raise ModelError(
                f"{type(self.module).__name__} cannot be called as model(x, "
                f"t{', class_labels=...' if kwargs else ''}): {error}. "
                "Record calls of its pipeline with mpqsearch.models.capture, or give it a method denoise(x, t, cond)."
            ) from error
        return out

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters and stored buffers, as they are in memory."""
        return sum(v.numel() * v.element_size() for v in self.module.state_dict().values())

    def __repr__(self) -> str:
        conditions = f", {self.n_classes} classes" if self.n_classes else ""
        calls = f", {len(self.calls)} recorded calls" if len(self.calls) else ""
        kind, size = type(self.module).__name__, f"{self.size_bytes / 1e6:.2f} MB"
        return f"Denoiser({self.name}: {kind}, {size}, samples {tuple(self.sample_shape)}{conditions}{calls})"

    def with_module(self, module: nn.Module) -> Denoiser:
        """The same denoiser with other weights, as after quantization."""
        return replace(self, module=module)

    def with_calls(self, calls: Sequence[Call]) -> Denoiser:
        """The same denoiser, measured with these calls. Raises `ConfigError` when there are none."""
        if not len(calls):
            raise ConfigError(f"{self.name}: there is no recorded call to measure with")
        return replace(self, calls=calls)

    def require_sampler(self, what: str) -> None:
        """Raise `ModelError` when ``what`` needs samples, and the denoiser can be run on its recorded calls only.

        Found out with one call of the module on zeros, where there are recorded calls at all.
        """
        if not len(self.calls) or isinstance(self.module, Denoises):
            return
        device = next(self.module.parameters()).device
        x, t = torch.zeros(1, *self.sample_shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
        try:
            with torch.no_grad():
                self.denoise(x, t, torch.zeros(1, dtype=torch.long, device=device) if self.n_classes else None)
        except (ModelError, RuntimeError, IndexError, AssertionError) as error:
            raise ModelError(self._only_calls(what, error.__cause__ or error)) from error

    def _only_calls(self, what: str, error: BaseException) -> str:
        return (
            f"{what} was asked for, which runs the sampler here, but {self.name} is known from {len(self.calls)} "
            "recorded calls of its pipeline "
            f"only: {type(self.module).__name__} cannot be called as model(x, t) ({error}). With recorded calls there "
            "are layers, profile "
            "(losses 'weight', 'output' and 'probe'), allocate, quantize, import and export. To sample, give "
            "the module a method "
            "denoise(x, t, cond) that adds what its pipeline gives, or export the map and sample in the pipeline "
            "itself."
        )

    def guided(self, x: Tensor, t: Tensor, cond: Given, guidance: float) -> Tensor:
        """Classifier-free guidance ``u + g (c - u)`` in one batched call; ``guidance`` 1 is the conditional
        prediction."""
        if guidance == 1.0 or cond is None or isinstance(cond, Call):
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
    sample_shape: tuple[int, ...] = (),
    name: str = "custom",
    scheduler: Mapping[str, Any] | None = None,
    n_classes: int = 0,
    null_class: int | None = None,
    source: str = "",
    calls: Sequence[Call] = (),
) -> Denoiser:
    """Wrap a module as a `Denoiser`.

    Any ``torch.nn.Module`` with a ``denoise(x, t, cond)`` method, a diffusers denoiser that takes a sample, a timestep
    and class labels (both need ``sample_shape``), or any module whatever with recorded ``calls``.

    The denoiser gets a copy of the structure (`plain_copy`) over the same memory of the weights: the module of the
    caller keeps its mode and its gradients. Raises `NumericsError` when a weight is not finite, `ModelError` when the
    module can be called in none of these ways, or when its weights are no plain numbers (LoRA, quantized, offloaded).
    """
    module = plain_copy(module)
    if not len(calls):
        if not isinstance(module, Denoises) and "timestep" not in inspect.signature(module.forward).parameters:
            raise ModelError(
                f"{type(module).__name__} is no diffusers denoiser and has no method denoise(x, t, cond). Give it "
                "one, or record calls of its "
                "pipeline with mpqsearch.models.capture."
            )
        if not sample_shape:
            raise ModelError(
                f"{type(module).__name__}: give sample_shape, or calls that were recorded with mpqsearch.models.capture"
            )
    if not len(calls) and not isinstance(module, Denoises):
        _refuse_other_channels(module, sample_shape[0])
    check_finite(module, name)
    return Denoiser(
        name=name,
        module=module,
        sample_shape=tuple(sample_shape) if sample_shape or not len(calls) else tuple(calls[0].sample.shape[1:]),
        scheduler=dict(scheduler or DEFAULT_SCHEDULER),
        n_classes=n_classes,
        null_class=null_class,
        digest=weights_digest(module),
        source=source,
        calls=calls,
    )


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `NumericsError` when a weight holds NaN or infinity, or a buffer NaN; a mask may be infinite."""
    for key, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericsError(f"{name}: the weight {key!r} holds NaN or infinity. Repair or reload the checkpoint.")
    for key, buffer in module.named_buffers():
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            raise NumericsError(f"{name}: the buffer {key!r} holds NaN. Repair or reload the checkpoint.")


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over sorted (name, dtype, shape, bytes) of the state dict: independent of how it is stored."""
    total = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            total.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            total.update(in_memory(tensor).flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _in_dtype(cond: Condition, dtype: torch.dtype) -> Condition:
    """A condition with its floating-point tensors in ``dtype``."""
    if isinstance(cond, Mapping):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
    return cond


def _refuse_other_channels(module: nn.Module, channels: int) -> None:
    """Raise `ModelError` when the configuration says that the prediction has other channels than the sample."""
    config: Mapping[str, Any] = getattr(module, "config", {})
    out = config.get("out_channels")
    if isinstance(out, int) and out not in (channels, 2 * channels):
        raise ModelError(
            f"{type(module).__name__} takes {channels} channels and predicts {out}: " + _NEEDS_OTHER_INPUTS
        )


_NEEDS_OTHER_INPUTS = (
    "it takes more than the sample (a picture, a mask), which only its pipeline has. Record calls of the pipeline with "
    "mpqsearch.models.capture, or give it a method denoise(x, t, cond) that adds what is missing."
)
