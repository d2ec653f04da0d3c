"""Pipelines of the installed diffusers, from their own call to a quantized copy that is drawn, trained and exported.

A normal run takes those of `SAMPLE` and those that diffusers brought since the tiny ones were written; with
``MPQSEARCH_TEST_ALL=1`` (``make test-all``) all of them run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.everything import ALL
from tests.support.pipelines import ALONE, NEEDS, STOPS, TINY
from tests.support.pipelines.classes import generators, pipeline_classes, reason_against
from tests.support.pipelines.cover import STAGES, cover

SAMPLE = (
    "ConsistencyModelPipeline",  # noise and classes in pixels, stochastic
    "DiTPipeline",  # classes, learned variance
    "StableDiffusionPipeline",
    "FluxPipeline",
    "SanaPipeline",
    "CogView4Pipeline",  # two calls a step
    "LattePipeline",  # one sample at a time; video
    "WanPipeline:2.2",  # two denoisers
    "StableAudioPipeline",
)
"""One of each kind."""


def chosen() -> list[str]:
    """The pipelines of this run."""
    known = {name.partition(":")[0] for name in TINY}
    return [n for n in TINY if ALL or n in SAMPLE] + [n for n in generators() if n not in known]


@pytest.mark.parametrize("name", chosen())
def test_a_pipeline_goes_all_the_way(name: str, tmp_path: Path) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"its processor needs {NEEDS[name]}")
    covered = cover(name, tmp_path)
    stage, why = STOPS.get(name, ("", ""))
    found = f"{covered.stage}: {covered.reason}" if covered.stage else "it goes all the way"
    assert covered.stage == stage, f"{found}; listed as {stage or 'all the way'} {why}"


def test_nearly_all_that_generate_from_text_a_class_or_noise_are_covered() -> None:
    names = generators()
    covered = [n for n in names if n in TINY and n not in STOPS and n not in NEEDS]
    print(f"{len(covered)} of {len(names)} pipelines go all the way")
    assert len(names) > 80
    assert len(covered) >= 0.9 * len(names)
    assert set(SAMPLE) <= set(TINY) - set(STOPS) - set(NEEDS)


def test_what_is_listed_exists() -> None:
    assert {stage for stage, _ in STOPS.values()} <= {stage.__name__ for stage in STAGES}
    for listed in (ALONE, STOPS, NEEDS):
        assert {name.partition(":")[0] for name in listed} <= set(pipeline_classes())


def test_pipelines_that_are_left_out_have_a_reason() -> None:
    left = {n: reason_against(c) for n, c in pipeline_classes().items() if n not in generators()}
    assert left["MarigoldDepthPipeline"] == "needs image"
    assert left["FluxFillPipeline"].endswith("given: Fill")
    assert left["LLaDA2Pipeline"] == "makes text"
    assert not set(left) & {n.partition(":")[0] for n in TINY}
