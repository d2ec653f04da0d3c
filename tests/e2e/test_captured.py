"""A pipeline that cannot be run where its study is, known from its recorded calls, on the command line; what the verbs
make of such a model is in tests/roads."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e.conftest import Cli
from tests.support.pipelines import TINY

DRAWN = ("--steps", "2", "--call", "height=16", "--call", "width=16")


def recorded(cli: Cli, folder: Path, *more: str) -> Path:
    """A pipeline folder as it is where the study runs: its denoiser alone; and ``calls.safetensors`` beside it."""
    whole, bare = folder / "whole", folder / "sd"
    if not whole.exists():
        TINY["StableDiffusionPipeline"]()[0].save_pretrained(whole)
        shutil.copytree(whole, bare)
        shutil.rmtree(bare / "text_encoder")
        (folder / "prompts.txt").write_text("".join(f"a lighthouse beside {n} boats\n" for n in range(20)))
    made = cli("record", whole, "--prompts", "prompts.txt", "--calls", "8", *DRAWN, *more)
    assert made.returncode == 0, made.stderr
    return bare


def test_recorded_calls_take_the_place_of_a_pipeline_and_count_by_their_content(cli: Cli, tmp_path: Path) -> None:
    folder = recorded(cli, tmp_path, "-o", "calls.safetensors")
    again = cli("record", tmp_path / "whole", "--prompts", "prompts.txt", "-o", "calls.safetensors")
    assert again.returncode == 2
    assert "calls.safetensors exists already" in again.stderr
    captured = ["--set", 'calibration.captured="calls.safetensors"']
    common = ["--model", folder, "--run-dir", "r"]
    alone = cli("profile", *common)
    assert alone.returncode == 2
    assert "cannot load the pipeline" in alone.stderr
    assert cli("layers", *common, *captured).returncode == 0
    recorded(cli, tmp_path, "-o", "calls.safetensors", "--overwrite", "--guidance", "3")
    stale = cli("layers", *common, *captured)
    assert stale.returncode == 4
    assert "calls (" in stale.stderr
    slow = cli("profile", *common, *captured, "--overwrite", "--set", "calibration.final_widths=[3]")
    assert slow.returncode == 2
    assert "final_widths" in slow.stderr
