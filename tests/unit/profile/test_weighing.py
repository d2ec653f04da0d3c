"""What errors of predictions weigh, against what they do to the final sample when they are put into a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mpqsearch.models import Denoiser, Hooks
from mpqsearch.models.calls import Call, mapped
from mpqsearch.profile.weighing import Weighing, weighing_of
from mpqsearch.sampling import each_call
from tests.support.pipelines import denoiser_of

SEEDS = (1, 2)


def steps_of(denoiser: Denoiser, weighing: Weighing, seed: int) -> list[tuple[list[Call], list[Tensor]]]:
    steps: list[tuple[list[Call], list[Tensor]]] = []
    with torch.no_grad():
        each_call(denoiser, [seed], weighing.by_step(lambda *step: steps.append(step)), batch=1)
    return steps


def sample_with(denoiser: Denoiser, seed: int, errors: Mapping[int, Tensor]) -> Tensor:
    """The final sample with errors added to the predictions of some calls."""
    n = 0

    def on_call(_part: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal n
        error = errors.get(n, torch.zeros(()))
        n += 1
        return mapped(real(*args, **kwargs), lambda t: t + error)

    return denoiser.runner.run(denoiser.module, [seed], hooks=Hooks(call=on_call), decode=False).latents


GUIDED: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"guidance_scale": 5.0},  # in one call
    "Lumina2Pipeline": {"guidance_scale": 5.0, "cfg_normalization": False},  # in two
}


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("shared", [False, True])
def test_an_error_weighs_what_it_does_to_the_final_sample(name: str, shared: bool) -> None:
    """Errors that both halves of guidance share count once, others by the weight of their half."""
    denoiser = denoiser_of(name, **GUIDED[name])
    weighing = weighing_of(denoiser, SEEDS)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for seed in SEEDS:
        clean = sample_with(denoiser, seed, {})
        for calls, predictions in steps_of(denoiser, weighing, seed):
            assert sum(map(len, predictions)) == 2, "both halves of guidance"
            weighed = done = 0.0
            for _ in range(4):
                rows = 1e-3 * torch.randn((2, *predictions[0].shape[1:]), generator=generator)
                rows = rows[:1].repeat(2, *[1] * (rows.dim() - 1)) if shared else rows
                errors = list(rows.split([len(p) for p in predictions]))
                change = sample_with(denoiser, seed, {c.index: e for c, e in zip(calls, errors, strict=True)}) - clean
                weighed += float(weighing(calls, errors).square().sum()) / len(weighing.steps)
                done += float(change.square().mean())
            ratios.append(done / weighed)
    logs = torch.tensor(ratios).log().reshape(len(SEEDS), -1)
    # After the last step there is the scheduler's arithmetic alone. Gains of the others go through later predictions,
    # and are means over seeds, estimated along one direction each.
    assert float(logs[:, -1].abs().max()) < 1e-2
    assert float(logs.abs().max()) < 1.0


def test_without_a_sampler_a_prediction_weighs_its_mean_square() -> None:
    error = torch.randn(3, 4, 5)
    assert float(Weighing()([Call()], [error]).square().sum()) == pytest.approx(float(error.square().mean()))
    taken: list[int] = []
    take = Weighing().by_step(lambda calls, predictions: taken.append(len(calls) + len(predictions)))
    for _ in range(3):
        take(Call(), error)
    assert taken == [2, 2, 2], "every call is by itself"
