"""The final sample as a function of the denoiser's raw predictions, for any pipeline and any scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.errors import ModelError, NumericsError
from mpqsearch.models.calls import Call, call_of, mapped, tensors_in
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.runner import Hooks, parts_of
from mpqsearch.sources import kind_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A run whose scheduler arithmetic is differentiable and whose calls of the denoiser are cut out.

    ``calls`` hold what the denoiser was given, ``predictions`` what it returned, by call: leaves that require gradients
    (all floating-point outputs). ``seen`` are those of the call's arguments that depend on earlier predictions, as
    functions of them, ``final`` the latents after the last step as a function of all predictions. So the gradient
    through the whole sampler is put together call by call, with the graph of one call in memory, for any scheduler,
    multi-step ones included. ``steps`` names the step of the scheduler that each call was made for; a call of a text
    encoder or the autoencoder has a negative one of its own.
    """

    calls: tuple[Call, ...]
    predictions: tuple[tuple[Tensor, ...], ...]
    seen: tuple[tuple[Tensor, ...], ...]
    final: Tensor
    steps: tuple[int, ...]

    def replay(self, index: int, module: nn.Module) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Call ``index`` again with gradients: its raw outputs, and leaves for those arguments that are in ``seen``."""
        leaves: list[Tensor] = []

        def fresh(value: Tensor) -> Tensor:
            if not value.requires_grad:
                return value
            leaves.append(value.detach().requires_grad_(True))
            return leaves[-1]

        call = self.calls[index]
        with torch.enable_grad():
            made = call_of(
                module.get_submodule(call.part),
                mapped(call.args, fresh),
                mapped(dict(call.kwargs), fresh),
                part=call.part,
            )
            outputs = tuple(t for t in tensors_in(made.outputs(module)) if t.is_floating_point())
        return outputs, tuple(leaves)


def chain(denoiser: Denoiser, seeds: Sequence[int]) -> Chain:
    """Run one batch and keep the scheduler's graph: see `Chain`.

    Raises `NumericsError` when a sample is not finite, `ModelError` when no gradient comes back through the pipeline.
    """
    calls: list[Call] = []
    leaves: list[tuple[Tensor, ...]] = []
    seen: list[tuple[Tensor, ...]] = []
    steps: list[Tensor] = []
    of_step: list[int] = []
    owners = parts_of(denoiser.module)

    def on_call(part: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sample = call_of(owners[part], args, kwargs).sample

        def kept(value: Tensor) -> Tensor:
            changes = value.requires_grad or value is sample  # some pipelines write the next sample into this one
            return value.detach().clone().requires_grad_(value.requires_grad) if changes else value

        calls.append(call_of(owners[part], mapped(args, kept), mapped(kwargs, kept), part=part, index=len(calls)))
        seen.append(tuple(t.clone() for t in tensors_in((args, kwargs)) if t.requires_grad))
        of_step.append(-len(calls) if kind_of(part) else len(steps))
        with torch.no_grad():
            out = real(*mapped(args, Tensor.detach), **mapped(kwargs, Tensor.detach))
        mine: list[Tensor] = []

        def cut(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            mine.append(value.detach().clone().requires_grad_(True))
            return mine[-1]

        out = mapped(out, cut)
        leaves.append(tuple(mine))
        return out

    hooks = Hooks(call=on_call, step=steps.append)
    denoiser.runner.run(denoiser.module, seeds, hooks=hooks, decode=False, grad=True)
    if not steps[-1].requires_grad:
        raise ModelError(
            f"{denoiser.name}: its pipeline runs another one, through which no gradient comes back. Record its calls "
            "(mpqsearch record) and measure on those (calibration.captured)."
        )
    apart = len(seeds) if len(steps[-1]) == 1 else 1  # samples that are made one at a time
    per_run = len(steps) // apart
    return Chain(
        calls=tuple(calls),
        predictions=tuple(leaves),
        seen=tuple(seen),
        final=torch.cat(steps[per_run - 1 :: per_run]),
        steps=tuple(of_step),
    )


def prediction_gains(denoiser: Denoiser, seeds: Sequence[int], *, probe_seed: int = 0) -> list[Tensor]:
    """For each call and each row of its prediction ``[rows]``, the mean squared change of the final sample for a unit
    change of the mean square of that row.

    To first order, for errors of no direction of their own, with all that follows: the scheduler's arithmetic, the
    weights of classifier-free guidance, and what later calls of the denoiser make of another input. One batch,
    estimated along one direction of random signs in the space of samples: one forward and one backward pass of the
    denoiser a call, with the graph of one call in memory. Raises `NumericsError` when a gradient is not finite.
    """
    made = chain(denoiser, seeds)
    generator = torch.Generator().manual_seed(probe_seed)
    signs = torch.randint(0, 2, made.final.shape, generator=generator).to(made.final) * 2 - 1
    objective = (signs * made.final).sum()
    gains: list[Tensor] = []
    for index in reversed(range(len(made.calls))):
        along = gradients(objective, made.predictions[index])
        gains.append(_by_row(along, made.final.numel() / len(seeds)))
        if made.seen[index]:
            outputs, leaves = made.replay(index, denoiser.module)
            with torch.enable_grad():
                onward = sum(((a * o).sum() for a, o in zip(along, outputs, strict=True)), torch.zeros(()).to(along[0]))
            back = gradients(onward, leaves)
            objective = objective + sum((b * s).sum() for b, s in zip(back, made.seen[index], strict=True))
    if not all(bool(torch.isfinite(g).all()) for g in gains):
        raise NumericsError(
            f"{denoiser.name}: the gradient of the samples of seeds {seeds[0]}..{seeds[-1]} is not finite"
        )
    return gains[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStep:
    """``n_calls`` of the denoiser, and how the scheduler mixes their ``k`` rows a sample: errors ``[k, values]`` of the
    rows are one of ``mix @ errors``, with ``mix`` ``[r, k]``. An error that all rows share stays as it is. A call of a
    text encoder or the autoencoder, whose ``part`` is named, is a step by itself.

    Classifier-free guidance ``u + g (c - u)`` has the mix ``[[1 - g, g]]``, in one call of two rows a sample or in two
    calls; a step with one row ``[[1]]``. None: the predictions are no rows that could be mixed.
    """

    n_calls: int
    mix: Tensor | None
    part: str = ""


def scheduler_steps(denoiser: Denoiser, seeds: Sequence[int]) -> list[SchedulerStep]:
    """The steps of a run, found from the scheduler's own arithmetic for one batch: no gradient of the denoiser."""
    made = chain(denoiser, seeds)
    generator = torch.Generator().manual_seed(0)

    def probed(value: Tensor) -> Tensor:
        return (value * torch.randn(value.shape, generator=generator).to(value)).sum()

    # Inputs of later calls beside the final sample, which some schedulers make of the last prediction alone.
    objective = sum((probed(t) for seen in made.seen for t in seen), probed(made.final))
    along = iter(gradients(objective, [p for predictions in made.predictions for p in predictions]))
    by_step: dict[int, list[Tensor | None]] = {}
    encoders = {step: call.part for step, call in zip(made.steps, made.calls, strict=True) if step < 0}
    for step, call, predictions in zip(made.steps, made.calls, made.predictions, strict=True):
        first, *more = [next(along) for _ in predictions]
        apart = more or len(first) != call.batch or step in encoders
        by_step.setdefault(step, []).append(None if apart else first)
    return [
        SchedulerStep(n_calls=len(calls), mix=_mix(calls, len(seeds)), part=encoders.get(step, ""))
        for step, calls in by_step.items()
    ]


