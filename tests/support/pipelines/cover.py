"""The whole way of one pipeline, in stages: from its own call to a quantized copy that is drawn, trained and exported.

`cover` goes through `STAGES` in order and names the first that does not hold. What a stage compares with is the
pipeline's own call, with the denoiser put in by hand.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpqsearch.core import BitMap, LayerTable
from mpqsearch.distill import DistillSpec, Trajectories, TRDSpec, distill
from mpqsearch.export import ExportJob, get_exporter, load_neutral
from mpqsearch.models import Denoiser, Hooks, Parts, discover
from mpqsearch.models.calls import gradients_everywhere, mapped
from mpqsearch.models.runner import watched_scheduler
from mpqsearch.quant import build_student, param_groups, quantize_model
from mpqsearch.sampling import PipelineRunner, SamplerSpec, chain, each_call, gradients, latents, load_model, samples
from tests.support.pipelines.registry import ALONE, TINY, arguments
from tests.support.pipelines.running import ASKED

SEEDS = (1, 2)


@dataclass
class Case:
    """One pipeline on its way: ``pipe`` and ``call`` as they were made, ``folder`` for what is written."""

    name: str
    folder: Path
    pipe: Any = None
    call: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def denoiser(self) -> Denoiser:
        """From the folder that the pipeline wrote."""
        return self.load()

    @cached_property
    def table(self) -> LayerTable:
        return discover(self.denoiser)

    @cached_property
    def quantized(self) -> nn.Module:
        """Every layer at 4 bits."""
        bit_map = BitMap(model_digest=self.table.digest, weights={la.name: np.array(4) for la in self.table})
        return quantize_model(self.denoiser.module, self.table, bit_map).module

    def load(self, **more: Any) -> Denoiser:
        text = "prompt" in arguments(self.pipe, self.call, SEEDS[:1])
        spec = SamplerSpec(batch=len(SEEDS), call=self.call)
        return load_model(str(self.folder / "model"), sampler=spec, prompts=ASKED if text else None, **more)

    def put(self, module: nn.Module) -> None:
        """``module`` in the place of the pipeline's own denoisers."""
        names = list(module) if isinstance(module, Parts) else self.components[:1]
        parts = module.values() if isinstance(module, Parts) else [module]
        for name, part in zip(names, parts, strict=True):
            for pipe in (self.pipe, getattr(self.pipe, "decoder_pipe", self.pipe)):
                setattr(pipe, name, part)

    @cached_property
    def components(self) -> list[str]:
        """Names of the denoisers, as the folder's loader found them."""
        module = self.denoiser.module
        if isinstance(module, Parts):
            return list(module)
        return [n for n, c in self.pipe.components.items() if type(c).__name__ == type(module).__name__]

    @torch.no_grad()
    def own(self, seeds: tuple[int, ...] = SEEDS) -> NDArray[Any]:
        """What the pipeline makes when it is called by hand."""
        if self.name.partition(":")[0] in ALONE and len(seeds) > 1:
            return np.concatenate([self.own((s,)) for s in seeds])
        out = self.pipe(**arguments(self.pipe, self.call, seeds))
        value = out[0] if isinstance(out, tuple) else next(iter(out.values()))
        return np.stack([np.asarray(v) for v in value]) if isinstance(value, list) else np.asarray(value)


def built(case: Case) -> None:
    """It is made, and written to a folder."""
    case.pipe, case.call = TINY[case.name]()
    case.pipe.save_pretrained(case.folder / "model")


def called(case: Case) -> None:
    """Its own call repeats, gives each seed a sample of its own, and the same in a batch and alone."""
    first, again = case.own(), case.own()
    assert np.isfinite(first).all(), "its samples are not finite"
    assert np.array_equal(first, again), "the same call gives other samples"
    apart = np.abs(first[0] - first[1]).max()
    assert apart > 1e-3, f"two seeds give the same sample within {apart:.1e}"
    alone = np.concatenate([case.own((s,)) for s in SEEDS])
    # Some round their pictures to eight bits on the way.
    bound = 1.1 / 255 if case.name.startswith("Cosmos") else 2e-4
    apart = np.abs(first - alone).max()
    assert apart < bound, f"a sample alone differs by {apart:.1e} from that in a batch"


