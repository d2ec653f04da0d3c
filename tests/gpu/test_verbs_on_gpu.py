"""The command line on a real GPU: `make test-gpu`. Times and peaks of memory go to ``build/gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mpqsearch import artifacts
from tests.gpu.walk import Row, walk, write_rows
from tests.support.roads import ARGUMENTS, KINDS, SAMPLING, new_road, study_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the verbs were not run on one"),
]

OUT = Path(__file__).parents[2] / "build" / "gpu"
EMBEDDED = ("fmnist-unet", "fmnist-dit")


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """All rows of this run, written in the end."""
    collected: list[Row] = []
    yield collected
    if collected:
        write_rows(OUT, collected)


@pytest.mark.parametrize("model", [*EMBEDDED, *KINDS])
def test_every_verb(model: str, rows: list[Row], tmp_path: Path) -> None:
    road = study_of(tmp_path, model, guidance=2.0) if model in EMBEDDED else new_road(tmp_path, model)
    verbs = [v for v in ARGUMENTS if model != "recorded" or v not in (*SAMPLING, "report")]
    made = walk(road, model, "cuda", verbs)
    rows += made
    assert all(row.peak_mb > 0 for row in made if row.verb in ("profile", "quantize", "evaluate", "distill"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, rows: list[Row], tmp_path: Path) -> None:
    verbs = ("layers", "profile", "allocate", "quantize", "evaluate", "distill", "export")
    rows += walk(new_road(tmp_path, "class-conditional", dtype), f"class-conditional, {dtype}", "cuda", verbs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_on_the_gpu_is_that_of_the_cpu(kind: str, tmp_path: Path) -> None:
    profiles = {}
    for device in ("cpu", "cuda"):
        road = new_road(tmp_path / device, kind)
        walk(road, kind, device, ["profile"])
        profiles[device] = artifacts.load_profile(road.run / "profile.json")
    for key, values in profiles["cpu"].arrays.items():
        expected, found = values.astype(np.float64), profiles["cuda"].arrays[key].astype(np.float64)
        scale = np.abs(expected).mean()  # single channels may differ: the range of a channel has a best and a next one
        assert np.abs(found - expected).mean() <= 0.01 * scale, key