def gradients(objective: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients with respect to the leaves, zeros for what does not matter; the graph is kept."""
    if not leaves or not objective.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    found = torch.autograd.grad(objective, leaves, retain_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True))


def _by_row(along: Sequence[Tensor], n_values: float) -> Tensor:
    """Squared gradient ``[rows]`` over all outputs of a call, by values of one final sample."""
    rows = len(along[0])
    squares = [a.float().square().reshape(rows, -1).sum(1) for a in along if a.numel() % rows == 0]
    return torch.stack(squares).sum(0) / n_values


def _mix(along: Sequence[Tensor | None], n_samples: int) -> Tensor | None:
    """The mix of the rows of some calls, from the gradients of their predictions (None: of something else)."""
    known = [a for a in along if a is not None and len(a) % n_samples == 0]
    if len(known) < len(along) or len({a.shape[1:] for a in known}) > 1:
        return None
    rows = torch.cat([a.detach().cpu().double().reshape(len(a) // n_samples, -1) for a in known])
    if len(rows) == 1:
        return torch.ones(1, 1)
    products = rows @ rows.T
    shared = float(products.sum())
    if shared <= 1e-9 * float(products.trace()):
        return None
    strengths, directions = torch.linalg.eigh(products / shared)
    kept = strengths > 1e-6 * strengths.max()
    mix = (directions * strengths.clamp_min(0).sqrt())[:, kept].T
    return torch.where(mix.sum(1, keepdim=True) < 0, -mix, mix).float()