def loaded(case: Case) -> None:
    """Its denoisers load from the folder, with the weights that were written."""
    state = case.denoiser.module.state_dict()
    parts = {n: case.pipe.components[n].state_dict() for n in case.components}
    one = len(parts) == 1
    written = {k if one else f"{n}.{k}": v for n, values in parts.items() for k, v in values.items()}
    assert state.keys() == written.keys()
    assert all(torch.equal(v, written[k]) for k, v in state.items())


def drawn(case: Case) -> None:
    """Samples through the runner are those of its own call, with any denoiser."""
    changed = copy.deepcopy(case.denoiser.module)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.05)
    finals = [_same_samples(case, module) for module in (case.denoiser.module, changed)]
    assert float((finals[0] - finals[1]).abs().max()) > 1e-5, "a changed denoiser changed nothing"


def _same_samples(case: Case, module: nn.Module) -> Tensor:
    """Pictures bit for bit; of sound what the last step of the scheduler gave."""
    batches = list(samples(case.denoiser.with_module(module), SEEDS))  # two, where samples are made one at a time
    final, images = torch.cat([b.latents for b in batches]), [b.images for b in batches if b.images is not None]
    case.put(module)
    steps: list[Tensor] = []
    with watched_scheduler(getattr(case.pipe, "scheduler", None), steps.append):
        own = case.own()
    if not images:
        assert own.ndim <= 3, f"no pictures were drawn, and its own call gives {own.shape}"
        assert torch.equal(final, torch.cat([steps[len(steps) // 2 - 1], steps[-1]])[-len(final) :])
    else:
        pictures = np.moveaxis(torch.cat(images).numpy(), -3, -1)
        expected = (own.clip(0, 1) * 255).round().astype(np.uint8)
        assert np.array_equal(pictures, expected), (
            f"its own call gives others: {pictures.shape} and {expected.shape}"
            + (
                f", apart by {np.abs(pictures.astype(int) - expected).max()} of 255"
                if pictures.shape == expected.shape
                else ""
            )
        )
    return final


def one_by_one(case: Case) -> None:
    """Sample i is the same in any batch."""
    together = latents(case.denoiser, SEEDS)
    alone = torch.cat([latents(case.denoiser, [s]) for s in SEEDS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def without_encoders(case: Case) -> None:
    """With its prompts encoded once and its text encoders gone, samples are the same."""
    denoiser = case.load(encoded=case.folder / "prompts")
    expected = latents(case.denoiser, SEEDS)
    assert torch.equal(latents(denoiser, SEEDS), expected)
    runner = denoiser.runner
    assert isinstance(runner, PipelineRunner)
    if hasattr(case.pipe, "encode_prompt"):
        assert not any(isinstance(getattr(runner._pipe, n), nn.Module) for n in runner._encoders), (
            "its encoders are kept"
        )
    assert torch.equal(latents(denoiser, SEEDS), expected), "encoded prompts give other samples"


def replayed(case: Case) -> None:
    """Every call replays to the prediction that it had."""
    count = 0

    def take(call: Any, prediction: Tensor) -> None:
        nonlocal count
        count += 1
        assert torch.equal(call.replay(case.denoiser.module), prediction), f"call {call.index} replays to another one"

    with torch.no_grad():
        each_call(case.denoiser, SEEDS, take)
    assert count % case.denoiser.runner.calls_per_run(case.denoiser.module) == 0


def layered(case: Case) -> None:
    """Its layers are found, and all values are counted."""
    assert len(case.table) > 4
    assert sum(la.role == "unused" for la in case.table) <= len(case.table) / 2, "most layers did not run"
    state = case.denoiser.module.state_dict(keep_vars=True)
    assert case.table.n_parameters == sum(v.numel() for v in {id(v): v for v in state.values()}.values())


def chained(case: Case) -> None:
    """The gradient of the final sample, put together call by call, is that of the whole run."""
    module = case.denoiser.module
    weights = [p for p in module.parameters() if p.is_floating_point()]
    by_call = _gradient_by_call(case.denoiser, weights)
    steps: list[Tensor] = []
    hooks = Hooks(call=_differentiable, step=steps.append)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        case.denoiser.runner.run(module, SEEDS, hooks=hooks, decode=False, grad=True)
        apart = len(SEEDS) if len(steps[-1]) == 1 else 1
        final = torch.cat(steps[len(steps) // apart - 1 :: len(steps) // apart])
        whole = gradients((_signs(final) * final).sum(), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    length = sum(float(g.double().square().sum()) for g in whole) ** 0.5
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(by_call, whole, strict=True)) ** 0.5
    assert length > 0, "no gradient reaches the weights"
    assert apart <= 1e-5 * length, f"relative difference {apart / length:.1e}"


def _differentiable(_part: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with gradients throughout: some models route to their experts under ``no_grad``, some pipelines write the
    next sample into the present one."""
    with gradients_everywhere():
        return real(*mapped(args, Tensor.clone), **mapped(kwargs, Tensor.clone))


def _gradient_by_call(denoiser: Denoiser, weights: list[Tensor]) -> list[Tensor]:
    """Of the signed sum of the final sample, with the graph of one call in memory."""
    made = chain(denoiser, SEEDS)
    objective = (_signs(made.final) * made.final).sum()
    total = [torch.zeros_like(w) for w in weights]
    for index in reversed(range(len(made.calls))):
        along = gradients(objective, made.predictions[index])
        for weight in weights:
            weight.requires_grad_(True)
        outputs, leaves = made.replay(index, denoiser.module)
        with torch.enable_grad():
            onward = sum(((a * o).sum() for a, o in zip(along, outputs, strict=True)), torch.zeros(()))
        (*back,) = gradients(onward, [*weights, *leaves])
        for weight in weights:
            weight.requires_grad_(False)
        for t, g in zip(total, back, strict=False):
            t += g
        objective = objective + sum((b * s).sum() for b, s in zip(back[len(weights) :], made.seen[index], strict=True))
    return total


def _signs(final: Tensor) -> Tensor:
    return torch.randint(0, 2, final.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def quantized(case: Case) -> None:
    """A quantized copy draws what its own call draws with that copy put in by hand."""
    full = latents(case.denoiser, SEEDS)
    assert float((_same_samples(case, case.quantized) - full).abs().max()) > 1e-6, "quantization changed nothing"


def trained(case: Case) -> None:
    """One step of training on its own trajectories."""
    bit_map = BitMap(model_digest=case.table.digest, weights={la.name: np.array(3) for la in case.table})
    student = build_student(case.denoiser.module, case.table, bit_map, trainable="lora", rank=2)
    options = DistillSpec(steps=1, checkpoint_every=1, relation=TRDSpec(pooled_size=2))
    (state,) = distill(student, param_groups(student, lr_factor=4), Trajectories(case.denoiser, batch=1), options)
    assert np.isfinite(state.loss)
    assert state.loss > 0


def exported(case: Case) -> None:
    """Its map is written and read back."""
    bit_map = BitMap(model_digest=case.table.digest, weights={la.name: np.array(4) for la in case.table})
    folder = case.folder / "neutral"
    folder.mkdir()
    exporter = get_exporter("neutral")
    exporter.write(folder, ExportJob(table=case.table, bit_map=bit_map, denoiser=case.denoiser))
    assert exporter.verify(folder).ok
    assert load_neutral(folder / "bitmap.json", case.table).bit_map.digest == bit_map.digest


STAGES: tuple[Callable[[Case], None], ...] = (
    built, called, loaded, drawn, one_by_one, without_encoders, replayed, layered, chained, quantized, trained, exported,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """How far a pipeline came: ``stage`` that did not hold, with the ``reason``; empty when it went all the way."""

    name: str
    stage: str
    reason: str
    seconds: float


def cover(name: str, folder: Path, *, stop: str = "") -> Covered:
    """Take a tiny pipeline all the way, or through the stage ``stop``."""
    case, start = Case(name, folder), time.process_time()
    for stage in STAGES:
        try:
            stage(case)
        except Exception as error:  # noqa: BLE001  (the table names whatever a pipeline raises)
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            return Covered(name=name, stage=stage.__name__, reason=kind + reason, seconds=time.process_time() - start)
        if stage.__name__ == stop:
            break
    return Covered(name=name, stage="", reason="", seconds=time.process_time() - start)
