"""The seam between a denoiser and the way its users run it: what every room may ask of a runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mpqsearch.models.calls import Call, entry_of

Label = int | str | None
"""What a sample was asked to show: a class, a prompt, or nothing."""

OnCall = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Stands in for a call of a part: gets the part's name, what really computes it, and its arguments."""


@runtime_checkable
class Denoises(Protocol):
    """What a module of the user's needs beside its weights, when no pipeline of diffusers runs it."""

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Prediction ``[N, ...]`` for ``x`` ``[N, ...]`` at timesteps ``t`` ``[N]`` of classes ``cond`` ``[N]``; None
        for models without classes."""
        ...


class Parts(nn.ModuleDict):
    """Several parts of one pipeline, the denoisers (such as the two of Wan 2.2) before text encoders and autoencoder:
    one model with one budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One batch of finished samples.

    latents
        ``[N, ...]``, float32 on the CPU: what the last step of the scheduler gave. Of pixel models the samples
        themselves, in [-1, 1]; where the autoencoder is a part of the model, what it decoded.
    images
        uint8 ``[N, C, H, W]`` with 1 or 3 channels, or video ``[N, F, C, H, W]``. None when they were not decoded, and
        for pipelines that make sound.
    """

    seeds: tuple[int, ...]
    latents: Tensor
    images: Tensor | None
    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What looks on while samples are made: ``call`` stands in for each call of a denoiser, ``step`` gets the sample
    that each step of the scheduler returned."""

    call: OnCall | None = None
    step: Callable[[Tensor], None] | None = None


class Runner(Protocol):
    """Runs a denoiser the way its users do. The weights come from the caller, so a runner serves every quantized
    copy of its model."""

    batch: int

    @property
    def identity(self) -> dict[str, str]:
        """Everything beside the weights that samples depend on: pipeline, scheduler, steps, guidance, prompts."""
        ...

    def run(
        self,
        module: nn.Module,
        seeds: Sequence[int],
        *,
        hooks: Hooks | None = None,
        decode: bool = True,
        grad: bool = False,
    ) -> Drawn:
        """One batch, one stream of noise a seed. With ``grad`` the arithmetic of the scheduler keeps its graph.

        Raises `NumericsError` when a sample is not finite, `ModelError` when this runner cannot sample.
        """
        ...

    def encode(self, module: nn.Module, seeds: Sequence[int], *, batch: int = 0) -> None:
        """Encode the prompts of all these seeds, so many (0: ``batch`` of the runner) at a time as they will be drawn,
        and let the text encoders go."""
        ...

    def examples(self, module: nn.Module) -> list[Call]:
        """A few calls that show every layer: what layers are looked for with."""
        ...

    def labels(self, seeds: Sequence[int]) -> tuple[Label, ...]:
        """What each seed's sample is asked to show."""
        ...

    def picture(self, module: nn.Module) -> tuple[int, ...] | None:
        """Shape ``(C, H, W)`` or ``(F, C, H, W)`` of one decoded sample, found without sampling; None for sound and
        other samples that cannot be looked at."""
        ...

    def files(self) -> dict[str, dict[str, Any]]:
        """JSON files by name that a model folder needs to be run this way; none for a pipeline, which has its own."""
        ...

    def calls_per_run(self, module: nn.Module) -> int:
        """Calls of the denoiser in one run; for recorded calls their number."""
        ...


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The parts of a module by name; the name of a single one is empty."""
    return dict(module.items()) if isinstance(module, Parts) else {"": module}


@contextmanager
def intercepted(module: nn.Module, on_call: OnCall | None) -> Iterator[None]:
    """Let ``on_call`` stand in for every call of the denoisers in ``module``; hooks of the module still fire."""
    with ExitStack() as stack:
        if on_call is not None:
            for name, owner in parts_of(module).items():
                stack.enter_context(_replaced(owner, partial(on_call, name)))
        yield


@contextmanager
def _replaced(owner: nn.Module, stand_in: Callable[..., Any]) -> Iterator[None]:
    """``stand_in(real, args, kwargs)`` in the place of the method that computes; calls made inside it are real."""
    entry = entry_of(owner)
    real, inside = getattr(owner, entry), False

    @wraps(real)  # pipelines read its signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return real(*args, **kwargs)
        inside = True
        try:
            return stand_in(real, args, kwargs)
        finally:
            inside = False

    before = vars(owner).get(entry)
    setattr(owner, entry, forward)
    try:
        yield
    finally:
        delattr(owner, entry)
        if before is not None:
            setattr(owner, entry, before)


@contextmanager
def watched_scheduler(scheduler: Any, on_step: Callable[[Tensor], None] | None) -> Iterator[None]:
    """Let ``on_step`` see the sample that every step of ``scheduler`` returns.

    By a method that is bound to the scheduler: a copy that a pipeline makes steps itself, and its class stays what it
    is, which some pipelines ask for.
    """
    name = next((n for n in ("step", "step_pred") if hasattr(scheduler, n)), None)
    if on_step is None or name is None:
        yield
        return
    real = getattr(type(scheduler), name)

    @wraps(real)  # pipelines read its signature to know whether it takes a generator
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        if self is scheduler:
            on_step(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    setattr(scheduler, name, MethodType(step, scheduler))
    try:
        yield
    finally:
        delattr(scheduler, name)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(module.parameters()).device
