"""A pipeline that needs prompt embeddings, from its recorded calls to an exported map, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mpqsearch.models import capture, save_calls
from mpqsearch.sampling import load_model
from tests.e2e.conftest import Cli
from tests.support import tiny_prompted_pipeline


def record(folder: Path, path: Path, seed: int = 0) -> None:
    """The lines of a user, around a pipeline in miniature: two prompts, and calls at four times of each."""
    denoiser = load_model(str(folder))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), capture(denoiser.module, limit=8) as calls:
        for text in torch.randn(2, 2, 4, 8, generator=generator):
            for t in (900, 600, 300, 0):
                x = torch.randn(2, 4, 8, 8, generator=generator)
                denoiser.module(x, torch.tensor(t), encoder_hidden_states=text)
    save_calls(path, calls)


def test_a_prompted_pipeline_is_profiled_and_allocated_from_recorded_calls(cli: Cli, tmp_path: Path) -> None:
    folder = tiny_prompted_pipeline(tmp_path / "sd")
    record(folder, tmp_path / "calls.safetensors")
    captured = ["--set", 'calibration.captured="calls.safetensors"']
    common = [
        "--model",
        folder,
        "--run-dir",
        "r",
        "--set",
        "calibration.probe_inputs=2",
        "--set",
        "quantizer.n_candidates=8",
    ]
    alone = cli("profile", *common)
    assert alone.returncode == 2
    assert "Record calls of its pipeline" in alone.stderr
    first = cli("profile", *common, *captured)
    assert first.returncode == 0, first.stderr
    again = cli("profile", *common, *captured)
    assert "profile: reused" in again.stderr
    made = cli("allocate", *common, *captured, "--budget", "uniform:3", "--json")
    assert made.returncode == 0, made.stderr
    exported = cli("export", *common, *captured, "--budget", "uniform:3")
    assert exported.returncode == 0, exported.stderr
    bit_map = json.loads(next((tmp_path / "r").rglob("export/**/bitmap.json")).read_text())
    assert any("attn2.to_k" in name for name in bit_map["data"]["layers"])
    record(folder, tmp_path / "calls.safetensors", seed=1)
    stale = cli("profile", *common, *captured)
    assert stale.returncode == 4
    assert "calls (" in stale.stderr


def test_what_samples_is_refused_before_anything_long_begins(cli: Cli, tmp_path: Path) -> None:
    folder = tiny_prompted_pipeline(tmp_path / "sd")
    record(folder, tmp_path / "calls.safetensors")
    common = ["--model", folder, "--run-dir", "r", "--set", 'calibration.captured="calls.safetensors"']
    refused = cli("evaluate", *common)
    assert refused.returncode == 2
    assert "(evaluate) was asked for" in refused.stderr
    assert "8 recorded calls" in refused.stderr
    assert "To sample, give the module a method denoise" in refused.stderr
    assert not (tmp_path / "r/profile.json").exists()
    slow = cli("profile", *common, "--set", "calibration.final_widths=[3]")
    assert slow.returncode == 2
    assert "Leave final_widths out" in slow.stderr
