"""Tiny pipelines behind a `Denoiser`, without a folder."""

from __future__ import annotations

import inspect
from typing import Any

from mpqsearch.models import Denoiser, Parts, weights_digest
from mpqsearch.prompts import Prompt, Prompts
from mpqsearch.prompts.splits import BANDS
from mpqsearch.sampling import PipelineRunner, SamplerSpec
from tests.support.pipelines.registry import PROMPTS, TINY

ASKED = Prompts(splits=dict.fromkeys(BANDS, tuple(Prompt(text=text) for text in PROMPTS)))
"""The same prompts in every split."""


def denoiser_of(name: str, *, batch: int = 4, **call: Any) -> Denoiser:
    """The denoisers of a tiny pipeline, run by it; ``call`` are further arguments of its call."""
    pipe, given = TINY[name]()
    parts = {n: pipe.components[n] for n in ("unet", "transformer", "transformer_2") if pipe.components.get(n)}
    module = Parts(parts) if len(parts) > 1 else next(iter(parts.values()))
    takes = inspect.signature(type(pipe).__call__).parameters
    asked, n_classes = ASKED if "prompt" in takes else None, 10 if "class_labels" in takes else 0
    spec = SamplerSpec(batch=batch, call=given | call)
    runner = PipelineRunner(lambda _: pipe, tuple(parts), spec=spec, prompts=asked, n_classes=n_classes)
    return Denoiser(name=name, module=module, runner=runner, digest=weights_digest(module))
