"""A pipeline that cannot be run where its study is, from its recorded calls to an exported map, on the command line."""

from __future__ import annotations

import json
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


def test_a_pipeline_is_profiled_and_allocated_from_recorded_calls(cli: Cli, tmp_path: Path) -> None:
    folder = recorded(cli, tmp_path, "-o", "calls.safetensors")
    again = cli("record", tmp_path / "whole", "--prompts", "prompts.txt", "-o", "calls.safetensors")
    assert again.returncode == 2
    assert "calls.safetensors exists already" in again.stderr
    captured = ["--set", 'calibration.captured="calls.safetensors"']
    common = ["--model", folder, "--run-dir", "r"]
    common += ["--set", "calibration.probe_inputs=2", "--set", "quantizer.n_candidates=8"]
    alone = cli("profile", *common)
    assert alone.returncode == 2
    assert "cannot load the pipeline" in alone.stderr
    first = cli("profile", *common, *captured)
    assert first.returncode == 0, first.stderr
    assert "profile: reused" in cli("profile", *common, *captured).stderr
    made = cli("allocate", *common, *captured, "--budget", "uniform:3", "--json")
    assert made.returncode == 0, made.stderr
    exported = cli("export", *common, *captured, "--budget", "uniform:3")
    assert exported.returncode == 0, exported.stderr
    bit_map = json.loads(next((tmp_path / "r").rglob("export/**/bitmap.json")).read_text())
    assert any("attn2.to_k" in name for name in bit_map["data"]["layers"])
    recorded(cli, tmp_path, "-o", "calls.safetensors", "--overwrite", "--guidance", "3")
    stale = cli("profile", *common, *captured)
    assert stale.returncode == 4
    assert "calls (" in stale.stderr


def test_what_samples_is_refused_before_anything_long_begins(cli: Cli, tmp_path: Path) -> None:
    folder = recorded(cli, tmp_path)
    common = ["--model", folder, "--run-dir", "r", "--set", 'calibration.captured="calls.safetensors"']
    refused = cli("evaluate", *common)
    assert refused.returncode == 2
    assert "(evaluate) was asked for" in refused.stderr
    assert "8 recorded calls" in refused.stderr
    assert "To sample, give the pipeline's folder" in refused.stderr
    assert not (tmp_path / "r/profile.json").exists()
    slow = cli("profile", *common, "--set", "calibration.final_widths=[3]")
    assert slow.returncode == 2
    assert "final_widths" in slow.stderr
