"""Profiles of the weights alone, as a user makes them: killed and continued, then used by an allocation."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.e2e import forked
from tests.e2e.conftest import Cli

METHOD = """
[model]
source = "fmnist-dit"
[policy]
widths = [2, 4]
[quantizer]
n_candidates = 10
[calibration]
schemes = ["asymmetric"]
weights_only = true
[allocate]
budgets = ["uniform:4"]
[[methods]]
name = "weights"
allocator = "ilp-layer"
loss = "weight"
[[methods]]
name = "gains"
allocator = "ilp-layer"
loss = "probe"
"""


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_continues_with_the_next_layer(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(METHOD)
    arguments = ["profile", "-c", "s.toml", "--run-dir", "r", "--weights-only", "--memory-limit", "500MB"]
    started = forked.start(arguments, tmp_path, tmp_path / "out", tmp_path / "err")
    partial = tmp_path / "r/partial/weights"
    deadline = time.monotonic() + 200
    while len(list(partial.glob("[0-9]*.npz"))) < 3 and started.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert forked.stop(started, signal.SIGKILL) == -signal.SIGKILL
    kept = {p.name: p.stat().st_mtime_ns for p in partial.glob("[0-9]*.npz")}
    assert 3 <= len(kept) < 48
    assert not (tmp_path / "r/profile.json").exists()
    resumed = cli(*arguments, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert f"profile: continuing after {len(kept)} of 48 layers" in resumed.stderr
    assert json.loads(resumed.stdout)["calibration"]["spec"]["weights_only"] is True
    assert not (tmp_path / "r/partial").exists()
    again = cli(*arguments)
    assert "profile: reused" in again.stderr
    made = cli("allocate", "-c", "s.toml", "--run-dir", "r")
    assert made.returncode == 2
    assert "the loss 'probe' needs 'sensitivity'" in made.stderr
    assert (tmp_path / "r/allocations/weights@uniform-4/bitmap.json").exists()


def test_a_limit_that_is_too_small_names_the_layer(cli: Cli, tmp_path: Path) -> None:
    small = cli("profile", "--model", "fmnist-dit", "--run-dir", "r", "--weights-only", "--memory-limit", "1kB")
    assert small.returncode == 2
    assert "more than the memory limit" in small.stderr
    wrong = cli("profile", "--model", "fmnist-dit", "--run-dir", "r", "--weights-only", "--memory-limit", "lots")
    assert wrong.returncode == 2
    assert "cannot read the size 'lots'" in wrong.stderr
