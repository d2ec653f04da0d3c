"""Profiles of the weights alone, as a user makes them: killed and continued, then used by an allocation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli

METHOD = """
[model]
source = "fmnist-dit"
[policy]
widths = [2, 4]
[quantizer]
n_candidates = 40
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
    started = subprocess.Popen(
        [sys.executable, "-m", "mpqsearch.cli", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    partial = tmp_path / "r/partial/weights"
    deadline = time.monotonic() + 200
    while len(list(partial.glob("[0-9]*.npz"))) < 3 and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    started.communicate(timeout=60)
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
