"""The main job: a folder of a text-to-image pipeline, and one command to the front."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpqsearch import artifacts
from tests.e2e.conftest import Cli
from tests.support.pipelines import TINY

STUDY = """
[model]
source = {source}
device = "cpu"
[policy]
widths = [2, 4, 8]
[quantizer]
n_candidates = 8
[sampler]
batch = 4
call = {{ num_inference_steps = 2, height = 16, width = 16 }}
[prompts]
file = {prompts}
[calibration]
samples = 2
probe_inputs = 2
probes = 1
sampler_seeds = 1
sampler_probes = 1
context_seeds = 0
schemes = ["auto"]
[allocate]
budgets = ["uniform:4"]
[[methods]]
name = "uniform"
allocator = "uniform"
scheme = "auto"
[[methods]]
name = "ilp"
allocator = "ilp-channel"
scheme = "auto"
bias_correction = true
[evaluate]
samples = 6
extractor = "random-conv"
[distill]
methods = ["ilp"]
steps = 2
rank = 2
batch = 2
check_every = 2
check_samples = 4
checkpoint_every = 2
[report]
chosen = "ilp"
[export]
targets = ["neutral"]
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    pipe, _ = TINY["StableDiffusionPipeline"]()
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("".join(f"a boat number {i}\n" for i in range(20)))
    source, prompts = (json.dumps(str(tmp_path / name)) for name in ("pipeline", "prompts.txt"))
    (tmp_path / "study.toml").write_text(STUDY.format(source=source, prompts=prompts))
    return tmp_path / "study.toml"


def test_one_command_gives_the_front_of_a_text_to_image_pipeline(cli: Cli, study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = cli("run", study, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    records = artifacts.read_json(folder / "pareto.json", "mpqsearch/pareto").data["records"]
    assert [r["method"] for r in records] == ["full-precision", "uniform", "ilp", "ilp+trd"]
    for record in records[1:]:
        assert {"fd_fp", "paired_psnr", "paired_mse"} <= record["metrics"].keys()
        assert record["n_samples"] == 6
    page = (folder / "report.html").read_text()
    shown = [f"a boat number {i}" for i in range(20) if f"<span>a boat number {i}</span>" in page]
    assert len(shown) == 5  # of the report's own split, below their pictures
    assert (folder / "export" / "neutral@uniform-4" / "bitmap.json").is_file()
    pictures = artifacts.read_arrays(next(p for p in folder.glob("stats/*.npz") if not p.name.startswith("full")))
    assert pictures["images"].shape == (6, 3, 16, 16)
    assert pictures["images"].dtype == np.uint8

    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.suffix in (".npz", ".html")}
    again = cli("run", study, "--run-dir", folder)
    assert again.returncode == 0, again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in before}  # everything was there


def test_what_cannot_be_finished_is_not_begun(cli: Cli, study: Path, tmp_path: Path) -> None:
    refused = cli("run", study, "--run-dir", tmp_path / "run", "--set", "evaluate.extractor=fmnist-cnn")
    assert refused.returncode == 2
    assert "the extractor fmnist-cnn reads pictures (1, 28, 28)" in refused.stderr
    assert not (tmp_path / "run" / "profile.json").exists()
