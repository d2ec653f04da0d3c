"""W4A4 and W3A6 through the command line: allocation, calibration, sampling, tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli

METHODS = """
[[methods]]
name = "uniform"
allocator = "uniform"
[[methods]]
name = "uniform-a4"
allocator = "uniform"
act_bits = 4
[[methods]]
name = "uniform-a6-steps"
allocator = "uniform"
act_bits = 6
act_scales = "timestep"
[[methods]]
name = "omq-paper"
allocator = "omq-paper"
act_bits = 4
[[methods]]
name = "ours-a4"
allocator = "ilp-channel"
scheme = "auto"
bias_correction = true
act_bits = 4
[[methods]]
name = "ours-a4-smoothed"
allocator = "ilp-channel"
scheme = "auto"
smooth = true
bias_correction = true
act_bits = 4
"""


@pytest.mark.slow
def test_a_study_with_quantized_activations(cli: Cli, study: Path, tmp_path: Path) -> None:
    text = study.read_text()
    start, end = text.index("[[methods]]"), text.index("[evaluate]")
    study.write_text(text[:start] + METHODS + text[end:])
    options = (
        "--set",
        "calibration.smooth=true",
        "--set",
        "calibration.activation_bits=[4]",
        "--set",
        "activations.zero_points=true",
        "--set",
        'allocate.budgets=["uniform:3"]',
    )
    made = cli("run", study, "--run-dir", "r", *options)
    assert made.returncode == 0, made.stderr
    with (tmp_path / "r/pareto.csv").open() as handle:
        rows = {(r["method"], r["budget"]): r for r in csv.DictReader(handle)}
    for budget in ("uniform:3",):
        acts = {m: float(rows[m, budget]["act_bits"]) for m, b in rows if b == budget}
        assert acts == {
            "uniform": 16,
            "uniform-a4": 4,
            "uniform-a6-steps": 6,
            "omq-paper": 4,
            "ours-a4": 4,
            "ours-a4-smoothed": 4,
        }
        error = {m: float(rows[m, budget]["paired_mse"]) for m in acts}
        assert error["uniform-a4"] > error["uniform"], "four bits for the activations must show in the samples"
        size = {m: int(rows[m, budget]["size_bytes"]) for m in acts}
        assert size["uniform"] < size["uniform-a4"] < size["uniform-a6-steps"], (
            "scales are stored, one a step more than one"
        )
        assert max(size["ours-a4"], size["ours-a4-smoothed"]) <= size["uniform-a4"]
    bit_map = json.loads((tmp_path / "r/allocations/uniform-a6-steps@uniform-3/bitmap.json").read_text())["data"]
    assert bit_map["activation_steps"] == 3
    assert bit_map["layers"]["conv_in"]["activation_bits"] == 8
    assert bit_map["layers"]["mid_block.resnets.0.conv1"]["activation_bits"] == 6
    again = cli("run", study, "--run-dir", "r", *options)
    assert again.returncode == 0, again.stderr
    assert "report: reused" in again.stderr
    export = ("export", "-c", study, "--run-dir", "r", *options, "--method", "uniform-a4", "--budget", "uniform:3")
    exported = cli(*export, "--target", "neutral", "--target", "sdcpp")
    assert exported.returncode == 0, exported.stderr
    quantized = sum("activation_bits" in e for e in bit_map["layers"].values())
    assert f"sdcpp says nothing of inputs: the map quantizes those of {quantized} layers" in exported.stderr
    assert "neutral says nothing" not in exported.stderr
    plan = json.loads((tmp_path / "r/export/sdcpp@uniform-3.json").read_text())["data"]["plan"]
    assert sum("not quantized by what is written" in row["detail"] for row in plan) == quantized
    changed = cli("run", study, "--run-dir", "r", *options, "--set", "activations.samples=4", "--dry-run")
    assert "; 1 reused" in changed.stderr, "maps without quantized activations keep their metrics, the others do not"
