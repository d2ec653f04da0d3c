"""Measured selection on the command line: what is tried, kept, reused, and left out on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mpqsearch.artifacts import read_json
from mpqsearch.cli import app
from mpqsearch.errors import ConfigError, StaleArtifactError

STUDY = """
[model]
source = {source}
[policy]
widths = [1, 2, 3, 4, 6, 8]
[quantizer]
n_candidates = 8
moment_samples = 2
[sampler]
steps = 2
batch = 4
[calibration]
samples = 2
probe_inputs = 3
probes = 1
sampler_seeds = 2
sampler_probes = 1
context_seeds = 3
[allocate]
budgets = ["uniform:3"]
select_samples = 8
[[methods]]
name = "measured"
allocator = "measured"
scheme = "auto"
bias_correction = true
rounding = "gptq"
"""
PLACE = "allocations/measured@uniform-3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an allocation of a small transformer."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    )  # fmt: skip
    where = tmp_path_factory.mktemp("selection")
    model.save_pretrained(where / "dit")
    DDIMScheduler().save_pretrained(where / "dit")
    (where / "study.toml").write_text(STUDY.format(source=json.dumps(str(where / "dit"))))
    done = call(where, "allocate")
    assert done.exit_code == 0, done.output
    assert "what was tried for measured at uniform:3" in done.output
    return where


def call(folder: Path, verb: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [verb, "-c", str(folder / "study.toml"), "-o", str(folder / "r"), *arguments])


def test_the_map_that_is_handed_out_measured_no_worse_than_uniform(folder: Path) -> None:
    data = read_json(folder / "r" / PLACE / "allocation.json", "mpqsearch/allocation").data
    rows = data["selection"]["rows"]
    assert {"uniform, nearest", "uniform, gptq", "by layer, kfac", "by channel, nearest", "by channel, kfac"} <= {
        r["candidate"] for r in rows
    }
    (chosen,) = [r for r in rows if r["verdict"] == "chosen"]
    apart = [r for r in rows if r["verdict"] == "worse"]
    assert all(r["ratio"] >= 1 for r in apart), "what was given up was behind"
    assert chosen["samples"] >= max(r["samples"] for r in rows)
    sizes = {r["size_bytes"] for r in rows}
    assert max(sizes) <= data["limit"] / 8 + 1
    assert data["within_budget"]


def test_the_same_command_reuses_it_and_other_samples_make_it_stale(folder: Path) -> None:
    before = (folder / "r" / PLACE / "allocation.json").stat().st_mtime_ns
    assert call(folder, "allocate").exit_code == 0
    assert (folder / "r" / PLACE / "allocation.json").stat().st_mtime_ns == before
    stale = call(folder, "allocate", "--set", "allocate.select_samples=4")
    assert isinstance(stale.exception, StaleArtifactError)


def test_nothing_is_sampled_on_request_and_the_answer_is_certified(folder: Path) -> None:
    other = ("-o", str(folder / "plain"), "--select", "none")
    done = call(folder, "allocate", *other, "--json")
    assert done.exit_code == 0, done.output
    (made,) = json.loads(done.stdout)
    assert "selection" not in made
    assert made["result"]["status"] == "optimal"
    check = CliRunner().invoke(app, ["inspect", str(folder / "plain" / PLACE / "allocation.json"), "--check"])
    assert check.exit_code == 0, check.output
    unknown = call(folder, "allocate", "--select", "some")
    assert isinstance(unknown.exception, ConfigError)
    assert "unknown selection 'some'" in str(unknown.exception)


def test_what_was_selected_can_be_checked_and_quantized(folder: Path) -> None:
    where = folder / "r" / PLACE / "allocation.json"
    check = CliRunner().invoke(app, ["inspect", str(where), "--check"])
    assert check.exit_code == 0, check.output
    done = call(folder, "quantize", "--budget", "uniform:3")
    assert done.exit_code == 0, done.output


def test_the_smallest_map_of_a_quality_is_found_and_found_again(folder: Path) -> None:
    few = ("--set", "evaluate.samples=4", "--select", "none", "-o", str(folder / "until"))
    done = call(folder, "allocate", *few, "--until", "paired_mse<=1e-3", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["best"]["passes"] == "yes"
    assert found["best"]["high"] <= 1e-3
    assert 2 <= len(found["tried"]) <= 8
    failing = [row["size_bytes"] for row in found["tried"] if row["passes"] == "no"]
    assert all(size < found["best"]["size_bytes"] for size in failing)
    began = (folder / "until/metrics").stat().st_mtime_ns
    again = call(folder, "allocate", *few, "--until", "paired_mse<=1e-3", "--json")
    assert json.loads(again.stdout) == found
    assert (folder / "until/metrics").stat().st_mtime_ns == began, "nothing was measured twice"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--until", "fd_fb<=1"), "unknown metric 'fd_fb'"),
        (("--until", "ssim>=2", "--set", 'evaluate.scorers=["ssim"]'), "itself does not reach ssim>=2"),
        (("--until", "fd_fp"), "cannot read the quality 'fd_fp'"),
        (("--until", "paired_mse<=1e-30", "--budget", "3bit"), "paired_mse<=1e-30 is not reached: the map of"),
        (("--until", "paired_mse<=1", "--target", "gguf"), "without --target"),
        (("--method", "measured"), "--method of allocate goes with --until"),
    ],
)
def test_a_quality_that_cannot_be_is_said(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    few = ("--set", "evaluate.samples=4", "--select", "none", "-o", str(folder / "until"))
    done = call(folder, "allocate", *few, *arguments)
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_a_memory_limit_without_room_for_gradients_is_said_and_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are then those of GPTQ. Nothing is kept of it that a run with more memory would take for gradients."""
    monkeypatch.setattr("mpqsearch.profile.gradient_bytes", lambda _table: 10**10)  # of this model 0.4 MB
    where = ("-o", str(folder / "small"))
    done = call(folder, "allocate", *where, "--set", "model.memory_limit='1GB'")
    assert done.exit_code == 0, done.output
    assert "codes are those of GPTQ; gradients take" in " ".join(done.output.split())
    assert not (folder / "small" / "profiles" / "gradients.json").exists()
    assert (folder / "r" / "profiles" / "gradients.json").is_file()
    more = call(folder, "allocate", *where)
    assert isinstance(more.exception, StaleArtifactError)
    assert "gradients" in str(more.exception)
