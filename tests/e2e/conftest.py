"""A tiny model on disk and a tiny study for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import forked
from tests.support.shared import made_once

STUDY = """
[model]
source = {source}
[policy]
widths = [2, 3, 4, 8]
[quantizer]
n_candidates = 16
moment_samples = 4
[sampler]
steps = 3
guidance = 1.0
batch = 8
[calibration]
samples = 2
probe_inputs = 4
probes = 1
sampler_seeds = 2
sampler_probes = 1
context_seeds = 0
final_widths = []
final_seeds = 2
[allocate]
budgets = ["uniform:3", "uniform:4"]
[[methods]]
name = "uniform"
allocator = "uniform"
[[methods]]
name = "omq"
allocator = "omq"
[[methods]]
name = "ilp-layer"
allocator = "ilp-layer"
scheme = "auto"
bias_correction = true
[[methods]]
name = "ilp-channel"
allocator = "ilp-channel"
scheme = "auto"
bias_correction = true
[evaluate]
samples = 8
extractor = "random-conv"
[export]
targets = ["neutral"]
"""

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny import DDPM, tiny_unet

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_unet().save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    (folder / "scheduler_config.json").write_text(json.dumps(DDPM))
    return folder


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run folder with the finished profile of `study`; to be copied, not written to."""

    def make(folder: Path) -> None:
        (folder / "study.toml").write_text(STUDY.format(source=json.dumps(str(model_folder))))
        done = forked.run(
            ["profile", "-c", "study.toml", "--run-dir", "run"], folder, folder / "stdout", folder / "stderr"
        )
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "measured", make) / "run"


@pytest.fixture
def profiled(tmp_path: Path, measured: Path) -> Path:
    """The folder ``r`` with the finished profile of `study`."""
    shutil.copytree(measured, tmp_path / "r")
    return tmp_path / "r"


@pytest.fixture
def study(tmp_path: Path, model_folder: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(source=json.dumps(str(model_folder))))
    return path


@pytest.fixture
def cli(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    printed = tmp_path_factory.mktemp("printed")

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return forked.run([str(a) for a in arguments], tmp_path, printed / "stdout", printed / "stderr")

    return call
