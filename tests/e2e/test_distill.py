"""``mpqsearch distill`` on a tiny model: trains, reuses, continues, refuses."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.e2e import forked
from tests.e2e.conftest import Cli

pytestmark = pytest.mark.slow

SMALL = ("--set", "distill.batch=2", "--set", "distill.rank=4", "--set", "distill.relation.pooled_size=4")


def test_distill_trains_measures_and_reuses(cli: Cli, study: Path, profiled: Path) -> None:
    call = (
        "distill",
        "-c",
        study,
        "-o",
        "r",
        "--method",
        "ilp-channel",
        "--budget",
        "uniform:3",
        *SMALL,
        "--set",
        "distill.steps=4",
    )
    dry = cli(*call, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not (profiled / "distilled").exists()
    done = cli(*call, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["before"]["paired_mse"]["value"] != data["after"]["paired_mse"]["value"]
    folder = profiled / "distilled/ilp-channel@uniform-3"
    assert {
        "bitmap.json",
        "codes.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "metrics.json",
        "train.jsonl",
    } <= {p.name for p in folder.iterdir()}
    assert len((folder / "train.jsonl").read_text().splitlines()) == 4
    again = cli(*call, "--json")
    assert "distill: reused" in again.stderr
    assert json.loads(again.stdout) == data
    whole = (folder / "codes.safetensors").read_bytes()
    (folder / "codes.safetensors").write_bytes(whole[:-1])
    edited = cli(*call)
    assert (edited.returncode, "mpqsearch distill --overwrite" in edited.stderr) == (2, True)
    (folder / "codes.safetensors").write_bytes(whole)
    settings = [*call[1:5], *call[7:]]
    named = cli(
        "export", *settings, "--method", "ilp-channel+trd", "-t", "packed", "-t", "neutral", "--verify", "--accept"
    )
    assert named.returncode == 0, named.stderr
    stamp = json.loads((profiled / "export/packed@uniform-3.json").read_text())["data"]
    assert stamp["map"] == "ilp-channel+trd at uniform:3"
    assert stamp["verification"]["evaluated_error"] < 1e-3, "the file is the trained model"
    measured, after = (d["paired_mse"]["value"] for d in (stamp["delivered"]["metrics"], data["after"]))
    assert abs(measured / after - 1) < 0.01, "biases are in half precision"
    missing = cli("export", *settings[:4], *SMALL, "--method", "uniform+trd", "-t", "packed", "--budget", "uniform:3")
    assert missing.returncode == 2
    assert "uniform was not trained at uniform:3" in missing.stderr
    other = cli(*call, "--set", "distill.relation.temperature=0.5")
    assert other.returncode == 4
    assert "distill (" in other.stderr
    assert "--overwrite" in other.stderr
    assert cli(*call, "--set", "distill.relation.temperature=0.5", "--overwrite").returncode == 0
    misspelt = cli(*call, "--set", "distill.relation.temprature=0.5")
    assert misspelt.returncode == 2
    assert "'temperature'" in misspelt.stderr


def test_a_checked_training_keeps_its_best_student(cli: Cli, study: Path, profiled: Path) -> None:
    call = (
        "distill",
        "-c",
        study,
        "-o",
        "r",
        "--method",
        "uniform",
        "--budget",
        "uniform:3",
        *SMALL,
        "--set",
        "distill.steps=4",
    )
    call = (
        *call,
        "--set",
        "distill.check_every=2",
        "--set",
        "distill.check_samples=6",
        "--set",
        "distill.lr_factor=1000",
    )
    done = cli(*call, "--json", "--set", "distill.explosion=1e9", "--set", "distill.clip_norm=0")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [step for step, _ in data["checks"]] == [0, 2, 4]
    # Rates a thousand times too high leave no student better than the one before training.
    assert "kept the student of step 0 of 4" in done.stderr
    assert data["after"]["paired_mse"]["value"] == data["before"]["paired_mse"]["value"]
    overlapping = cli(*call, "--set", "distill.check_seed=0")
    assert overlapping.returncode == 2
    assert "Move distill.check_seed" in overlapping.stderr


def test_a_terminated_training_continues_with_the_same_command(cli: Cli, study: Path, profiled: Path) -> None:
    quantized = 'allocator = "uniform"\nact_bits = 4\nact_scales = "timestep"'
    study.write_text(study.read_text().replace('allocator = "uniform"', quantized))
    call = ["distill", "-c", str(study), "-o", "r", "--method", "uniform", "--budget", "uniform:3", *SMALL]
    call += ["--set", "distill.steps=24"]
    said = profiled.parent / "err"
    process = forked.start(call, profiled.parent, profiled.parent / "out", said)
    log = profiled / "distilled/uniform@uniform-3/train.jsonl"
    deadline = time.monotonic() + 240
    while (
        not (log.exists() and len(log.read_text().splitlines()) >= 3)
        and process.is_alive()
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    assert forked.stop(process, signal.SIGTERM) == 128 + signal.SIGTERM, said.read_text()
    assert "The same command continues" in said.read_text()
    before = len(log.read_text().splitlines())
    assert 3 <= before < 24
    done = cli(*call)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 25))
    learned = json.loads((log.parent / "activations.json").read_text())["data"]
    assert len(learned["timesteps"]) == 3  # the steps of the study's sampler
    assert all(len(entry["scale"]) == 3 for entry in learned["layers"].values())
