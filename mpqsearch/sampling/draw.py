"""What rooms ask of a denoiser: streamed samples, final latents, every call with its prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mpqsearch.models.calls import Call, Calls, Recorder, call_of, gradients_everywhere, mapped, prediction_in
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.runner import Drawn, Hooks, parts_of
from mpqsearch.prompts import BANDS
from mpqsearch.sampling.recorded import RecordedRunner

log = logging.getLogger("mpqsearch")

Take = Callable[[Call, Tensor], None]
"""Gets a call and its raw prediction."""

FEWEST = 4
"""Samples, each of another prompt, whose calls are recorded."""


def can_sample(denoiser: Denoiser) -> bool:
    """False for a model that is known from recorded calls only."""
    return not isinstance(denoiser.runner, RecordedRunner)


def require_sampler(denoiser: Denoiser, what: str) -> None:
    """Raise `ModelError` when ``what`` needs samples and the model is known from recorded calls only."""
    if isinstance(denoiser.runner, RecordedRunner):
        denoiser.runner.refuse(what, denoiser.module)


@torch.no_grad()
def samples(
    denoiser: Denoiser, seeds: Sequence[int], *, decode: bool = True, progress: Callable[[int], Any] | None = None
) -> Iterator[Drawn]:
    """Finished samples, one batch at a time; ``progress`` gets the number of samples of each.

    Raises `NumericsError` when a sample is not finite, `ModelError` when the model cannot be sampled.
    """
    runner = denoiser.runner
    runner.encode(denoiser.module, seeds)
    for start in range(0, len(seeds), runner.batch):
        drawn = runner.run(denoiser.module, seeds[start : start + runner.batch], decode=decode)
        yield drawn
        if progress is not None:
            progress(len(drawn.seeds))


def latents(denoiser: Denoiser, seeds: Sequence[int], *, progress: Callable[[int], Any] | None = None) -> Tensor:
    """Final latents ``[N, ...]`` of all seeds, not decoded: all of them in memory, so for a few."""
    return torch.cat([drawn.latents for drawn in samples(denoiser, seeds, decode=False, progress=progress)])


def batch_of(denoiser: Denoiser, most: int = 0) -> int:
    """Samples that one run makes at a time: at most ``most`` (0: as many as the runner would)."""
    denoiser.runner.calls_per_run(denoiser.module)  # some pipelines turn out to make one at a time
    return min(most or denoiser.runner.batch, denoiser.runner.batch)


def n_calls(denoiser: Denoiser, n_seeds: int, *, batch: int = 0) -> int:
    """How many calls `each_call` makes."""
    per_run = denoiser.runner.calls_per_run(denoiser.module)
    return per_run if not can_sample(denoiser) else -(-n_seeds // batch_of(denoiser, batch)) * per_run


def each_call(
    denoiser: Denoiser,
    seeds: Sequence[int],
    take: Take,
    *,
    batch: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Run the model for ``seeds`` and hand every call of the denoiser with its raw prediction to ``take``, in order.

    Where gradients are enabled the predictions have them, with the graph of one call in memory: nothing flows back
    through the sampler. Recorded calls are replayed, whatever the seeds. Hooks on layers fire as they do in use.
    """
    if isinstance(denoiser.runner, RecordedRunner):
        for call in denoiser.runner.calls:
            take(call, call.replay(denoiser.module))
            if progress is not None:
                progress(1)
        return
    size = batch_of(denoiser, batch)
    denoiser.runner.encode(denoiser.module, seeds, batch=size)
    for start in range(0, len(seeds), size):
        denoiser.runner.run(
            denoiser.module,
            seeds[start : start + size],
            hooks=Hooks(call=_taker(denoiser, take, progress)),
            decode=False,
        )


@torch.no_grad()
def record(denoiser: Denoiser, *, limit: int = 64, progress: Callable[[int], Any] | None = None) -> Calls:
    """Run a model for prompts or classes of calibration, one sample at a time, and keep ``limit`` of its calls, as
    evenly over timesteps as it goes.

    As many samples as it takes, and at least `FEWEST`: a map that is made on one prompt fits that one. ``progress``
    gets 1 with every sample.
    """
    require_sampler(denoiser, "a record of calls")
    module, runner, owners = denoiser.module, denoiser.runner, parts_of(denoiser.module)
    recorder, n = Recorder(limit), 0

    def on_call(part: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal n
        recorder.add(owners[part], args, kwargs, part=part, index=n)
        n += 1
        return real(*args, **kwargs)

    first = BANDS["calibration"]
    seeds = range(first, first + max(FEWEST, -(-limit // runner.calls_per_run(module))))
    texts = {label for label in runner.labels(seeds) if isinstance(label, str)}
    if 0 < len(texts) < FEWEST:
        log.warning("the calls are of %d prompts alone, and what is made with them fits those: give more", len(texts))
    runner.encode(module, seeds, batch=1)
    for seed in seeds:
        n = 0
        runner.run(module, [seed], hooks=Hooks(call=on_call), decode=False)
        if progress is not None:
            progress(1)
    kinds = " + ".join(type(owner).__name__ for owner in owners.values())
    return Calls(recorder.calls(), model=kinds, seen=recorder.seen)


def _taker(denoiser: Denoiser, take: Take, progress: Callable[[int], Any] | None) -> Callable[..., Any]:
    """What stands in for each call of one run."""
    owners, grad, n = parts_of(denoiser.module), torch.is_grad_enabled(), 0

    def on_call(part: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal n
        call = call_of(owners[part], args, kwargs, part=part, index=n)
        n += 1
        with torch.set_grad_enabled(grad):
            with gradients_everywhere():
                out = real(*args, **kwargs)
            take(call, prediction_in(out, call.sample, type(owners[part]).__name__))
        if progress is not None:
            progress(1)
        return mapped(out, Tensor.detach)

    return on_call
